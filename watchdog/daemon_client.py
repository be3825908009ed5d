"""The daemon's watchdog routes, over its Unix socket `http.sock` in the runtime directory.

    GET /watchdog/bindings       200: see bindings.py
    PUT /watchdog/verdicts/{id}  200 or 204: taken in (again, if it was known); 409: the epoch is stale;
                                 404: no such GPU or rank; 422 or another 4xx: refused for good
    PUT /watchdog/gpus           204; 503: the daemon is not configured yet; body: see fitness.py

The body of a verdict:

    {"id": "5f0c2a91-3", "gpu": "GPU-…", "epoch": 7, "verdict": "exclude", "signal": "xid:79", "reason": "…",
     "act": true, "held": null, "at": 1790000000.0,
     "evidence": [{"signal": "xid:79", "first": 1790000000.0, "last": 1790000000.0, "count": 1}]}

with `"rank": 2, "incarnation": 14` in place of `gpu` for a rank. `verdict`: ok, suspect, restart-rank, drain, exclude.
Only with `act` true is anything to be done; `held` says why it is false for a verdict that would act (observe mode, or
the breaker). A later verdict on the same GPU or rank replaces the earlier one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from watchdog.bindings import Bindings, parse_bindings
from watchdog.docket import Ruling
from watchdog.errors import DaemonError, DaemonNotReady, DaemonUnreachable, StaleEpoch
from watchdog.fitness import Fitness
from watchdog.unix_http import Answer, request

SOCKET_NAME = "http.sock"
TIMEOUT_S = 2.0


class DaemonClient:
    """All methods raise DaemonUnreachable; and DaemonError for an answer that is not as agreed, or a refusal."""

    def __init__(self, runtime_dir: Path) -> None:
        self._socket = runtime_dir / SOCKET_NAME

    async def bindings(self) -> Bindings:
        answer = await self._send("GET", "/watchdog/bindings")
        if answer.status != 200:
            raise DaemonError(f"GET /watchdog/bindings answered {answer.status}")
        try:
            body = json.loads(answer.body)
        except ValueError as error:
            raise DaemonError("the daemon's bindings are no JSON") from error
        return parse_bindings(body)

    async def put_verdict(self, ruling: Ruling) -> None:
        """Raises StaleEpoch, and DaemonNotReady for 5xx, too."""
        answer = await self._send("PUT", f"/watchdog/verdicts/{ruling.id}", ruling.as_json())
        if answer.status == 409:
            raise StaleEpoch(f"epoch {ruling.epoch} is over")
        _check(answer)

    async def put_gpus(self, gpus: Sequence[Fitness]) -> None:
        """Raises DaemonNotReady for 5xx, too."""
        _check(await self._send("PUT", "/watchdog/gpus", {"gpus": [gpu.as_json() for gpu in gpus]}))

    async def _send(self, method: str, path: str, body: Any = None) -> Answer:
        try:
            return await request(self._socket, method, path, body, TIMEOUT_S)
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            raise DaemonUnreachable(f"{self._socket}: {str(error) or type(error).__name__}") from error


def _check(answer: Answer) -> None:
    if answer.status >= 500:
        raise DaemonNotReady(f"the daemon answered {answer.status}")
    if answer.status >= 300:
        raise DaemonError(f"the daemon refused it: {answer.status} {answer.text[:200]}")
