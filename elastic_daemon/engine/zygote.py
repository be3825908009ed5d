"""The process that has imported vLLM and forks ranks and front end from itself.

Importing vLLM takes seconds of CPU, a fork of a process that has done so takes milliseconds, and what the children
never change they share. The supervisor stays free of vLLM and talks to the zygote over an inherited socket, one JSON
line per request and answer:

    {"type": "configure", "arguments": [...], "ranks": 4, "survive_losses": 2, "device": "cpu",
     "ranks_per_gpu": 1, "max_ranks": 6}
    {"type": "fork", "kind": "rank" | "frontend", ...}     -> {"pid": 123}
    {"type": "reap", "pid": 123}                           -> {"status": "killed by SIGKILL"}

A child dies with the zygote and the zygote with the supervisor (parent-death signal): nothing is ever left behind. An
exited child stays a zombie until it is reaped on request, so that its pid cannot be reused while anybody watches it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from elastic_daemon.engine.compat import check_version
from elastic_daemon.engine.devices import VISIBLE, choose_device
from elastic_daemon.errors import ConfigError, ElasticError, StartError, engine_missing
from elastic_daemon.telemetry.logs import configure_logging

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """SIGKILL this process when `parent` ends. Exits at once when it has ended already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def set_title(title: str) -> None:
    """Name this process for `ps`. setproctitle comes with vLLM, which may be missing."""
    with contextlib.suppress(ImportError):
        import setproctitle

        setproctitle.setproctitle(f"elastic-daemon: {title}")


def exit_status(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exited with {os.WEXITSTATUS(status)}"


class Zygote:
    """Answers the supervisor's requests one at a time, in a process with a single thread.

    `broken`: why the engine cannot be used, which is then the answer to all of them.
    """

    def __init__(self, connection: socket.socket, broken: ElasticError | None = None) -> None:
        self._connection = connection
        self._broken = broken
        self._deployment: Any = None

    def run(self) -> None:
        from elastic_daemon.processes.messages import decode, encode

        with self._connection.makefile("rb") as requests:
            for line in requests:
                request = decode(line)
                try:
                    if self._broken is not None:
                        raise self._broken
                    answer = getattr(self, f"_{request['type']}")(request)
                except ElasticError as error:
                    answer = {"error": str(error), "exit_code": error.exit_code}
                self._connection.sendall(encode({"type": "answer", **answer}))

    def _configure(self, request: dict[str, Any]) -> dict[str, Any]:
        from elastic_daemon.engine.configure import configure

        self._deployment = deployment = configure(
            request["arguments"],
            request["ranks"],
            request["survive_losses"],
            request["device"],
            request["ranks_per_gpu"],
            request["max_ranks"],
        )
        refuse_forks_with_cuda()
        # Children share the heap as it is now; collecting it there would only copy its pages.
        gc.collect()
        gc.freeze()
        return {"model": deployment.model, "experts": deployment.experts, "slots": deployment.slots}

    def _fork(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._deployment is None:
            raise ConfigError("fork before configure")
        body = {"rank": self._rank, "frontend": self._frontend}[request["kind"]]
        parent = os.getpid()
        if (pid := os.fork()) == 0:
            self._become(parent, request, body)
        return {"pid": pid}

    def _become(self, parent: int, request: dict[str, Any], body: Callable[[dict[str, Any]], None]) -> NoReturn:
        code = 1
        try:
            die_with_parent(parent)
            self._connection.close()
            set_title(request["title"])
            body(request)
            code = 0
        except ElasticError as error:
            print(f"elastic-daemon {request['title']}: {error}", file=sys.stderr, flush=True)
            code = error.exit_code
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _rank(self, request: dict[str, Any]) -> None:
        from elastic_daemon.engine.configure import for_rank
        from elastic_daemon.engine.plan import RankPlan
        from elastic_daemon.engine.rank_process import run_rank

        rank, members = request["rank"], tuple(request["members"])
        gpu = use_gpu(request["gpu"], self._deployment.gpu(rank)) if self._deployment.ranks_per_gpu else 0
        plan = RankPlan(rank, members, request["slots"], request["scratch_dir"], gpu)
        run_rank(for_rank(self._deployment.config, plan), request)

    def _frontend(self, request: dict[str, Any]) -> None:
        from elastic_daemon.frontend import run_frontend

        run_frontend(self._deployment, request)

    def _reap(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            _, status = os.waitpid(request["pid"], 0)
        except ChildProcessError:
            return {"status": "already reaped"}
        return {"status": exit_status(status)}


def use_gpu(uuid: str | None, index: int) -> int:
    """Have this process see its GPU. Returns the index of its device."""
    device, environment = choose_device(uuid, index, os.environ.get(VISIBLE))
    os.environ.update(environment)
    return device


def refuse_forks_with_cuda() -> None:
    """Raises StartError when this process has touched a GPU: its forks could not."""
    import torch

    if torch.cuda.is_initialized() or torch.cuda._is_in_bad_fork():
        raise StartError("parsing the flags initialized CUDA in the process that forks the ranks: this is a defect")


def import_engine() -> None:
    """Import what ranks and front end need, so that their forks find it in memory.

    Raises:
        ConfigError: vLLM is missing, cannot be imported, or is of another version.
    """
    check_version()  # first: with another vLLM the imports below fail in ways that say little
    try:
        import elastic_daemon.engine.configure
        import elastic_daemon.engine.core
        import elastic_daemon.frontend  # noqa: F401
    except ImportError as error:
        raise engine_missing(error) from error


def main() -> None:
    """Entry point: `python -m elastic_daemon.engine.zygote FD SUPERVISOR_PID`."""
    descriptor, supervisor = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(supervisor)
    set_title("zygote")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging()
    broken: ElasticError | None = None
    try:
        import_engine()
    except ElasticError as error:
        broken = error
    Zygote(socket.socket(fileno=descriptor), broken).run()


if __name__ == "__main__":
    main()
