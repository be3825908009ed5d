"""Errors of the daemon.

ElasticError
+-- ConfigError              bad flag, environment variable, file or model; the message names it   (exit 2)
+-- StartError               a start that cannot succeed: port, runtime directory, checkpoint      (exit 3)
+-- DaemonUnreachable        an operator command found no daemon where it was told to ask          (exit 3)
+-- AnswerRefused            the daemon does not answer this: it wants a key, or takes no more readers
+-- OrderUnanswered          an operator's order that the daemon cannot take, or cannot answer any more
+-- PeerLost                 a collective or a rendezvous failed because another member is gone
+-- Fenced                   this rank was told to stop stepping: its epoch has ended
+-- HostCopyUnusable         a copy of an expert in host memory is missing, torn, damaged or of something else
+-- ControlClosed            the control connection to the supervisor or from a child is gone
"""

from __future__ import annotations


class ElasticError(Exception):
    """Base of all errors that the daemon raises on purpose."""

    exit_code = 1


class ConfigError(ElasticError):
    exit_code = 2


def engine_missing(error: ImportError) -> ConfigError:
    """What to tell the operator when vLLM or torch, which come with an extra, cannot be imported."""
    return ConfigError(
        f"the engine cannot be imported ({error}); install it with an extra: "
        "pip install 'elastic-ep-daemon[cpu]', or [cuda] for NVIDIA GPUs"
    )


class StartError(ElasticError):
    exit_code = 3


def wrong_watchdog(error: ImportError) -> StartError:
    """What to tell when another package `watchdog` is found: a library that watches files has that name too."""
    return StartError(
        f"the package `watchdog` that is found here is not the daemon's ({error}): a file-watching library of the same "
        "name is in its way; give the daemon a virtual environment of its own"
    )


class DaemonUnreachable(ElasticError):
    exit_code = 3


class AnswerRefused(ElasticError):
    pass


class OrderUnanswered(ElasticError):
    pass


class PeerLost(ElasticError):
    pass


class Fenced(ElasticError):
    def __init__(self, epoch: int) -> None:
        super().__init__(f"fenced by epoch {epoch}")
        self.epoch = epoch


class HostCopyUnusable(ElasticError):
    pass


class ControlClosed(ElasticError):
    pass
