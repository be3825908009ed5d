"""Copies of experts in files: they outlive the rank that wrote them, and only a whole one of the right kind is used.

One file for each (layer, expert), with the weights in kernel layout:

    magic 8 | version u32 | length of the identity u32 | identity, JSON | blake2b of the weights, 32 | weights

The identity is what a reader expects to find: model, layer, expert, and name, type and shape of each tensor. It is
compared as bytes, so a file of another model, device or vLLM is told before its weights are looked at. Integers are
little-endian; tensors lie one after the other, those with the largest elements first.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from elastic_daemon.errors import HostCopyUnusable

MAGIC = b"ELEXPERT"
VERSION = 1
DIGEST_BYTES = 32

RESERVE = 0.1
"""Share of the machine's memory, and of the file system, that stays free: a copy is a convenience, not worth a host
that runs out of either. Where most experts have a single copy, all of them are asked for."""

Weights = Mapping[str, torch.Tensor]
"""The weights of one expert by parameter name."""


class HostCopies:
    """The copies in `directory`, which all ranks of a daemon share.

    `model`: says whose experts they are. `writer`: tells apart who writes at the same time.
    """

    def __init__(self, directory: Path, model: str, writer: str) -> None:
        self._directory = directory
        self._model = model
        self._unfinished = directory / f".{writer}.tmp"

    def path(self, layer: int, expert: int) -> Path:
        return self._directory / f"{layer}-{expert}.expert"

    def write(self, layer: int, expert: int, weights: Weights) -> int:
        """Replace the copy of an expert by `weights`, in host memory. Returns their bytes.

        Raises OSError, with ENOSPC also where it would leave less than RESERVE free.
        """
        parts = [memoryview(as_bytes(weights[name]).numpy()) for name in _order(weights)]
        self._require_room(sum(part.nbytes for part in parts))
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for part in parts:
            digest.update(part)
        with contextlib.suppress(FileNotFoundError):
            self._unfinished.unlink()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(self._unfinished, flags, 0o600), "wb") as file:
            file.write(self._prefix(layer, expert, weights) + digest.digest())
            file.writelines(parts)
        self._unfinished.replace(self.path(layer, expert))
        return sum(part.nbytes for part in parts)

    def read(self, layer: int, expert: int, like: Weights) -> dict[str, torch.Tensor]:
        """The copy of an expert, in host memory, of the names, types and shapes of `like`. Raises HostCopyUnusable."""
        prefix = self._prefix(layer, expert, like)
        sizes = {name: like[name].nbytes for name in _order(like)}
        content = bytearray(sum(sizes.values()))
        try:
            with self.path(layer, expert).open("rb", buffering=0) as file:
                if file.read(len(prefix)) != prefix:
                    raise HostCopyUnusable("it is of another model, expert or format, or cut off")
                digest = file.read(DIGEST_BYTES)
                length = _fill(content, file.fileno())
                if length < len(content) or file.read(1):
                    raise HostCopyUnusable("it has another length than its weights")
        except OSError as error:
            raise HostCopyUnusable(error.strerror or str(error)) from error
        if hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest() != digest:
            raise HostCopyUnusable("its digest is not that of its weights")
        return _split(content, sizes, like)

    def _require_room(self, size: int) -> None:
        memory, space = psutil.virtual_memory(), os.statvfs(self._directory)
        for what, free, total in (
            ("memory", memory.available, memory.total),
            ("file system", space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize),
        ):
            if free - size < RESERVE * total:
                raise OSError(errno.ENOSPC, f"{free >> 20} of {total >> 20} MiB of the {what} are free")

    def _prefix(self, layer: int, expert: int, weights: Weights) -> bytes:
        tensors = [[name, str(weights[name].dtype), list(weights[name].shape)] for name in _order(weights)]
        identity = json.dumps({"model": self._model, "layer": layer, "expert": expert, "tensors": tensors}).encode()
        return struct.pack("<8sII", MAGIC, VERSION, len(identity)) + identity


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, [nbytes]; a view where its elements lie together."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _order(weights: Weights) -> list[str]:
    """Large elements first, so that each tensor is aligned."""
    return sorted(weights, key=lambda name: (-weights[name].element_size(), name))


def _fill(content: bytearray, fd: int) -> int:
    """Read until `content` is full or the file ends. Returns the bytes read."""
    view, length = memoryview(content), 0
    while length < len(content) and (count := os.readv(fd, [view[length:]])):
        length += count
    return length


def _split(content: bytearray, sizes: Mapping[str, int], like: Weights) -> dict[str, torch.Tensor]:
    flat = torch.frombuffer(content, dtype=torch.uint8)
    parts = flat.split(list(sizes.values()))
    return {name: part.view(like[name].dtype).view(like[name].shape) for name, part in zip(sizes, parts, strict=True)}
