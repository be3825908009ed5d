"""The supervisor: the impure shell around the controller.

It owns the listening socket, the runtime directory, the rendezvous store, all processes (`processes/`) and its HTTP
servers (`gates/answering.py`). It turns what happens into events for the controller and carries out the actions that
come back, in order.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any, ClassVar, get_args

import structlog

from elastic_daemon import protocol as p
from elastic_daemon.app import make_control_app
from elastic_daemon.config import Settings
from elastic_daemon.control.gpu_pool import GpuPool
from elastic_daemon.control.pace import Pace
from elastic_daemon.control.service_control import EXIT_START
from elastic_daemon.controller import Controller
from elastic_daemon.errors import ConfigError, ElasticError
from elastic_daemon.gates.answering import Answering, bind
from elastic_daemon.gates.ssl_refresh import watch_files
from elastic_daemon.gates.tls import Tls
from elastic_daemon.processes.children import Processes
from elastic_daemon.processes.control_server import ControlServer, Peer
from elastic_daemon.processes.fork_specs import frontend_spec, rank_spec
from elastic_daemon.processes.frontend_link import FrontendLink, frontend_settings
from elastic_daemon.processes.launcher import Zygote, adopt_orphans, reap_orphans
from elastic_daemon.processes.messages import Message
from elastic_daemon.processes.rank_messages import RankAction, rank_event
from elastic_daemon.processes.rank_peers import RankPeers
from elastic_daemon.processes.runtime_dir import RuntimeDir
from elastic_daemon.processes.service_manager import ServiceManager
from elastic_daemon.processes.store import RendezvousStore
from elastic_daemon.routes.health import HealthView, url_of
from elastic_daemon.routes.operations import OperationDesk
from elastic_daemon.routes.placement_view import PlacementView
from elastic_daemon.routes.recovery_history import RecoveryHistory
from elastic_daemon.settings.reload import Reloader, has_terminal
from elastic_daemon.settings.sources import Sources
from elastic_daemon.settings.start_policy import Configured, configure, with_settings
from elastic_daemon.state.state_writer import StateWriter
from elastic_daemon.tasks import Tasks
from elastic_daemon.telemetry.events import EventLog
from elastic_daemon.telemetry.logs import configure_logging
from elastic_daemon.telemetry.loop_lag import watch_lag
from elastic_daemon.telemetry.metrics import Metrics
from elastic_daemon.watch.side import WatchdogSide

log = structlog.get_logger(__name__)

HEARTBEAT_S = 0.5

SETTLE_TIMEOUT_S = 3.0


class Supervisor:
    def __init__(self, settings: Settings, sources: Sources | None = None) -> None:
        """`sources`: what the settings came from, to be read anew on SIGHUP."""
        self.settings = settings
        self.events = EventLog()
        self.metrics = Metrics()
        self.recoveries = RecoveryHistory()
        self.model = settings.model or "tiny-moe"
        self.min_ranks = 1
        self.max_ranks = settings.most_ranks
        self.automation = True
        self.operations = OperationDesk(self.tell)
        self._state = StateWriter(settings)
        self._started = time.monotonic()
        self.service = ServiceManager(settings)
        self._controller: Controller | None = None
        self._ranks = RankPeers()
        self._frontend = FrontendLink(self.events, self.metrics, self.tell, settings.shutdown_timeout)
        self._exit: asyncio.Future[p.Exit]
        self._tasks = Tasks(lambda error: self._finish(p.Exit(1, error)))
        self._wake = asyncio.Event()
        self.reloader = Reloader(sources, settings, self._adopt, self.events)
        self.reloader.around = partial(self.service.reloading, self._frontend.when_adopted)

    async def run(self) -> int:
        """Serve until stopped. Returns the exit code; raises ElasticError when the start fails at once."""
        loop = asyncio.get_running_loop()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload
        self._exit = loop.create_future()
        self._runtime = RuntimeDir(self.settings.runtime_dir)
        try:
            self._ranks.fence = self._runtime.make_fence_word()
            self._listener = bind(self.settings.host, self.settings.port)
            self.port = int(self._listener.getsockname()[1])
            with self._listener:
                return await self._run_with_zygote()
        finally:
            self._runtime.close()

    async def _run_with_zygote(self) -> int:
        self.events.record(
            "starting", {"host": self.settings.host, "port": self.port, "runtime_dir": str(self._runtime.path)}
        )
        adopt_orphans()
        self._zygote = Zygote(self._listener)
        self._processes = Processes(
            self._zygote,
            self._tasks,
            self.events,
            self._rank_exited,
            self._frontend_gone,
            lambda status: self.tell(p.FrontendExited(status)),
        )
        self._watch = WatchdogSide(self.settings, self, {self._zygote.pid})
        try:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stop_requested)
            await self._zygote.connect(
                lambda: self._finish(p.Exit(1, "the zygote has ended, and its children with it"))
            )
            control = ControlServer(self._on_message, self._on_hello)
            await control.start(self._runtime.control_socket)
            app = make_control_app(self)
            self._answering = Answering(app, self._watch.routes_before(app), self._listener, self.settings, self._tasks)
            self._answering.open_internal(self._runtime.http_socket)
            self._answering.open_public()
            loop.add_signal_handler(signal.SIGHUP, self._hung_up, has_terminal())
            configuring = configure(self._zygote, self.settings, self.events)
            preparing = asyncio.gather(asyncio.to_thread(RendezvousStore), configuring, self._watch.prepare())
            either: set[asyncio.Future[Any]] = {preparing, self._exit}
            await self.service.prepare(either)
            if preparing.done():
                self._store, configured, _ = await preparing
                self._tasks.spawn(self._watch.run())
                self._begin(configured)
            ended = await self._supervise()
            self._answering.close()
            await control.close()
            return ended.code
        finally:
            await self._watch.close()
            self._zygote.stop()
            await self._settle()

    async def _settle(self) -> None:
        """See the children's ends, and let tasks finish, before the runtime directory goes."""
        await self._processes.wait_all(SETTLE_TIMEOUT_S)
        reap_orphans()
        await self._tasks.settle(SETTLE_TIMEOUT_S)

    def _begin(self, configured: Configured) -> None:
        settings = self.settings
        self.model, self.min_ranks = configured.model, configured.min_ranks
        self._policy = with_settings(configured.policy, settings)  # which may have been reloaded meanwhile
        self._gpus = GpuPool(self._watch.uuids, settings.ranks_per_gpu, settings.gpu_probation, self._watch.barred)
        self._controller = Controller(self._policy, time.monotonic(), self._gpus)
        self._carry_out(self._controller.start(time.monotonic()))
        if not self.automation:
            self.tell(p.AutomationSwitched(False))

    async def _supervise(self) -> p.Exit:
        """The control loop: sends Tick when something is due, and proves with each turn that it lives."""
        gc.collect()
        gc.freeze()  # what is here stays: to look for garbage in it would stop the loop for a tenth of a second
        beside = [asyncio.create_task(watch_lag(self.metrics.loop_lag))]
        if (tls := self.settings.tls) is not None and self.settings.enable_ssl_refresh:
            beside.append(asyncio.create_task(watch_files(tls.files, partial(self._renew_certificate, tls))))
        try:
            await self._turn()
        finally:
            for task in beside:
                task.cancel()
        ended = self._exit.result()
        self.events.record("stopped", {"code": ended.code, "reason": ended.reason})
        return ended

    async def _turn(self) -> None:
        pace = Pace(time.monotonic())
        while not self._exit.done():
            self.service.turn(self._controller)
            deadline = self._controller.next_deadline() if self._controller is not None else None
            delay = HEARTBEAT_S if deadline is None else min(HEARTBEAT_S, max(0.0, deadline - time.monotonic()))
            self._wake.clear()
            waker = asyncio.ensure_future(self._wake.wait())
            either: set[asyncio.Future[Any]] = {waker, self._exit}
            await asyncio.wait(either, timeout=delay, return_when=asyncio.FIRST_COMPLETED)
            waker.cancel()
            now = time.monotonic()  # once: to stand still between here and the end must make nobody late
            if (stalled_s := pace.stalled_s(now, delay)) > 0.0:
                self.tell(p.Stalled(stalled_s), now)
            if deadline is not None and now >= deadline:
                self.tell(p.Tick(), now)

    def _hung_up(self, had_terminal: bool) -> None:
        """SIGHUP is an order to reload, and what a terminal that closes sends to whoever was started in it."""
        if had_terminal and not has_terminal():
            return self._stop_requested()
        self.reloader.reload()

    def _stop_requested(self) -> None:
        self.service.stopping(self.settings.shutdown_timeout)
        self._release_readers()
        if self._controller is None:
            self._finish(p.Exit(0, "stopped while starting"))
        else:
            self.tell(p.StopRequested(self.settings.shutdown_timeout))

    def _finish(self, ended: p.Exit) -> None:
        self._release_readers()
        if not self._exit.done():
            self._exit.set_result(ended)

    def _release_readers(self) -> None:
        """Who waits for something would hold up the end of the servers."""
        self.operations.close("the daemon stops")
        self.events.end()

    def tell(self, event: p.Event, at: float | None = None) -> None:
        """`at`: when this was so; None: it is so now."""
        if isinstance(event, p.FrontendReady):
            self._answering.close_public()
        if self._controller is not None and not self._exit.done():
            self._carry_out(self._controller.handle(event, time.monotonic() if at is None else at))
            self._wake.set()

    def _adopt(self, settings: Settings, names: tuple[str, ...]) -> None:
        """Go on with settings of which `names` have changed."""
        self._answering.adopt(settings)  # first: it may find that a certificate cannot be used
        self.settings = settings
        if "log_level" in names:
            configure_logging(settings.log_level)
            self._ranks.set_log_level(settings.log_level)
        self._frontend.adopt(frontend_settings(self.settings), settings.shutdown_timeout)
        if self._controller is not None and not self._exit.done():
            self._gpus.try_out(settings.gpu_probation)
            self._policy = with_settings(self._policy, settings)
            self._carry_out(self._controller.adopt(self._policy, time.monotonic()))
            self._wake.set()

    def _renew_certificate(self, tls: Tls) -> None:
        try:
            tls.check()
            self._adopt(self.settings, ())
            self.events.record("certificate_renewed", {})
        except ConfigError as error:  # it goes on with the certificate that it has
            self.events.record("certificate_unreadable", {"reason": str(error)})

    def set_automation(self, enabled: bool) -> None:
        self.automation = enabled
        self.tell(p.AutomationSwitched(enabled))

    def release_gpu(self, uuid: str) -> None:
        self._watch.release_gpu(uuid)

    def _on_hello(self, peer: Peer) -> None:
        if peer.role == "rank":
            self._ranks.add(peer)
            peer.send("log_level", level=self.settings.log_level)  # a reload may have changed it since the fork
            if peer.lifeline is not None:
                self._processes.follow_rank((peer.rank, peer.incarnation), peer.lifeline)
        else:
            self._frontend.connected(peer)

    def _on_message(self, peer: Peer, message: Message) -> None:
        if peer.role == "frontend":
            return self._frontend.hear(peer, message)
        if message["type"] == "ready":
            self._frontend.introduce(peer.incarnation, message["response"])
        event = rank_event((peer.rank, peer.incarnation), message)
        if event is None:
            return log.warning("message_unknown", rank=peer.rank, type=message["type"])
        self.metrics.count_loads(event)
        self.tell(event)

    def _carry_out(self, actions: tuple[p.Action, ...]) -> None:
        for action in actions:
            self._handlers[type(action)](self, action)

    def _start_rank(self, action: p.StartRank) -> None:
        self._tasks.spawn(self._fork_rank(action))

    async def _fork_rank(self, action: p.StartRank) -> None:
        spec = rank_spec(action, self.settings, self._runtime, self._store)
        try:
            await self._processes.fork_rank((action.rank, action.incarnation), **spec)
        except ElasticError as error:
            self._finish(p.Exit(EXIT_START, str(error)))

    def _rank_exited(self, identity: p.Identity) -> None:
        self.tell(p.RankExited(*identity, "process ended"))
        self._ranks.forget(identity)
        self._frontend.forget(identity[1])
        self._watch.remove_page(identity[1])

    def _kill_rank(self, action: p.KillRank) -> None:
        self._processes.kill_rank((action.rank, action.incarnation), action.doubtful)

    def _tell_rank(self, action: RankAction) -> None:
        self._ranks.tell(action)

    def _publish(self, action: p.Publish) -> None:
        self._frontend.publish(action.membership)

    def _start_frontend(self, _: p.StartFrontend) -> None:
        self._tasks.spawn(self._fork_frontend())

    async def _fork_frontend(self) -> None:
        await self._processes.fork_frontend(**frontend_spec(self.settings, self._runtime, self._listener))

    def _frontend_gone(self) -> None:
        self._frontend.gone()
        if not self._exit.done():
            self._answering.open_public()

    def _kill_frontend(self, _: p.KillFrontend) -> None:
        self._processes.kill_frontend()

    def _record(self, action: p.RecordEvent) -> None:
        self.events.record(action.name, action.fields)

    def _recovery_done(self, action: p.RecoveryDone) -> None:
        report = action.report
        self.metrics.recovery(report)
        active = len(self._frontend.published.active) if self._frontend.published is not None else 0
        self.recoveries.record(report, active, time.time())
        seconds = {phase: round(spent, 4) for phase, spent in report.seconds.items()}
        self.events.record(
            "recovery_done", {"epoch": report.epoch, "kind": report.kind, "ranks": report.ranks, "seconds": seconds}
        )

    def _operation_changed(self, action: p.OperationChanged) -> None:
        self.operations.changed(action.report)

    def _remember(self, action: p.StoreTarget | p.StoreBarred) -> None:
        self._tasks.spawn(self._state.store(action))

    def _stop_all(self, _: p.StopAll) -> None:
        self._processes.kill_all()

    _handlers: ClassVar[dict[type, Callable[[Supervisor, Any], None]]] = {
        p.StartRank: _start_rank,
        p.KillRank: _kill_rank,
        **dict.fromkeys(get_args(RankAction), _tell_rank),
        p.Publish: _publish,
        p.StartFrontend: _start_frontend,
        p.KillFrontend: _kill_frontend,
        p.RecordEvent: _record,
        p.RecoveryDone: _recovery_done,
        p.OperationChanged: _operation_changed,
        p.StoreTarget: _remember,
        p.StoreBarred: _remember,
        p.StopAll: _stop_all,
        p.Exit: _finish,
    }

    @property
    def is_turning(self) -> bool:
        return self.service.is_turning

    def snapshot(self) -> p.HealthSnapshot | None:
        return self._controller.snapshot(time.monotonic()) if self._controller is not None else None

    def placement(self) -> PlacementView | None:
        return self._controller.placement if self._controller is not None else None

    @property
    def rank_pids(self) -> dict[p.Identity, int]:
        return self._processes.rank_pids

    def health(self) -> HealthView:
        return HealthView(
            snapshot=self.snapshot(),
            model=self.model,
            target=self.settings.data_parallel_size,
            in_flight=self._frontend.in_flight,
            in_flight_by_rank=self._frontend.in_flight_by_rank,
            pids=self.rank_pids,
            epoch_start=datetime.now(UTC).timestamp() - time.monotonic(),
            url=url_of(self.settings.host, self.port, secure=self.settings.tls is not None),
            watchdog=self._watch.view,
            refusing=self._frontend.refusing,
        )

    async def ask_ranks(self, question: str) -> dict[int, Any]:
        """The answer of each active rank to one of the engine core's calls."""
        if self._frontend.published is None:
            return {}
        return await self._ranks.ask(self._frontend.published.active, question)
