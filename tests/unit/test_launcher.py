"""Starting children: their environment, and how their end is noticed. The zygote itself is covered end to end."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys

import pytest

from elastic_daemon.errors import ConfigError, ControlClosed, StartError
from elastic_daemon.processes.launcher import CHILD_ENVIRONMENT, LOOPBACK_ONLY, Child, Zygote, child_environment
from elastic_daemon.processes.messages import MAX_LINE_BYTES, Message, decode, encode
from tests import proc


def test_defaults_reach_children(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CHILD_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert child_environment().items() >= CHILD_ENVIRONMENT.items()


def test_the_environment_wins_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("SOMETHING_ELSE", "kept")
    environment = child_environment()
    assert (environment["OMP_NUM_THREADS"], environment["SOMETHING_ELSE"]) == ("3", "kept")


@pytest.mark.parametrize("name", LOOPBACK_ONLY)
def test_ranks_talk_over_loopback_whatever_the_environment_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "eth0")
    assert child_environment()[name] in ("lo", "127.0.0.1")


def test_children_unpickle_nothing_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    assert child_environment()["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "0"


def test_loopback_covers_all_that_choose_an_interface() -> None:
    assert set(LOOPBACK_ONLY) >= {"VLLM_HOST_IP", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}


def sleeping() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


async def test_the_death_of_a_child_is_noticed_before_it_is_reaped() -> None:
    process = sleeping()
    exits: list[Child] = []
    child = Child(process.pid, exits.append)
    assert not child.exited.is_set()
    child.kill()
    await asyncio.wait_for(child.exited.wait(), 10)
    assert exits == [child]
    assert proc.state(process.pid) == "Z", "not reaped yet: nobody else can get its pid"
    child.kill()  # no harm
    child.close()
    process.wait()


async def test_signals_never_reach_another_process_with_the_same_pid() -> None:
    process = sleeping()
    child = Child(process.pid, lambda _: None)
    child.kill()
    await asyncio.wait_for(child.exited.wait(), 10)
    process.wait()  # reaped: the pid is free
    child.signal(signal.SIGTERM)
    child.close()


class Script(Zygote):
    """A zygote whose process is replaced by canned answers."""

    def __init__(self, connection: socket.socket) -> None:  # not Zygote's, which starts the process
        self._socket = connection
        self._process = sleeping()
        self._turn = asyncio.Lock()

    def end(self) -> None:
        self._writer.close()
        self.stop()


async def scripted(*answers: Message | None) -> tuple[Script, asyncio.Task[list[Message]]]:
    ours, theirs = socket.socketpair()
    zygote = Script(ours)
    await zygote.connect(lambda: None)
    reader, writer = await asyncio.open_connection(sock=theirs, limit=MAX_LINE_BYTES)

    async def play() -> list[Message]:
        asked = []
        for answer in answers:
            asked.append(decode(await reader.readline()))
            if answer is not None:
                writer.write(encode({"type": "answer", **answer}))
        writer.close()
        return asked

    return zygote, asyncio.create_task(play())


async def test_questions_and_answers_keep_their_order() -> None:
    zygote, play = await scripted({"n": 1}, {"n": 2}, {"n": 3})
    answers = await asyncio.gather(*(zygote.ask("count", number=number) for number in (1, 2, 3)))
    assert [answer["n"] for answer in answers] == [1, 2, 3]
    assert [(m["type"], m["number"]) for m in await play] == [("count", 1), ("count", 2), ("count", 3)]
    zygote.end()


@pytest.mark.parametrize("error", [ConfigError, StartError])
async def test_errors_keep_their_kind(error: type[ConfigError | StartError]) -> None:
    zygote, play = await scripted({"error": "--port: no", "exit_code": error.exit_code})
    with pytest.raises(error, match="--port: no"):
        await zygote.ask("configure")
    await play
    zygote.end()


async def test_a_zygote_that_is_gone() -> None:
    zygote, play = await scripted(None)
    with pytest.raises(ControlClosed, match="zygote has ended"):
        await zygote.ask("fork")
    await play
    with pytest.raises(ControlClosed):
        await zygote.ask("fork")
    zygote.end()
