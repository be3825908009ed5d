"""Errors of the watchdog.

WatchdogError
+-- SignalsError             a table of signals that cannot be used; names file, line and reason     (exit 2)
+-- OptionError              an option of the command line, or a variable, that cannot be used       (exit 2)
+-- StartError               a start that cannot succeed: directory, driver, another watchdog        (exit 3)
+-- NotRunning               `status` found no watchdog where it was told to look                    (exit 3)
+-- StateError               the state directory cannot be written                                   (exit 3)
+-- DaemonError              the daemon did not answer, or not as agreed
    +-- DaemonUnreachable    no daemon on the socket
    +-- DaemonNotReady       it cannot take this in yet (5xx): to be tried again
    +-- StaleEpoch           the daemon is in another epoch than the verdict
+-- RasError                 NCCL RAS cannot be asked, or does not answer as it should
"""

from __future__ import annotations


class WatchdogError(Exception):
    """Base of all errors that the watchdog raises on purpose."""

    exit_code = 1


class SignalsError(WatchdogError):
    exit_code = 2


class OptionError(WatchdogError):
    exit_code = 2


class StartError(WatchdogError):
    exit_code = 3


class NotRunning(WatchdogError):
    exit_code = 3


class StateError(WatchdogError):
    exit_code = 3


class DaemonError(WatchdogError):
    pass


class DaemonUnreachable(DaemonError):
    pass


class DaemonNotReady(DaemonError):
    pass


class StaleEpoch(DaemonError):
    pass


class RasError(WatchdogError):
    pass
