"""What the dashboard shows, read from the page."""

from __future__ import annotations

from tests.browser import Browser


def tile(window: Browser, rank: int) -> str:
    state: str = window.run(
        "return document.querySelector(`#tiles [data-key='${arguments[0]}']`)?.dataset.state ?? ''", rank
    )
    return state


def status(window: Browser) -> str:
    shown: str = window.run("return document.querySelector('#state').dataset.status ?? ''")
    return shown


def figure(window: Browser, name: str) -> str:
    shown: str = window.run(
        "return document.querySelector(`#figures [data-key='${arguments[0]}'] .figure`)?.innerText ?? ''", name
    )
    return shown
