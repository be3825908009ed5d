"""Upkeep of the virtual environment; run by scripts/setup.sh with its Python.

repair   makes pip install again what an interrupted run left half done
compile  byte-compiles the installed packages on all cores
verify   compares the installed versions with pinned requirement files
"""

from __future__ import annotations

import compileall
import csv
import re
import shutil
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

SITE = Path(sysconfig.get_paths()["purelib"])

# Not imported in service (vLLM has model code of its own); some of these files
# are not valid on every Python.
NOT_COMPILED = re.compile(
    r"/tests?/|/torch/testing/_internal/py3\d+_"
    r"|/transformers/models/[^/]+/(modeling|modular|convert|image_processing|video_processing|feature_extraction)_"
)


def require_own_environment() -> None:
    """Stops unless this Python is the project's environment.

    The python of a half-deleted environment (without its pyvenv.cfg) acts as the
    one it was made from, whose packages are nobody's to change here.
    """
    own = Path(__file__).resolve().parent.parent / ".venv"
    site_inside = SITE.resolve().is_relative_to(own)
    if sys.prefix == sys.base_prefix or Path(sys.prefix).resolve() != own or not site_inside:
        raise SystemExit(f"{sys.executable} belongs to {sys.prefix}, not to {own}: nothing was changed")


def is_damaged(record: Path) -> bool:
    """Whether a file that a RECORD lists is missing or cut short.

    A longer file is none of this: some machines add certificates to installed bundles.
    """
    with record.open(newline="", encoding="utf-8") as lines:
        for row in csv.reader(lines):
            if len(row) != 3 or row[0].endswith(".pyc"):
                continue
            try:
                size = (SITE / row[0]).stat().st_size
            except OSError:
                return True
            if row[2] and size < int(row[2]):
                return True
    return False


def repair() -> None:
    # pip moves a package aside under such a name while it replaces it.
    for leftover in SITE.glob("~*"):
        print(f"removing {leftover.name}")
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    # Without its .dist-info a package counts as not installed: pip writes it anew.
    for info in sorted(SITE.glob("*.dist-info")):
        record = info / "RECORD"
        if not record.is_file() or is_damaged(record):
            print(f"{info.name} is incomplete; it will be installed again")
            shutil.rmtree(info)


def compile_packages() -> int:
    return 0 if compileall.compile_dir(SITE, quiet=1, workers=0, rx=NOT_COMPILED, maxlevels=100) else 1


def verify(requirement_files: list[str]) -> int:
    import platform

    failures = 0
    for name in requirement_files:
        for line in Path(name).read_text(encoding="utf-8").splitlines():
            pin, _, marker = line.split("#")[0].partition(";")
            if not pin.strip() or ("x86_64" in marker and platform.machine() != "x86_64"):
                continue
            package, _, wanted = pin.strip().partition("==")
            try:
                found = metadata.version(package)
            except metadata.PackageNotFoundError:
                found = "nothing"
            if found != wanted:
                print(f"{package}: {wanted} is wanted, {found} is installed")
                failures += 1
    return 1 if failures else 0


def main() -> int:
    require_own_environment()
    command, *arguments = sys.argv[1:]
    if command == "repair":
        repair()
        return 0
    if command == "compile":
        return compile_packages()
    if command == "verify":
        return verify(arguments)
    raise SystemExit(f"unknown command: {command}")


if __name__ == "__main__":
    raise SystemExit(main())
