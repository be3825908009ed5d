"""Children of the prober that exist on paper: what each touches when, whom a hung GPU catches, who survives SIGKILL."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from watchdog.child import Call
from watchdog.probe import Prober

STEP_S = 0.1
GPUS = ("GPU-a", "GPU-b", "GPU-c")


class FakeChild:
    """Its calls return at once, but for those on a GPU that hangs. It takes part in `World.step`."""

    def __init__(
        self,
        world: World,
        role: str,
        arguments: Iterable[str],
        now: float,
        on_message: Callable[[Any, dict[str, Any]], None],
        on_exit: Callable[[Any], None],
    ) -> None:
        options = list(arguments)
        named = dict(zip(options[::2], options[1::2], strict=True))
        self.role = role
        self.only: str | None = named.get("--only")
        self.skip = _set(named.get("--skip", ""))
        self.started = self.cycled = now
        self.opened = False
        self.gpus: frozenset[str] = frozenset()
        self.listening: frozenset[str] = frozenset()
        self.killed: float | None = None
        self.ended: int | None = None
        self.waits_for_processor = False
        self.pid = world.next_pid()
        self.at: tuple[str, float] | None = None
        """The call that does not return: its GPU, empty for the driver as a whole, and since when."""
        self._world, self._on_message, self._on_exit = world, on_message, on_exit
        self._to_open = True

    @property
    def kind(self) -> str:
        return "events" if self.role == "events" else "poll"

    def call(self, now: float) -> Call | None:
        self.cycled = now if self.at is None else self.cycled
        return Call(self.at[0], "fields", self.at[1]) if self.at is not None else None

    def tell(self, command: str) -> None:
        word, _, argument = command.partition(" ")
        if word == "skip":
            self.skip, self._to_open = _set(argument), True

    def open_again(self) -> None:
        """By itself, as when waiting for events has failed."""
        self._to_open = True

    def kill(self, now: float) -> None:
        if self.killed is None:
            self.killed = now

    def starved(self) -> bool:
        return self.waits_for_processor

    def close(self) -> None:
        self._world.living.discard(self)

    def run(self, now: float) -> None:
        """What it does in one step."""
        if self.at is not None and not self._world.hangs(self.at[0]):
            self.at = None
        if self.killed is not None:
            if self.at is None or self.at[0] not in self._world.stuck:
                self.ended = -9
                self._on_exit(self)
            return
        if self.at is not None:
            return
        if self._to_open and self._touch(("", *self._mine()), now):
            self._to_open, self.opened = False, True
            gpus = [{"uuid": gpu, "index": GPUS.index(gpu), "name": "", "missing": []} for gpu in self._mine()]
            self._on_message(self, {"t": "opened", "driver": "1", "gpus": gpus, "unreadable": {}, "deaf": {}})
        if self.opened and self.role == "poll" and self._touch(self._mine(), now):
            self._on_message(self, {"t": "poll", "gpus": {gpu: {} for gpu in self._mine()}, "slow": {}})

    def _mine(self) -> tuple[str, ...]:
        return (self.only,) if self.only else tuple(gpu for gpu in GPUS if gpu not in self.skip)

    def _touch(self, gpus: Iterable[str], now: float) -> bool:
        """Whether all calls returned."""
        for gpu in gpus:
            self._world.touched.append((self, gpu))
            if self._world.hangs(gpu):
                self.at = (gpu, now)
                return False
        return True


class World:
    """A driver with three GPUs, and what the prober says of them."""

    def __init__(self) -> None:
        self.now = 100.0
        self.hung: set[str] = set()
        """A call on these does not return; an empty name is the driver as a whole."""
        self.stuck: set[str] = set()
        """And who makes one survives SIGKILL."""
        self.living: set[FakeChild] = set()
        self.started: list[FakeChild] = []
        self.touched: list[tuple[FakeChild, str]] = []
        """Who made a call on which GPU in this step."""
        self.conditions: dict[tuple[str, str], bool] = {}
        self.read: dict[str, float] = {}
        self.details: list[Mapping[str, Any]] = []
        self._pid = 0
        self.prober = Prober({}, self)

    def start(
        self,
        role: str,
        arguments: Iterable[str],
        _environment: Mapping[str, str],
        now: float,
        on_message: Callable[[Any, dict[str, Any]], None],
        on_exit: Callable[[Any], None],
    ) -> FakeChild:
        """Stands in for `watchdog.probe.Child`."""
        child = FakeChild(self, role, arguments, now, on_message, on_exit)
        self.living.add(child)
        self.started.append(child)
        return child

    def next_pid(self) -> int:
        self._pid += 1
        return self._pid

    def hangs(self, gpu: str) -> bool:
        return gpu in self.hung or gpu in self.stuck

    def heal(self) -> None:
        self.hung.clear()
        self.stuck.clear()

    def step(self) -> None:
        self.now += STEP_S
        self.touched.clear()
        for child in sorted(self.living, key=lambda child: child.pid):
            child.run(self.now)
        self.prober.tick(self.now)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / STEP_S)):
            self.step()

    def caught(self, gpu: str) -> list[FakeChild]:
        """Who was killed in a call on this GPU and has not ended."""
        return [child for child in self.living if child.killed is not None and child.at and child.at[0] == gpu]

    def listed(self, *_: object) -> None:
        pass

    def readings(self, readings: Mapping[str, Mapping[str, Any]], now: float) -> None:
        self.read.update(dict.fromkeys(readings, now))

    def event(self, *_: object) -> None:
        pass

    def condition(self, gpu: str, signal: str, holds: bool, now: float, detail: Mapping[str, Any]) -> None:
        self.conditions[gpu, signal] = holds
        self.details.append(detail)

    def late(self, *_: object) -> None:
        pass


def _set(text: str) -> set[str]:
    return {gpu for gpu in text.split(",") if gpu}
