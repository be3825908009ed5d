"""Errors of the simulated driver.

SimulatorError               what cannot be simulated; one line that says what to do            (exit 2)
+-- NotBuilt                 the library has not been compiled from the sources that are here
+-- NoState                  no simulated GPUs in this runtime directory, or ones of another version
+-- UnknownGpu               no GPU with this index or UUID
+-- BuildError               no C compiler, or it failed
"""

from __future__ import annotations


class SimulatorError(Exception):
    """Base of all errors of this package."""

    exit_code = 2


class NotBuilt(SimulatorError):
    pass


class NoState(SimulatorError):
    pass


class UnknownGpu(SimulatorError):
    pass


class BuildError(SimulatorError):
    pass
