"""The commands that talk to a running daemon: `status`, `events` and `drill`; and two that need none.

They ask the daemon over the Unix socket in its runtime directory, or over HTTP with `--url`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import httpx
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from elastic_daemon.commands.client_tls import client_tls
from elastic_daemon.config import key_header
from elastic_daemon.errors import AnswerRefused, DaemonUnreachable
from elastic_daemon.processes.runtime_dir import http_socket

SERVING = ("ok", "degraded", "recovering")
"""Statuses in which clients are served, if need be after a short wait."""

TIMEOUT_S = 10.0

RECONNECT_S = 60.0
"""`events --follow` gives up on a daemon that has not answered for this long."""

RECONNECT_PAUSE_S = 0.2

STYLES = {"ok": "bold green", "degraded": "bold yellow", "recovering": "bold yellow", "active": "green"}
BAD_STYLE = "bold red"

PIPE_WIDTH = 250
"""Columns of the output where it goes to no terminal."""


UNPROVEN = "CERTIFICATE_VERIFY_FAILED"
"""In the errors of OpenSSL: there is a server, and it is not known to be the one that was asked for."""

T = TypeVar("T")


def _hung_up(error: object) -> bool:
    """Whether there is a server, and it ended the connection. Not all say why (by an alert of TLS)."""
    kinds = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)
    return isinstance(error, kinds) or "ALERT" in str(error)


@dataclass(frozen=True)
class Target:
    """Where to ask: at `url`, or without one on the socket of the daemon that uses `runtime_dir`.

    `tls`: what certificates are checked with, and what this side proves itself with; None: the usual authorities, and
    nothing.
    """

    runtime_dir: Path
    url: str | None = None
    tls: ssl.SSLContext | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Target:
        """Raises ConfigError where a file that is named for TLS cannot be used."""
        tls = client_tls(os.environ, arguments.cacert, arguments.cert, arguments.cert_key)
        return cls(arguments.runtime_dir, arguments.url, tls)

    @property
    def where(self) -> str:
        return self.url or http_socket(self.runtime_dir)

    @property
    def base_url(self) -> str:
        return (self.url or "http://daemon").rstrip("/")

    def client(
        self, timeout: httpx.Timeout | float = TIMEOUT_S, headers: Mapping[str, str] | None = None
    ) -> httpx.Client:
        transport = None if self.url else httpx.HTTPTransport(uds=http_socket(self.runtime_dir))
        sent = key_header() if headers is None else headers
        return httpx.Client(
            transport=transport, verify=self.tls or True, timeout=timeout, trust_env=False, headers=sent
        )

    def async_client(self) -> httpx.AsyncClient:
        transport = None if self.url else httpx.AsyncHTTPTransport(uds=http_socket(self.runtime_dir))
        return httpx.AsyncClient(
            transport=transport, verify=self.tls or True, timeout=TIMEOUT_S, trust_env=False, headers=key_header()
        )

    def unreachable(self, error: object) -> DaemonUnreachable:
        why = str(error).rstrip(".") or type(error).__name__
        hint = "start one with `elastic-daemon serve`"
        if UNPROVEN in why:
            hint = "name the authority of its certificate with --cacert, and in --url a name that is in it"
        elif self.base_url.startswith("https:") and _hung_up(error):
            hint = "it may ask for a certificate of its clients (--ssl-cert-reqs): give one with --cert and --cert-key"
        return DaemonUnreachable(f"no daemon answers at {self.where}: {why}, {hint}")

    def get(self, path: str, **params: Any) -> Any:
        """The JSON body of a control route. Raises DaemonUnreachable, and AnswerRefused where a key is wanted."""
        try:
            with self.client() as client:
                answer = client.get(self.base_url + path, params=params)
                body = answer.json()
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise self.unreachable(error) from error
        except ValueError as error:
            raise self.unreachable(f"the answer to {path} is not JSON") from error
        if answer.status_code in (401, 403):
            raise self.refused(path, answer)
        return body

    def refused(self, path: str, answer: httpx.Response) -> AnswerRefused:
        """What to tell of an answer, which has been read, that has an error instead of what was asked for."""
        try:
            error = answer.json()["error"]
            why = error["message"] if isinstance(error, dict) else error
        except (ValueError, LookupError, TypeError):
            why = f"HTTP status {answer.status_code}"
        hint = "; give a key of the daemon in ELASTIC_API_KEY" if answer.status_code == 401 else ""
        return AnswerRefused(f"{path}: {str(why).rstrip('.')}{hint}")

    def health(self) -> dict[str, Any]:
        """The body of `/health`. Raises DaemonUnreachable."""
        return self.as_health(self.get("/health"))

    def events(self, since: int = 0) -> list[dict[str, Any]]:
        """Events after id `since`, oldest first. Raises DaemonUnreachable."""
        body = self.get("/events", since=since)
        if not isinstance(body, list):
            raise self.unreachable("the answer to /events is none of this daemon's")
        return body

    def as_health(self, body: Any) -> dict[str, Any]:
        """`body`, if it is one of `/health`. Raises DaemonUnreachable."""
        if not isinstance(body, dict) or "status" not in body:
            error = body.get("error") if isinstance(body, dict) else None
            raise self.unreachable(error or "the answer to /health is none of this daemon's")
        return body


def status(arguments: argparse.Namespace) -> int:
    """Show what `/health` says. Returns 0 while clients are served, else 1."""
    if arguments.watch is not None:
        watch_status(Target.of(arguments), arguments.watch, as_json=arguments.json)
    body = Target.of(arguments).health()
    if arguments.json:
        print(json.dumps(body, indent=2))
    else:
        make_console().print(status_view(body, datetime.now(UTC)))
    return 0 if body["status"] in SERVING else 1


def watch_status(target: Target, every_s: float, *, as_json: bool) -> NoReturn:
    """Show it again and again: in place on a terminal, one below the other elsewhere; with `as_json` a line each.

    A daemon that answers no more is waited for, as long as it takes.

    Raises:
        DaemonUnreachable: it does not answer at the start.
    """
    console = make_console()
    body = target.health()
    with contextlib.ExitStack() as stack:
        live = stack.enter_context(Live(console=console, auto_refresh=False)) if console.is_terminal else None
        while True:
            now = datetime.now(UTC)
            if as_json:
                print(json.dumps(body, separators=(",", ":")), flush=True)
            elif live is not None:
                live.update(Group(Text(f"{now:%H:%M:%S} UTC"), status_view(body, now)), refresh=True)
            else:
                console.print(Group(Text(f"{now:%Y-%m-%dT%H:%M:%SZ}"), status_view(body, now)))
                sys.stdout.flush()
            time.sleep(every_s)
            try:
                body = target.health()
            except DaemonUnreachable as error:
                body = {"status": "unreachable", "reason": str(error)}


def make_console(*, stderr: bool = False) -> Console:
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def status_view(body: Mapping[str, Any], now: datetime) -> Group:
    """What `status` prints. `body` may lack everything but the status while the daemon starts."""
    parts: list[Text | Table] = [_header(body), _facts(body)]
    if ranks := body.get("ranks"):
        parts.append(_rank_table(ranks, now))
    if report := body.get("last_recovery"):
        parts.append(Text(f"last recovery: {describe_recovery(report)}"))
    return Group(*parts)


def _header(body: Mapping[str, Any]) -> Text:
    line = Text(body["status"], style=STYLES.get(body["status"], BAD_STYLE))
    return line.append(f": {body['reason']}", style="default not bold") if body.get("reason") else line


def _facts(body: Mapping[str, Any]) -> Text:
    facts = [f"model {body.get('model', '-')}", f"epoch {body.get('epoch', 0)}"]
    if size := body.get("data_parallel_size"):
        facts.append(f"ranks {size['active']}/{size['target']} active")
        facts.append(f"expert safety {_or_dash(body['expert_safety'])}")
        facts.append(f"survivable losses {_or_dash(body['survivable_losses'])}")
        facts.append(f"in flight {body['in_flight']}")
    return Text(" · ".join(facts))


def _rank_table(ranks: list[dict[str, Any]], now: datetime) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("rank", "state", "gpu", "pids", "since", "in flight", "reason"):
        table.add_column(column, justify="right" if column in ("rank", "since", "in flight") else "left")
    for row in ranks:
        table.add_row(
            str(row["rank"]),
            Text(row["state"], style=STYLES.get(row["state"], "yellow")),
            Text(_or_dash(row["gpu"])),
            ", ".join(map(str, row["pids"])) or "-",
            age((now - datetime.fromisoformat(row["since"])).total_seconds()),
            str(row["in_flight"]),
            Text(_or_dash(row["reason"])),
        )
    return table


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def age(seconds: float) -> str:
    """A duration in its two largest units: `7 s`, `3 m 12 s`, `2 h 5 m`, `4 d 1 h`."""
    left = max(0, int(seconds))
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or parts or unit == "s":
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def describe_recovery(report: Mapping[str, Any]) -> str:
    """One recovery of `/health` in one line."""
    how = "with" if report["kind"] == "grow" else "lost"
    ranks = f", {how} rank {', '.join(map(str, report['ranks']))}" if report["ranks"] else ""
    phases = ", ".join(f"{phase} {seconds * 1000:.1f}" for phase, seconds in report["seconds"].items())
    line = f"{report['kind']} to epoch {report['epoch']}{ranks} ({report['cause']}): {phases} ms"
    if counts := report.get("requests"):
        line += "; requests: " + ", ".join(f"{number} {how}" for how, number in counts.items())
    return line


def events(arguments: argparse.Namespace) -> int:
    """Print what happened, one line per event; with `--follow` for as long as the daemon lives."""
    target = Target.of(arguments)
    happened = follow(target) if arguments.follow else iter(target.events())
    for event in happened:
        print(format_event(event), flush=arguments.follow)
    return 0


def format_event(event: Mapping[str, Any]) -> str:
    """`time event field=value ...`; values that are no plain words are written as JSON."""
    at = datetime.fromtimestamp(event["time"], UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    fields = (f"{name}={_value(value)}" for name, value in event.items() if name not in ("id", "time", "event"))
    return " ".join((at, event["event"], *fields))


def _value(value: object) -> str:
    if isinstance(value, str) and value and not any(c.isspace() or c in "\"'=" for c in value):
        return value
    return json.dumps(value, ensure_ascii=False)


def follow(target: Target) -> Iterator[dict[str, Any]]:
    """All events from the first that the daemon still has. Reconnects when the stream breaks, and repeats none.

    Raises:
        AnswerRefused: it wants a key, or takes no more readers.
        DaemonUnreachable: it does not answer at the start, or for `RECONNECT_S` later on.
    """
    last: dict[str, Any] | None = None
    target.health()
    while True:
        for event in _stream(target, last["id"] if last else 0):
            last = event
            yield event
        time.sleep(RECONNECT_PAUSE_S)
        if last is None:
            _until_answered(target.health)
        elif _until_answered(partial(_is_restarted, target, last)):
            last = None


def _until_answered(ask: Callable[[], T]) -> T:
    def say(state: RetryCallState) -> None:
        if state.attempt_number == 1:
            print("elastic-daemon: the daemon does not answer any more, waiting for it", file=sys.stderr)

    return Retrying(
        retry=retry_if_exception_type(DaemonUnreachable),
        wait=wait_exponential(multiplier=0.1, max=5),
        stop=stop_after_delay(RECONNECT_S),
        before_sleep=say,
        reraise=True,
    )(ask)


def _is_restarted(target: Target, last: Mapping[str, Any]) -> bool:
    """Whether another daemon answers by now, which numbers its events anew."""
    same = [event for event in target.events(last["id"] - 1) if event["id"] == last["id"]]
    return not same or bool(same[0]["time"] != last["time"])


def _stream(target: Target, since: int) -> Iterator[dict[str, Any]]:
    """Events after `since` until the connection ends, for whatever reason.

    Raises AnswerRefused; on the way (`since` > 0) only where asking again would not help.
    """
    headers = {"Accept": "text/event-stream", "Last-Event-ID": str(since)}
    try:
        with (
            target.client(httpx.Timeout(TIMEOUT_S, read=None)) as client,
            client.stream("GET", f"{target.base_url}/events", headers=headers) as answer,
        ):
            if answer.is_client_error or (answer.is_error and since == 0):
                answer.read()
                raise target.refused("/events", answer)
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line.removeprefix("data:"))
    except httpx.TransportError:
        return


def drill(arguments: argparse.Namespace) -> int:
    """Break a rank under load and say what clients saw of it. Returns 0 if nothing was lost or changed, else 1."""
    from elastic_daemon.drill.drill import drill as run

    return run(arguments)


def plan(arguments: argparse.Namespace) -> int:
    """Say which redundancy buys what. Asks no daemon. Returns 0 if something can be recommended, else 1."""
    from elastic_daemon.commands.plan_command import plan as run

    return run(arguments)


def completion(arguments: argparse.Namespace) -> int:
    """Print what completes commands and flags in a shell."""
    from elastic_daemon.cli import make_parser
    from watchdog.completion import completion as script

    sys.stdout.write(script(make_parser(), arguments.shell))
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "status": status,
    "events": events,
    "drill": drill,
    "plan": plan,
    "completion": completion,
}
