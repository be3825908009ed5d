"""The commands that give orders, against a real server over the real controller."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from elastic_daemon.commands import order_commands
from elastic_daemon.commands.operator_commands import Target
from elastic_daemon.commands.order_commands import Orders, describe, follow
from elastic_daemon.errors import OrderUnanswered
from elastic_daemon.gates.access import AccessRules
from tests.unit.command_line import Server, run, serving
from tests.unit.operator_plane import GPU, OperatorPlane

pytestmark = pytest.mark.usefixtures("clean_environment")

CLOSED = AccessRules(("api-key",), loopback=False, admin_key="admin-key")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_commands, "POLL_S", 0.01)


@pytest.fixture
def plane() -> OperatorPlane:
    return OperatorPlane()


@pytest.fixture
def server(plane: OperatorPlane, socket_dir: Path) -> Iterator[Server]:
    with serving(plane, socket_dir) as server:
        yield server


def order(directory: Path, *command: str) -> int:
    return run(*command, "--runtime-dir", str(directory))


def later(condition: Callable[[], object], then: Callable[[], None]) -> threading.Thread:
    """Does `then` in another thread once `condition` holds."""

    def wait() -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, "what is waited for does not come"
            time.sleep(0.005)
        then()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.usefixtures("server")
def test_scale(plane: OperatorPlane, socket_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert order(socket_dir, "scale", "3") == 0
    assert plane.active == [0, 1, 2]
    assert capsys.readouterr().out == "scale 4 -> 3: done after 0.0 s: serving with 3 ranks\n"
    assert order(socket_dir, "scale", "5", "--timeout", "30") == 0
    assert order(socket_dir, "scale", "3", "--retire", "0, 2") == 0
    assert plane.active == [1, 3, 4]


@pytest.mark.usefixtures("server")
def test_drain_exclude_and_release(plane: OperatorPlane, socket_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert order(socket_dir, "drain", "1") == 0
    assert capsys.readouterr().out == "drain rank 1: done after 0.0 s: rank 1 has left until it is released\n"
    assert order(socket_dir, "exclude", "2") == 0
    assert plane.active == [0, 3]
    assert order(socket_dir, "release", "1") == 0
    assert order(socket_dir, "release", "2") == 0
    assert plane.active == [0, 1, 2, 3]


@pytest.mark.usefixtures("server")
def test_release_of_a_gpu(plane: OperatorPlane, socket_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert order(socket_dir, "release", GPU) == 0
    assert plane.released == [GPU]
    assert GPU in capsys.readouterr().out
    assert order(socket_dir, "release", "GPU-other") == 1
    assert capsys.readouterr().err == "elastic-daemon: no GPU GPU-other is known\n"


@pytest.mark.usefixtures("server")
def test_automation(plane: OperatorPlane, socket_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for switch in ("off", "on"):
        assert order(socket_dir, "automation", switch) == 0
        assert plane.automation is (switch == "on")
        assert order(socket_dir, "automation") == 0
        assert capsys.readouterr().out == f"automation is {switch}\n" * 2
    assert order(socket_dir, "automation", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"enabled": True}


@pytest.mark.usefixtures("server")
def test_as_json(socket_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert order(socket_dir, "scale", "3", "--json") == 0
    out, err = capsys.readouterr()
    body = json.loads(out)
    assert (body["state"], body["progress"], body["ranks"]) == ("done", {"from": 4, "to": 3, "active": 3}, [3])
    assert err == "", "nothing was to be shown: it was done at once"


def test_progress_is_told_line_by_line(
    plane: OperatorPlane, server: Server, socket_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plane.play = False
    shown = ""

    def seen() -> bool:
        nonlocal shown
        shown += capsys.readouterr().err
        return "moving requests" in shown

    thread = later(seen, lambda: server.call(plane.resume))
    assert order(socket_dir, "scale", "3") == 0
    thread.join()
    assert shown.count("scale 4 -> 3: moving requests, ranks 3 (4 serve)") == 1


def test_progress_on_a_terminal(
    plane: OperatorPlane, server: Server, socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(force_terminal=True, width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    monkeypatch.setattr(order_commands, "make_console", lambda **_: console)
    plane.play = False
    shown, line = threading.Event(), order_commands._line

    def told(report: Any) -> Any:
        shown.set()
        return line(report)

    monkeypatch.setattr(order_commands, "_line", told)
    thread = later(shown.is_set, lambda: server.call(plane.resume))
    assert order(socket_dir, "scale", "3") == 0
    thread.join()
    assert "moving requests, ranks 3" in console.export_text()


def test_without_waiting(
    plane: OperatorPlane, server: Server, socket_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plane.play = False
    assert order(socket_dir, "scale", "3", "--no-wait") == 0
    (report,) = plane.operations.all()
    told = capsys.readouterr().out
    assert told == f"scale 4 -> 3: under way, at: moving requests (operation {report.operation})\n"
    assert order(socket_dir, "scale", "2") == 1
    assert report.operation in capsys.readouterr().err
    server.call(plane.resume)


def test_an_end_without_success(
    plane: OperatorPlane, server: Server, socket_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plane.play = False
    thread = later(lambda: plane.operations.busy, lambda: server.call(plane.pass_time, 5.0))
    assert order(socket_dir, "scale", "3", "--timeout", "5") == 1
    thread.join()
    assert "timed out" in capsys.readouterr().out


def test_one_that_never_ends_is_not_followed_for_ever(
    plane: OperatorPlane,
    server: Server,
    socket_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(order_commands, "GRACE_S", 0.1)
    plane.play = False
    assert order(socket_dir, "scale", "3", "--timeout", "0.1") == 1
    assert "under way" in capsys.readouterr().out


def test_a_daemon_that_goes_away_and_comes_back(plane: OperatorPlane, socket_dir: Path) -> None:
    plane.play = False
    first = Server(plane, socket_dir)
    orders = Orders(Target(socket_dir))
    id_ = orders.post("/scale_elastic_ep", {"new_data_parallel_size": 3, "wait": False}).body["operation_id"]
    first.stop()
    servers: list[Server] = []
    thread = threading.Timer(0.2, lambda: (plane.resume(), servers.append(Server(plane, socket_dir))))
    thread.start()
    try:
        assert follow(orders, id_, 10.0)["state"] == "done"
    finally:
        thread.join()
        servers[0].stop()


def test_a_daemon_that_was_restarted_knows_nothing_of_it(plane: OperatorPlane, socket_dir: Path) -> None:
    with serving(plane, socket_dir), pytest.raises(OrderUnanswered, match="has the daemon been restarted"):
        follow(Orders(Target(socket_dir)), "op-0", 10.0)


def test_a_daemon_that_stays_away(socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_commands, "SILENCE_S", 0.05)
    with pytest.raises(Exception, match="no daemon answers"):
        follow(Orders(Target(socket_dir)), "op-0", 10.0)


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["scale", "9"], "at most 6"),
        (["scale", "1"], "at least 2"),
        (["scale", "3", "--retire", "7"], "retire_ranks"),
        (["drain", "8"], "rank 8 does not serve"),
        (["exclude", "8"], "rank 8 is not there"),
        (["release", "8"], "rank 8 is not one of the 4"),
    ],
)
def test_what_the_daemon_refuses(
    socket_dir: Path, command: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert order(socket_dir, *command) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert told in err
    assert order(socket_dir, *command, "--json") == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == 400


@pytest.mark.parametrize(
    "command",
    [
        ["scale"],
        ["scale", "0"],
        ["scale", "-1"],
        ["scale", "three"],
        ["scale", "3", "--retire", "1,"],
        ["scale", "3", "--timeout", "0"],
        ["scale", "3", "--timeout", "nan"],
        ["scale", "3", "--timeout", "soon"],
        ["drain"],
        ["drain", "x"],
        ["exclude", "-1"],
        ["release", "rank-2"],
        ["release", "GPU-1/../x"],
        ["automation", "maybe"],
    ],
    ids=" ".join,
)
def test_bad_arguments(command: list[str], tmp_path: Path) -> None:
    assert order(tmp_path, *command) == 2


@pytest.mark.parametrize("command", [["scale", "3"], ["drain", "1"], ["release", GPU], ["automation"]], ids=" ".join)
def test_no_daemon(command: list[str], socket_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert order(socket_dir, *command) == 3
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "no daemon answers at" in err


def test_the_admin_key_is_sent(
    plane: OperatorPlane, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(plane, CLOSED) as server:

        def attempt(*command: str) -> tuple[int, str]:
            return run(*command, "--url", server.url), capsys.readouterr().err

        code, told = attempt("scale", "3")
        assert code == 1
        assert "admin key is required; set $ELASTIC_ADMIN_KEY" in told
        monkeypatch.setenv("ELASTIC_API_KEY", "api-key")
        code, told = attempt("scale", "3")
        assert code == 1
        assert "API key does not open" in told
        assert attempt("automation")[0] == 0
        assert plane.active == [0, 1, 2, 3]
        monkeypatch.setenv("ELASTIC_ADMIN_KEY", "admin-key")
        assert attempt("scale", "3")[0] == 0
        assert plane.active == [0, 1, 2]


def test_loopback_without_keys_needs_none(plane: OperatorPlane) -> None:
    with serving(plane, AccessRules((), loopback=True)) as server:
        assert run("scale", "3", "--url", server.url) == 0
    assert plane.active == [0, 1, 2]


def test_describe_says_how_it_ended() -> None:
    report: dict[str, Any] = {"kind": "scale", "id": "op-1", "progress": {"from": 4, "to": 6}, "ranks": [4, 5]}
    ended = {**report, "state": "rolled back", "ended": "2026-01-31T12:00:00Z", "seconds": 12.34, "message": "no GPU"}
    assert describe(ended) == "scale 4 -> 6: rolled back after 12.3 s: no GPU"
