"""The daemon's watchdog routes, over its Unix socket `http.sock` in the runtime directory.

    GET /watchdog/bindings       200: see bindings.py
    PUT /watchdog/verdicts/{id}  200 or 204: taken in (again, if it was known); 409: the epoch is stale;
                                 404: no such GPU or rank; 422 or another 4xx: refused for good

The body of a verdict:

    {"id": "5f0c2a91-3", "gpu": "GPU-…", "epoch": 7, "verdict": "exclude", "signal": "xid:79", "reason": "…",
     "act": true, "held": null, "at": 1790000000.0,
     "evidence": [{"signal": "xid:79", "first": 1790000000.0, "last": 1790000000.0, "count": 1}]}

with `"rank": 2, "incarnation": 14` in place of `gpu` for a rank. `verdict`: ok, suspect, restart-rank, drain, exclude.
Only with `act` true is anything to be done; `held` says why it is false for a verdict that would act (observe mode, or
the breaker). A later verdict on the same GPU or rank replaces the earlier one.
"""

from __future__ import annotations

from pathlib import Path

import httpx

from watchdog.bindings import Bindings, parse_bindings
from watchdog.docket import Ruling
from watchdog.errors import DaemonError, DaemonUnreachable, StaleEpoch

SOCKET_NAME = "http.sock"
TIMEOUT_S = 2.0


class DaemonClient:
    def __init__(self, runtime_dir: Path) -> None:
        self._socket = runtime_dir / SOCKET_NAME
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(self._socket)), base_url="http://daemon", timeout=TIMEOUT_S
        )

    async def bindings(self) -> Bindings:
        """Raises DaemonUnreachable, or DaemonError for an answer that is not as agreed."""
        response = await self._send("GET", "/watchdog/bindings")
        if response.status_code != 200:
            raise DaemonError(f"GET /watchdog/bindings answered {response.status_code}")
        try:
            body = response.json()
        except ValueError as error:
            raise DaemonError("the daemon's bindings are no JSON") from error
        return parse_bindings(body)

    async def put_verdict(self, ruling: Ruling) -> None:
        """Raises StaleEpoch, DaemonUnreachable (also for 5xx: try again), or DaemonError: refused for good."""
        response = await self._send("PUT", f"/watchdog/verdicts/{ruling.id}", ruling)
        if response.status_code == 409:
            raise StaleEpoch(f"epoch {ruling.epoch} is over")
        if response.status_code >= 500:
            raise DaemonUnreachable(f"the daemon answered {response.status_code}")
        if response.status_code >= 300:
            raise DaemonError(f"the daemon refused the verdict: {response.status_code} {response.text[:200]}")

    async def close(self) -> None:
        await self._http.aclose()

    async def _send(self, method: str, path: str, ruling: Ruling | None = None) -> httpx.Response:
        try:
            return await self._http.request(method, path, json=ruling.as_json() if ruling else None)
        except httpx.HTTPError as error:
            raise DaemonUnreachable(f"{self._socket}: {error or type(error).__name__}") from error
