"""Parts of the dashboard in Chromium, with a deployment that nothing happens to."""

from __future__ import annotations

from typing import Any

import pytest

from tests.browser import Browser
from tests.e2e.cluster import Cluster
from tests.e2e.dashboard_page import figure, status

pytestmark = pytest.mark.e2e


def test_advice_for_each_state(chromium: Browser, cluster: Cluster) -> None:
    """What the page says in states that a test cannot well bring about: the functions themselves, in the browser."""
    chromium.open(f"{cluster.url}/dashboard")
    chromium.wait(lambda: status(chromium) == "ok", "it has loaded")
    health = cluster.health()

    def said(changes: dict[str, Any], **circumstances: Any) -> tuple[str, str, str]:
        found = chromium.run(
            "const { advise } = await import('./dashboard/advice.js'); return advise(arguments[0], arguments[1])",
            {**health, **changes},
            circumstances,
        )
        return found["status"], found["text"], found["advice"]

    def rows(**states: str) -> list[dict[str, Any]]:
        return [{**row, "state": states.get(f"r{row['rank']}", "active")} for row in health["ranks"]]

    assert said({})[2] == "Nothing to do."
    assert "Automation is off" in said({}, automation=False)[2]
    assert "next loss stops" in said({"survivable_losses": 0})[2]
    short = {"status": "degraded", "reason": "rank 2: process ended", "data_parallel_size": {"target": 4, "active": 3}}
    assert said({**short, "ranks": rows(r2="excluded")})[1:] == (
        "3 of 4 ranks serve, and no request is refused. Rank 2: process ended.",
        "Release rank 2 to start it again, or scale to 3 to do without.",
    )
    assert said({**short, "ranks": rows(r2="starting")})[2] == "Rank 2 is on the way back: nothing to do."
    waits = {**short, "ranks": rows(r2="excluded"), "reason": "rank 2: xid 79; waits for a usable GPU"}
    assert "release one from quarantine" in said(waits)[2]
    restarts = {**short, "ranks": rows(r2="excluded"), "doing": "…; waiting for the pause before restarting ranks: 2"}
    assert "Rank 2 comes back by itself" in said(restarts)[2]
    assert "being drained" in said({**short, "ranks": rows(r2="draining")})[2]
    pause = {"status": "recovering", "reason": "rank 2: process ended"}
    assert "none fails" in said(pause)[1] and said(pause)[2].startswith("Wait")
    assert "too long" in said(pause, lasted=12)[2]
    gone = {"status": "unavailable", "reason": "16 experts need 16 slots", "ranks": rows(r1="excluded", r2="excluded")}
    assert said(gone)[1] == "Nothing is served. 16 experts need 16 slots."
    assert "release those that are excluded" in said(gone)[2]
    assert said({**gone, "ranks": rows(r1="starting")})[2] == "Rank 1 is starting: wait."
    assert said({"status": "starting", "reason": "ranks are starting"})[1] == "Ranks are starting."
    assert said({"status": "stopping", "reason": ""})[0] == "stopping"
    assert said({}, silence=5)[0] == "silent"
    assert "Key button" in said({"ranks": None})[2]


def test_figures_are_totals(chromium: Browser, cluster: Cluster) -> None:
    """Not what the last recoveries add up to: these are forgotten, and do not know of a front end that ended."""
    chromium.open(f"{cluster.url}/dashboard")
    chromium.wait(lambda: status(chromium) == "ok", "it has loaded")
    requests = {"kept": 9000, "replayed": 700, "restarted": 70, "moved": 3, "lost": 5, "refused": 0}

    def shown(totals: Any) -> dict[str, str]:
        found: dict[str, str] = chromium.run(
            """
            const { showFigures } = await import('./dashboard/figures.js');
            const parent = document.createElement('dl');
            showFigures(parent, { health: arguments[0], recoveries: [], totals: arguments[1] });
            return Object.fromEntries([...parent.children].map(
              (node) => [node.dataset.key, [node.querySelector('.figure').textContent, node.dataset.tone].join('|')]));
            """,
            cluster.health(),
            totals,
        )
        return found

    def gap(*counts: tuple[str, int]) -> str:
        histogram = {"buckets": dict(counts), "count": max(count for _, count in counts), "sum": 1.0}
        return shown({"requests": requests, "client_gap": histogram})["Client gap"]

    none = ("0.1", 0), ("+Inf", 0)
    row = shown({"requests": requests, "client_gap": {"buckets": dict(none), "count": 0, "sum": 0.0}})
    assert (row["Kept"], row["Replayed"], row["Lost"], row["Client gap"]) == ("9000|", "770|", "5|bad", "—|")
    assert gap(("0.1", 98), ("0.2", 99), ("10.0", 100), ("+Inf", 100)) == "≤ 200 ms|"
    assert gap(("0.1", 0), ("+Inf", 1)) == "very long|"
    assert shown(None)["Kept"] == "—|", "not known yet"


def test_small_tiles(chromium: Browser, cluster: Cluster) -> None:
    """Of many ranks: each still says which GPU it has, and its buttons are wide enough for fingers on a phone."""
    chromium.open(f"{cluster.url}/dashboard")
    chromium.wait(lambda: status(chromium) == "ok", "it has loaded")
    health = cluster.health()
    rows = [{**health["ranks"][0], "rank": rank, "gpu": f"GPU-{rank:08d}-0000"} for rank in range(24)]
    chromium.size(360, 780, mobile=True)
    tiles = chromium.run(
        """
        const { showTiles } = await import('./dashboard/tiles.js');
        const parent = document.createElement('ul');
        parent.className = 'tiles';
        document.querySelector('#tiles').after(parent);
        showTiles(parent, arguments[0], null, () => {});
        const seen = (node) => (node.offsetParent ? node.innerText : '');
        return [...parent.children].map((tile) => {
          const gpu = tile.querySelector('.gpu');
          const heights = [...tile.querySelectorAll('button')].map((node) => node.getBoundingClientRect().height);
          return [parent.className, seen(gpu), gpu.title, seen(tile.querySelector('.pid')), Math.min(...heights)];
        });
        """,
        {**health, "ranks": rows},
    )
    assert [tile[1:3] for tile in tiles] == [[f"GPU-…{row['gpu'][-4:]}", row["gpu"]] for row in rows]
    assert {(tile[0], tile[3]) for tile in tiles} == {("tiles dense", "")}
    assert min(tile[4] for tile in tiles) > 39.9
    chromium.wait(lambda: chromium.width() == 360, "nothing sticks out")


def test_totals_are_asked_for_again(chromium: Browser, cluster: Cluster) -> None:
    """After an answer that was none."""
    chromium.cdp("Network.enable")
    chromium.cdp("Network.setBlockedURLs", urls=["*/totals"])
    chromium.open(f"{cluster.url}/dashboard")
    chromium.wait(lambda: figure(chromium, "Kept") == "—", "not known yet")
    chromium.wait(lambda: status(chromium) == "ok", "the rest does without")
    chromium.cdp("Network.setBlockedURLs", urls=[])
    chromium.wait(lambda: figure(chromium, "Kept").isdecimal(), "now they are known")


def test_it_asks_where_there_is_no_stream(chromium: Browser, cluster: Cluster) -> None:
    chromium.cdp("Network.enable")
    chromium.cdp("Network.setBlockedURLs", urls=["*/events?since=*"])
    chromium.open(f"{cluster.url}/dashboard")
    chromium.wait(lambda: chromium.text("#link-text") == "asking every second", "it says how it knows")
    asked = "return performance.getEntriesByType('resource').filter((part) => part.name.endsWith('/health')).length"
    before = chromium.run(asked)
    chromium.wait(lambda: chromium.run(asked) >= before + 3, "and asks")
    assert status(chromium) == "ok" and "recovery_done" in chromium.text("#events")
