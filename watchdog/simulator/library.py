"""The compiled libraries: where they are, and how they are made.

They lie in the environment that Python runs in, in a directory named after their sources: a library of other sources
is never loaded, and checkouts that share an environment do not overwrite each other's.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from watchdog.simulator.errors import BuildError, NotBuilt

SOURCES = Path(__file__).parent / "native"

DRIVER = "libnvidia-ml.so.1"
CONTROL = "libelastic-simulator.so"

PARTS: Mapping[str, tuple[str, ...]] = {
    DRIVER: ("driver.c", "device.c", "fields.c", "events.c", "state.c"),
    CONTROL: ("control.c", "state.c"),
}
FLAGS = ("-std=gnu11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra")

COMPILERS = ("cc", "gcc", "clang")
COMPILE_TIMEOUT_S = 120.0


@cache
def library_path() -> Path:
    """The directory for what is built of the sources that are here, whether it exists or not."""
    digest = hashlib.sha256(repr((FLAGS, sorted(PARTS.items()))).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(f"\0{source.name}\0".encode() + source.read_bytes())
    return Path(sys.prefix, "lib", "elastic-watchdog", f"simulator-{digest.hexdigest()[:12]}")


def library_dir() -> Path:
    """Where the simulated `libnvidia-ml.so.1` lies. Raises NotBuilt."""
    directory = library_path()
    if not all((directory / name).is_file() for name in PARTS):
        raise NotBuilt(
            "the simulated NVIDIA driver is not built, or it was built from other sources: "
            "run `make setup` (or `python -m watchdog.simulator.build`)"
        )
    return directory


def build_libraries() -> bool:
    """Compile what is missing; returns whether anything was. May run many times at once. Raises BuildError."""
    directory = library_path()
    try:
        library_dir()
        return False
    except NotBuilt:
        pass
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=directory) as scratch:
            compile_into(Path(scratch))
            for name in PARTS:
                (Path(scratch) / name).rename(directory / name)
    except OSError as error:
        raise BuildError(f"the simulated driver cannot be written to {directory}: {error.strerror}") from error
    return True


def compile_into(directory: Path, *flags: str) -> None:
    """Compile both libraries, with further compiler flags. Raises BuildError with what the compiler said."""
    compiler = find_compiler()
    for name, sources in PARTS.items():
        command = [*compiler, *FLAGS, *flags, f"-Wl,-soname,{name}", "-o", str(directory / name)]
        command += [str(SOURCES / source) for source in sources]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=COMPILE_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"the C compiler {compiler[0]} failed on {name}: {error}") from error
        if done.returncode:
            raise BuildError(f"the C compiler {compiler[0]} failed on {name}:\n{done.stderr.strip()}")


def find_compiler() -> list[str]:
    """`$CC`, which may hold options, else the first of cc, gcc and clang. Raises BuildError."""
    wanted = [shlex.split(os.environ.get("CC", "")), *([name] for name in COMPILERS)]
    for command in wanted:
        if command and shutil.which(command[0]):
            return command
    raise BuildError(
        "no C compiler (cc, gcc or clang): install one (Debian and Ubuntu: apt-get install build-essential), "
        "or name one with CC=/path/to/compiler"
    )
