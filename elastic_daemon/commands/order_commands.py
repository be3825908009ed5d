"""The commands that give orders to a running daemon: `scale`, `drain`, `exclude`, `release` and `automation`.

Orders are given without waiting and then followed: a connection that breaks meanwhile costs nothing, and there is
something to see. Progress goes to standard error, the outcome to standard output.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from rich.status import Status
from rich.text import Text

from elastic_daemon.commands.operator_commands import Target, make_console
from elastic_daemon.config import admin_header
from elastic_daemon.errors import DaemonUnreachable, OrderUnanswered

POLL_S = 0.2

GRACE_S = 60.0
"""How much longer than the order's deadline to follow it: undoing takes time too."""

SILENCE_S = 30.0
"""A daemon that has not answered for so long while an operation is followed is gone."""

FAILED = 1
BAD_ARGUMENTS = 2


@dataclass(frozen=True)
class Answer:
    status: int
    body: dict[str, Any]

    @property
    def error(self) -> str:
        told = self.body.get("error")
        return str(told.get("message", told)) if isinstance(told, dict) else str(told or f"HTTP status {self.status}")


class Orders:
    """A daemon that takes orders at `target`."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def post(self, path: str, body: Mapping[str, Any]) -> Answer:
        """Raises DaemonUnreachable."""
        return self._ask("POST", path, body)

    def get(self, path: str) -> Answer:
        """Raises DaemonUnreachable."""
        return self._ask("GET", path, None)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None) -> Answer:
        target = self._target
        try:
            with target.client(headers=admin_header()) as client:
                answer = client.request(method, target.base_url + path, json=body)
                told = answer.json()
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise target.unreachable(error) from error
        except ValueError as error:
            raise target.unreachable(f"the answer to {path} is not JSON") from error
        if not isinstance(told, dict):
            raise target.unreachable(f"the answer to {path} is none of this daemon's")
        return Answer(answer.status_code, told)


def scale(arguments: argparse.Namespace) -> int:
    body = {"new_data_parallel_size": arguments.ranks}
    if arguments.retire is not None:
        body["retire_ranks"] = arguments.retire
    return _order(arguments, "/scale_elastic_ep", body)


def drain(arguments: argparse.Namespace) -> int:
    return _order(arguments, f"/ranks/{arguments.rank}/drain", {})


def exclude(arguments: argparse.Namespace) -> int:
    return _order(arguments, f"/ranks/{arguments.rank}/exclude", {})


def release(arguments: argparse.Namespace) -> int:
    if isinstance(arguments.what, int):
        return _order(arguments, f"/ranks/{arguments.what}/release", {})
    answer = Orders(Target.of(arguments)).post(f"/gpus/{arguments.what}/release", {})
    return _show(answer, arguments.json, lambda body: body["message"])


def automation(arguments: argparse.Namespace) -> int:
    orders = Orders(Target.of(arguments))
    if arguments.switch is None:
        answer = orders.get("/automation")
    else:
        answer = orders.post("/automation", {"enabled": arguments.switch == "on"})
    return _show(answer, arguments.json, lambda body: f"automation is {'on' if body['enabled'] else 'off'}")


ORDER_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "scale": scale,
    "drain": drain,
    "exclude": exclude,
    "release": release,
    "automation": automation,
}


def _order(arguments: argparse.Namespace, path: str, body: Mapping[str, Any]) -> int:
    orders = Orders(Target.of(arguments))
    answer = orders.post(path, {**body, "drain_timeout": arguments.timeout, "wait": False})
    if answer.status != 200:
        return _refused(answer, arguments.json)
    id_ = answer.body["operation_id"]
    try:
        report = _report(orders, id_) if arguments.no_wait else follow(orders, id_, arguments.timeout + GRACE_S)
    except KeyboardInterrupt:
        print(f"elastic-daemon: operation {id_} goes on without you", file=sys.stderr)
        raise
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print(describe(report))
    return 0 if report["state"] in ("done", "running") and (arguments.no_wait or report["ended"]) else FAILED


def follow(orders: Orders, id_: str, timeout_s: float) -> dict[str, Any]:
    """Show how an operation gets on until it ends. The last report, be it of a running one, after `timeout_s`.

    Raises:
        DaemonUnreachable: the daemon has not answered for `SILENCE_S`.
        OrderUnanswered: it does not know the operation any more.
    """
    deadline = time.monotonic() + timeout_s
    answered = time.monotonic()
    report: dict[str, Any] | None = None
    with _progress() as show:
        while True:
            try:
                report = _report(orders, id_)
                answered = time.monotonic()
            except DaemonUnreachable:
                if time.monotonic() - answered > SILENCE_S:
                    raise
            if report is not None:
                if report["ended"] or time.monotonic() > deadline:
                    return report
                show(_line(report))
            time.sleep(POLL_S)


def _report(orders: Orders, id_: str) -> dict[str, Any]:
    """Raises DaemonUnreachable where to ask again may help, else OrderUnanswered."""
    answer = orders.get(f"/operations/{id_}")
    if answer.status >= 500:
        raise DaemonUnreachable(f"operation {id_}: {answer.error}")
    if answer.status != 200:
        raise OrderUnanswered(f"operation {id_}: {answer.error}; has the daemon been restarted?")
    return answer.body


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Shows lines as they change: in place on a terminal, one below the other elsewhere."""
    console = make_console(stderr=True)
    shown = ""
    if console.is_terminal:
        with Status("", console=console) as status:
            yield lambda line: status.update(Text(line))
        return

    def show(line: str) -> None:
        nonlocal shown
        if line != shown:
            console.print(Text(line))
        shown = line

    yield show


def _line(report: Mapping[str, Any]) -> str:
    progress = report["progress"]
    ranks = f", ranks {', '.join(map(str, report['ranks']))}" if report["ranks"] else ""
    return f"{_what(report)}: {report['phase']}{ranks} ({progress['active']} serve)"


def describe(report: Mapping[str, Any]) -> str:
    """How it ended, or where it is: one line."""
    if not report["ended"]:
        return f"{_what(report)}: under way, at: {report['phase']} (operation {report['id']})"
    return f"{_what(report)}: {report['state']} after {report['seconds']:.1f} s: {report['message']}"


def _what(report: Mapping[str, Any]) -> str:
    if report["kind"] == "scale":
        return f"scale {report['progress']['from']} -> {report['progress']['to']}"
    return f"{report['kind']} rank {', '.join(map(str, report['ranks']))}"


def _show(answer: Answer, as_json: bool, describe_body: Callable[[Mapping[str, Any]], str]) -> int:
    if answer.status != 200:
        return _refused(answer, as_json)
    print(json.dumps(answer.body, indent=2) if as_json else describe_body(answer.body))
    return 0


def _refused(answer: Answer, as_json: bool) -> int:
    if as_json:
        print(json.dumps(answer.body, indent=2))
    print(f"elastic-daemon: {answer.error}{_hint(answer.status)}", file=sys.stderr)
    return BAD_ARGUMENTS if answer.status == 400 else FAILED


def _hint(status: int) -> str:
    if status == 401:
        return "; set $ELASTIC_ADMIN_KEY, or run this on the daemon's machine without --url"
    return ""
