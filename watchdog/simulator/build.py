"""`python -m watchdog.simulator.build`: compile the simulated driver, unless that has been done."""

from __future__ import annotations

import sys

from watchdog.simulator import library
from watchdog.simulator.errors import BuildError


def main() -> int:
    try:
        built = library.build_libraries()
    except BuildError as error:
        print(f"watchdog.simulator.build: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{'built' if built else 'up to date'}: {library.library_dir()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
