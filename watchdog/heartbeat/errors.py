"""Errors of heartbeat pages.

HeartbeatError
+-- PageNotCreated           the file of a rank's page cannot be made: directory, permission, space
+-- PageMissing              there is no such file (any more)
+-- PageInvalid              the file is no heartbeat page: size, kind, owner or magic
+-- PageVersionMismatch      a page of another layout version
+-- PageCorrupt              a page whose contents no writer of this version leaves behind
"""

from __future__ import annotations


class HeartbeatError(Exception):
    """Base of all errors about heartbeat pages. The message names the file."""


class PageNotCreated(HeartbeatError):
    pass


class PageMissing(HeartbeatError):
    pass


class PageInvalid(HeartbeatError):
    pass


class PageVersionMismatch(HeartbeatError):
    pass


class PageCorrupt(HeartbeatError):
    pass
