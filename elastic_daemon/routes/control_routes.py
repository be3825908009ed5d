"""Which paths belong to the supervisor, whoever accepts the connection."""

from __future__ import annotations

import re

READ_PATHS = frozenset(
    {
        "/health",
        "/livez",
        "/readyz",
        "/metrics",
        "/events",
        "/experts",
        "/experts/verify",
        "/operations",
        "/placement",
        "/recoveries",
        "/totals",
        "/dashboard",
        "/is_scaling_elastic_ep",
    }
)
"""They change nothing, whatever the method. (vLLM asks with POST whether it is scaling.)"""

COSTLY_PATHS = frozenset({"/experts/verify"})
"""They change nothing, and stop serving while they are answered: whoever may not give orders may not ask for them."""

CONTROL_PATHS = READ_PATHS | {"/scale_elastic_ep", "/automation"}

CONTROL_TEMPLATES = frozenset(
    {
        "/operations/{operation}",
        "/dashboard/{file}",
        "/ranks/{rank}/exclude",
        "/ranks/{rank}/drain",
        "/ranks/{rank}/release",
        "/gpus/{uuid}/release",
    }
)

_PART = r"(?!\.{1,2}(?:/|$))(?:(?![/?#%\\])[!-~])+"
"""No dot segments, and nothing that delimits a URL or has no place in one: what is forwarded is what was checked."""

_UNDER_PREFIX = re.compile(rf"/(?:(?:operations|dashboard)/{_PART}|(?:ranks|gpus)/{_PART}/{_PART})")

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


def is_control_path(path: str) -> bool:
    return path in CONTROL_PATHS or _UNDER_PREFIX.fullmatch(path) is not None


def is_page(path: str) -> bool:
    """The dashboard's own files: they are the same in every deployment."""
    return path == "/dashboard" or (path.startswith("/dashboard/") and is_control_path(path))


def is_order(method: str, path: str) -> bool:
    """Whether a request may change the deployment. Whatever is not known to change nothing counts."""
    return method not in SAFE_METHODS and path not in READ_PATHS and is_control_path(path)


def needs_admin(method: str, path: str) -> bool:
    """Whether a request is for those only who may give orders."""
    return path in COSTLY_PATHS or is_order(method, path)
