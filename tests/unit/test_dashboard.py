"""The dashboard's files as they are served: headers, markup, size, and that nothing comes from elsewhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from elastic_daemon import dashboard
from elastic_daemon.app import make_control_app
from elastic_daemon.gates.access import AccessGuard, AccessRules
from tests.unit.operator_plane import OperatorPlane

STATIC = Path(dashboard.__file__).parent / "static"
NAMES = sorted(path.name for path in STATIC.iterdir())
SCRIPTS = [name for name in NAMES if name.endswith(".js")]
PAGE = (STATIC / "index.html").read_text(encoding="utf-8")

VOID = {"meta", "link", "input", "br", "hr", "img"}
REFERENCES = ("for", "aria-labelledby", "aria-describedby", "aria-controls")


@dataclass
class Node:
    tag: str
    attributes: dict[str, str | None]
    inside: tuple[str, ...]
    text: str = ""


@dataclass
class Page(HTMLParser):
    """All elements in order; raises where tags are not closed as they were opened."""

    nodes: list[Node] = field(default_factory=list)
    _open: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {tag} {attrs}"
        node = Node(tag, dict(attrs), tuple(parent.tag for parent in self._open))
        self.nodes.append(node)
        if tag not in VOID:
            self._open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.nodes.append(Node(tag, dict(attrs), tuple(parent.tag for parent in self._open)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1].tag == tag, f"</{tag}> closes {[node.tag for node in self._open]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for node in self._open:
            node.text += data

    def close(self) -> None:
        super().close()
        assert not self._open, [node.tag for node in self._open]

    def all(self, *tags: str) -> list[Node]:
        return [node for node in self.nodes if node.tag in tags]


@pytest.fixture(scope="module")
def page() -> Page:
    parsed = Page()
    parsed.feed(PAGE)
    parsed.close()
    return parsed


def client(rules: AccessRules | None = None) -> httpx.AsyncClient:
    app = AccessGuard(make_control_app(OperatorPlane()), rules or AccessRules((), loopback=True))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with client() as http:
        yield http


async def test_headers(http: httpx.AsyncClient) -> None:
    for path in ("/dashboard", *(f"/dashboard/{name}" for name in NAMES if name != "index.html")):
        answer = await http.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-cache"
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert policy["frame-ancestors"] == policy["trusted-types"] == "'none'"
        allowed = {value for name, value in policy.items() if name.endswith("-src") and name != "default-src"}
        assert allowed == {"'self'"}, "nothing inline, nothing from elsewhere"
        head = await http.head(path)
        assert (head.status_code, head.content) == (200, b"")


async def test_types(http: httpx.AsyncClient) -> None:
    for path, type_ in (("/dashboard", "text/html"), ("/dashboard/main.js", "text/javascript")):
        assert (await http.get(path)).headers["content-type"] == f"{type_}; charset=utf-8"
    assert (await http.get("/dashboard/style.css")).headers["content-type"].startswith("text/css")
    assert (await http.get("/dashboard/icon.svg")).headers["content-type"] == "image/svg+xml"


async def test_what_a_browser_has_is_not_sent_again(http: httpx.AsyncClient) -> None:
    tag = (await http.get("/dashboard")).headers["etag"]
    again = await http.get("/dashboard", headers={"If-None-Match": tag})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert "content-security-policy" in again.headers
    assert (await http.get("/dashboard", headers={"If-None-Match": '"other"'})).status_code == 200


@pytest.mark.parametrize("name", ["index.html", "nothing.js", "routes.py", "__init__.py", "%2e%2e"])
async def test_nothing_else_is_served(http: httpx.AsyncClient, name: str) -> None:
    assert (await http.get(f"/dashboard/{name}")).status_code in (404, 503)


async def test_the_page_needs_no_key_and_its_data_does() -> None:
    async with client(AccessRules(("api",), loopback=False, admin_key="admin")) as http:
        assert (await http.get("/dashboard")).status_code == 200
        assert (await http.get("/dashboard/main.js")).status_code == 200
        for path in ("/placement", "/recoveries", "/totals", "/events"):
            assert (await http.get(path)).status_code == 401
            assert (await http.get(path, headers={"Authorization": "Bearer api"})).status_code == 200
        assert (await http.post("/dashboard", json={})).status_code == 405


async def test_it_is_small(http: httpx.AsyncClient) -> None:
    sizes = [len((await http.get(f"/dashboard/{name}")).content) for name in NAMES if name != "index.html"]
    assert sum(sizes) + len((await http.get("/dashboard")).content) < 100_000, "the bar is 200 kB with the data"


def test_every_file_is_asked_for(page: Page) -> None:
    named = {node.attributes.get("href") or node.attributes.get("src") or "" for node in page.all("link", "script")}
    assert {f"dashboard/{name}" for name in NAMES} - {"dashboard/index.html"} == named


def test_nothing_is_inline_or_from_elsewhere(page: Page) -> None:
    for node in page.nodes:
        assert "style" not in node.attributes, node
        assert not [name for name in node.attributes if name.startswith("on")], node
    assert not page.all("style")
    assert [node.text for node in page.all("script")] == [""]
    for name in NAMES:
        text = (STATIC / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|@import|//cdn", text), name


@pytest.mark.parametrize("name", SCRIPTS)
def test_text_never_becomes_markup_or_code(name: str) -> None:
    text = (STATIC / name).read_text(encoding="utf-8")
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function|Storage\b|cookie", text
    )


def test_ids(page: Page) -> None:
    ids = [node.attributes["id"] for node in page.nodes if "id" in node.attributes]
    assert [name for name, times in Counter(ids).items() if times > 1] == []
    for node in page.nodes:
        for name in REFERENCES:
            assert set((node.attributes.get(name) or "").split()) <= set(ids), node
        if (target := node.attributes.get("href") or "").startswith("#"):
            assert target[1:] in ids, node
    asked = {found for name in SCRIPTS for found in re.findall(r'byId\("([\w-]+)"\)', (STATIC / name).read_text())}
    assert asked <= set(ids)
    assert len(asked) > 20


def test_shapes_exist(page: Page) -> None:
    shapes = {node.attributes["id"] for node in page.all("symbol")}
    tiles, advice = ((STATIC / name).read_text() for name in ("tiles.js", "advice.js"))
    used = re.findall(r': \["([a-z]+)", "(?:good|warn|bad|quiet)"\]', tiles)
    used += re.findall(r': \["[\w ]+", "([a-z]+)", "[a-z]+"\]', advice)
    assert len(used) > 12 and {f"i-{shape}" for shape in used} <= shapes


def test_everything_has_a_name(page: Page) -> None:
    labelled = {node.attributes["for"] for node in page.all("label")}
    assert all(node.attributes["id"] in labelled for node in page.all("input"))
    for node in page.all("button"):
        assert node.text.strip() or node.attributes["id"] == "confirm-yes", "that one is named when it is shown"
        assert node.attributes["type"] in ("button", "submit")
    for node in page.all("dialog", "section", "canvas"):
        assert node.attributes.get("aria-label") or node.attributes.get("aria-labelledby"), node
    for node in page.all("svg"):
        assert node.attributes.get("aria-hidden") == "true"


def test_structure(page: Page) -> None:
    (html,) = page.all("html")
    assert (html.attributes["lang"], PAGE[:15].lower()) == ("en", "<!doctype html>")
    assert len(page.all("main")) == len(page.all("h1")) == len(page.all("title")) == 1
    (viewport,) = [node for node in page.all("meta") if node.attributes.get("name") == "viewport"]
    assert viewport.attributes["content"] == "width=device-width, initial-scale=1", "it may be zoomed"
    assert page.all("a")[0].attributes["href"] == "#ranks-title", "the keyboard need not pass the head each time"
    for node in page.all("input"):
        if node.attributes["type"] == "password":
            assert node.attributes["autocomplete"] == "off"


def test_every_state_has_a_shape() -> None:
    from elastic_daemon.membership import RankState, Status

    tiles, advice = ((STATIC / name).read_text() for name in ("tiles.js", "advice.js"))
    assert all(re.search(rf"^  {state.value}: \[", tiles, re.M) for state in RankState)
    assert all(re.search(rf"^  {status.value}: \[", advice, re.M) for status in Status)


def test_style_minds_what_people_prefer() -> None:
    style = (STATIC / "style.css").read_text()
    for words in ("prefers-color-scheme: dark", "prefers-reduced-motion: reduce", ":focus-visible", "forced-colors"):
        assert words in style
    light, dark = re.findall(r":root \{(.*?)\}", style, re.S)
    names = re.findall(r"(--[\w-]+):", light)
    assert set(names) - set(re.findall(r"(--[\w-]+):", dark)) == {"--mono"}


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast(scheme: int) -> None:
    """WCAG AA: 4.5 to 1 for text, on every ground that it stands on."""
    found = re.findall(r":root \{(.*?)\}", (STATIC / "style.css").read_text(), re.S)[scheme]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", found))
    pairs = [(text, ground) for text in ("text", "quiet", "good", "warn", "bad") for ground in ("paper", "card")]
    pairs += [(text, f"{text}-wash") for text in ("warn", "bad")]
    pairs += [(text, f"{tone}-wash") for text in ("text", "quiet") for tone in ("warn", "bad")]
    for text, ground in pairs:
        light, dark = sorted((_luminance(colours[text]), _luminance(colours[ground])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)
