"""Control messages: JSON lines over a Unix socket."""

from __future__ import annotations

import gc
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_daemon.errors import ControlClosed
from elastic_daemon.processes.messages import ControlClient, Message, decode, encode

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(fields=st.dictionaries(st.text(), JSON, max_size=4), type_=st.text())
def test_round_trip_on_one_line(fields: Message, type_: str) -> None:
    message = {**fields, "type": type_}
    line = encode(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode(line) == message


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"{",
        b"null",
        b"[]",
        b'"ready"',
        b"{}",
        b'{"kind": "ready"}',
        b'{"type": 3}',
        b'{"type": null}',
        b"\xff",
    ],
)
def test_bad_lines(line: bytes) -> None:
    with pytest.raises(ValueError):
        decode(line)


@pytest.fixture
def pair(socket_dir: Path) -> Iterator[tuple[ControlClient, socket.socket]]:
    path = str(socket_dir / "control.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        client = ControlClient(path)
        server, _ = listener.accept()
        server.settimeout(10)
        with server:
            yield client, server
        client.close()


def test_client_sends_lines(pair: tuple[ControlClient, socket.socket]) -> None:
    client, server = pair
    client.send("hello", role="rank", rank=2)
    with server.makefile("rb") as stream:
        assert decode(stream.readline()) == {"type": "hello", "role": "rank", "rank": 2}


def test_client_reads_messages_until_the_end(pair: tuple[ControlClient, socket.socket]) -> None:
    client, server = pair
    sent = [{"type": "fence", "epoch": 3}, {"type": "resume", "epoch": 3, "text": "é\n" * 10_000}]
    lines = b"".join(encode(message) for message in sent)
    writer = threading.Thread(target=lambda: (server.sendall(lines), server.shutdown(socket.SHUT_RDWR)))
    writer.start()
    assert list(client.messages()) == sent
    writer.join()


def test_lines_of_several_threads_do_not_mix(pair: tuple[ControlClient, socket.socket]) -> None:
    client, server = pair
    padding = "x" * 200_000  # more than a socket buffer takes at once

    def send(sender: int) -> None:
        for number in range(5):
            client.send("stats", sender=sender, number=number, padding=padding)

    threads = [threading.Thread(target=send, args=(sender,)) for sender in range(4)]
    for thread in threads:
        thread.start()
    with server.makefile("rb") as stream:
        received = [decode(stream.readline()) for _ in range(20)]
    for thread in threads:
        thread.join()
    for sender in range(4):
        assert [m["number"] for m in received if m["sender"] == sender] == list(range(5))


def test_no_supervisor(socket_dir: Path) -> None:
    path = str(socket_dir / "nobody.sock")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ControlClosed, match=r"nobody\.sock") as _error:  # keeps the frames alive
        ControlClient(path)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_sending_to_a_supervisor_that_is_gone(pair: tuple[ControlClient, socket.socket]) -> None:
    client, server = pair
    server.close()
    with pytest.raises(ControlClosed):
        client.send("ready")


def test_messages_end_with_a_supervisor_that_died_before_it_read_all(pair: tuple[ControlClient, socket.socket]) -> None:
    client, server = pair
    client.send("ready")
    server.close()  # the kernel resets a connection that is closed with unread data
    assert list(client.messages()) == []


def test_messages_end_with_a_supervisor_that_died_within_one(pair: tuple[ControlClient, socket.socket]) -> None:
    client, server = pair
    server.sendall(encode({"type": "resume"}) + b'{"type": "fe')
    server.close()
    assert list(client.messages()) == [{"type": "resume"}]
