"""Files with copies of experts: what was written is read back, and nothing else ever is."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic_daemon.engine.host_copies import DIGEST_BYTES, MAGIC, VERSION, HostCopies, Weights
from elastic_daemon.errors import HostCopyUnusable

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int64)


def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Parameters of all widths, the narrow ones first by name, and one without dimensions: a scale per expert."""
    torch.manual_seed(seed)
    weights = {"a_scale": torch.rand(()), "b_packed": torch.randint(0, 255, (3, 5), dtype=torch.uint8)}
    return weights | {"c_up": torch.rand(7, 3), "d_down": torch.rand(3, 7).bfloat16()}


@pytest.fixture
def copies(tmp_path: Path) -> HostCopies:
    return HostCopies(tmp_path, "model bfloat16", "rank-0")


def assert_same(read: Weights, written: Weights) -> None:
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_what_was_written_is_read_by_another_rank(copies: HostCopies, tmp_path: Path) -> None:
    weights = random_weights()
    assert copies.write(3, 14, weights) == sum(tensor.nbytes for tensor in weights.values())
    reader = HostCopies(tmp_path, "model bfloat16", "rank-1")
    assert_same(reader.read(3, 14, random_weights(1)), weights)


@given(
    shapes=st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 5), max_size=3)), min_size=1, max_size=4)
)
def test_all_types_and_shapes(shapes: list[tuple[torch.dtype, list[int]]], tmp_path_factory: object) -> None:
    assert isinstance(tmp_path_factory, pytest.TempPathFactory)
    copies = HostCopies(tmp_path_factory.mktemp("copies"), "m", "w")
    weights = {str(i): torch.randint(0, 100, shape).to(dtype) for i, (dtype, shape) in enumerate(shapes)}
    copies.write(0, 0, weights)
    assert_same(copies.read(0, 0, {name: torch.zeros_like(tensor) for name, tensor in weights.items()}), weights)


def test_a_row_of_a_larger_tensor(copies: HostCopies) -> None:
    """Slots are rows, and a kernel may keep them transposed."""
    slots = torch.rand(4, 3, 5).transpose(1, 2)
    copies.write(0, 0, {"w": slots[2]})
    assert torch.equal(copies.read(0, 0, {"w": slots[0]})["w"], slots[2])


def test_private_and_nothing_unfinished_is_left(copies: HostCopies, tmp_path: Path) -> None:
    (tmp_path / ".rank-0.tmp").write_bytes(b"of a rank that was killed while it wrote")
    copies.write(1, 2, random_weights())
    (file,) = tmp_path.iterdir()
    assert file == copies.path(1, 2)
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_copy_is_replaced(copies: HostCopies) -> None:
    copies.write(0, 0, random_weights(0))
    copies.write(0, 0, random_weights(1))
    assert_same(copies.read(0, 0, random_weights()), random_weights(1))


def test_missing(copies: HostCopies) -> None:
    with pytest.raises(HostCopyUnusable, match="No such file"):
        copies.read(0, 0, random_weights())


def flip(position: int) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        at = position % len(content)
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return damage


IDENTITY = struct.calcsize("<8sII")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: b"", "format"),
        (lambda content: content[:20], "format"),
        (lambda content: content[:-1], "length"),
        (lambda content: content[: len(content) // 2], "format|length"),
        (lambda content: content + b"\0", "length"),
        (flip(0), "format"),
        (flip(len(MAGIC)), "format"),
        (flip(IDENTITY), "format"),
        (flip(-1), "digest"),
        (flip(-random_weights()["c_up"].nbytes), "digest"),
    ],
)
def test_torn_or_damaged(copies: HostCopies, damage: Callable[[bytes], bytes], reason: str) -> None:
    copies.write(0, 0, random_weights())
    path = copies.path(0, 0)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(HostCopyUnusable, match=reason):
        copies.read(0, 0, random_weights())


def test_every_single_bit_counts(copies: HostCopies) -> None:
    """Whichever byte is hit: of the prefix, the digest or the weights."""
    copies.write(0, 0, random_weights())
    path = copies.path(0, 0)
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(flip(position)(whole))
        with pytest.raises(HostCopyUnusable):
            copies.read(0, 0, random_weights())


@pytest.mark.parametrize(
    "like",
    [
        {"c_up": torch.rand(3, 7)},  # as many bytes
        {"c_up": torch.rand(7, 4)},
        {"c_up": torch.randint(0, 9, (7, 3), dtype=torch.int32)},
        {"e": torch.rand(2)},
    ],
)
def test_of_another_shape_or_type(copies: HostCopies, like: Weights) -> None:
    copies.write(0, 0, random_weights())
    with pytest.raises(HostCopyUnusable, match="of another"):
        copies.read(0, 0, {**random_weights(), **like})


def test_of_another_model_or_expert(copies: HostCopies, tmp_path: Path) -> None:
    copies.write(0, 0, random_weights())
    with pytest.raises(HostCopyUnusable, match="of another"):
        HostCopies(tmp_path, "another", "rank-0").read(0, 0, random_weights())
    copies.path(0, 0).rename(copies.path(0, 1))
    with pytest.raises(HostCopyUnusable, match="of another"):
        copies.read(0, 1, random_weights())


def test_the_format_is_as_documented(copies: HostCopies) -> None:
    weights = {"w": torch.arange(4, dtype=torch.int64)}
    copies.write(5, 6, weights)
    content = copies.path(5, 6).read_bytes()
    magic, version, length = struct.unpack_from("<8sII", content)
    assert (magic, version) == (MAGIC, VERSION)
    assert b'"layer": 5, "expert": 6' in content[IDENTITY : IDENTITY + length]
    assert content[IDENTITY + length + DIGEST_BYTES :] == struct.pack("<4q", *range(4))


@pytest.mark.parametrize("short_of", ["memory", "file system"])
def test_the_machine_keeps_a_reserve(copies: HostCopies, monkeypatch: pytest.MonkeyPatch, short_of: str) -> None:
    weights = {"w": torch.zeros(1000, dtype=torch.uint8)}
    free = {"memory": 11_000, "file system": 11_000, short_of: 10_999}
    memory = SimpleNamespace(available=free["memory"], total=100_000)
    space = SimpleNamespace(f_bavail=free["file system"], f_blocks=100_000, f_frsize=1)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    monkeypatch.setattr("os.statvfs", lambda _: space)
    with pytest.raises(OSError, match=f"of the {short_of}") as error:
        copies.write(0, 0, weights)
    assert error.value.errno == errno.ENOSPC
    assert not copies.path(0, 0).exists()
    memory.available = space.f_bavail = 11_000
    copies.write(0, 0, weights)


def test_a_directory_that_is_gone_is_an_os_error(tmp_path: Path) -> None:
    copies = HostCopies(tmp_path / "gone", "m", "w")
    with pytest.raises(OSError, match=os.strerror(2)):
        copies.write(0, 0, random_weights())
