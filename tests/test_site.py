"""The built site in a real browser: pages load by themselves, show what they say and fit the screen.

Needs Chromium: on the PATH, or named in MOMENTKV_CHROMIUM. Without it these tests are skipped, or fail where
MOMENTKV_REQUIRE_CHROMIUM is set.
"""

from __future__ import annotations

import contextlib
import functools
import html.parser
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

pytestmark = pytest.mark.xdist_group("site")  # built once

ROOT = Path(__file__).parents[1]
CHROMIUM = os.environ.get("MOMENTKV_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
REQUIRED = bool(os.environ.get("MOMENTKV_REQUIRE_CHROMIUM"))
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]  # fmt: skip
# In milliseconds: much more than a busy machine needs, for what never comes.
PATIENCE = 600_000
DESKTOP, PHONE = {"width": 1400, "height": 1000}, {"width": 390, "height": 844}
# What mathematics that was not rendered looks like to a reader.
RAW_TEX = re.compile(r"\\\(|\\\[|\$|\\(?:frac|mathrm|sum|lVert|hat|mu|log|exp)\b|:math:")
MEANT_FOR_READERS = """() => {
  const copy = document.querySelector("article").cloneNode(true);
  copy.querySelectorAll("pre, script, style").forEach((x) => x.remove());
  copy.querySelectorAll("code").forEach((x) => (x.textContent = ""));
  return copy.textContent;
}"""
FLAT = """() => [...document.querySelectorAll("math, mover > mo")].filter((x) => {
  const box = x.getBoundingClientRect();
  return x.localName === "math" ? box.width < 2 || box.height < 5 : !box.width;
}).length"""
WIDE = """() => [...document.querySelectorAll("body *")].filter((x) => {
  if (x.getBoundingClientRect().right <= window.innerWidth + 1) return false;
  for (let y = x.parentElement; y && y !== document.body; y = y.parentElement)
    if (getComputedStyle(y).overflowX !== "visible") return false;
  return getComputedStyle(x).position !== "fixed";
}).map((x) => x.tagName + "." + x.className).slice(0, 5)"""
# Formulas, code and tables that do not fit: hidden above or below, or at the side. What can be scrolled sideways, and
# shows a shadow where there is more, is let pass where that is allowed.
CLIPPED = """(scrolling) => [...document.querySelectorAll("article :is(.math, pre > code, pre span[id], table)")]
  .filter((x) => {
    if (x.matches("div.math, pre > code") && x.scrollHeight > x.clientHeight + 1) return true;
    const box = x.getBoundingClientRect(), page = document.querySelector("article").getBoundingClientRect();
    const edge = scrolling ? window.innerWidth : page.right;
    if (x.scrollWidth <= Math.max(x.clientWidth, box.width) + 1 && box.right <= edge + 1) return false;
    const scrolled = x.closest(".md-typeset__scrollwrap, div.math, span.math.wide, .language-text pre > code");
    const style = scrolled && getComputedStyle(scrolled);
    return !scrolling || !scrolled || style.overflowX !== "auto" || !style.backgroundImage.includes("gradient");
  }).map((x) => `${x.tagName} ${x.textContent.trim().slice(0, 60)}`)"""
BROKEN_IMAGES = """() => [...document.images].filter((x) => x.loading !== "lazy" && !x.naturalWidth || !x.alt)
  .map((x) => x.src)"""


# Where the site says that it is published.
PUBLISHED = "https://docs.example.org/"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files, which the browser may keep, and says nothing."""

    protocol_version = "HTTP/1.1"

    def end_headers(self):
        self.send_header("Cache-Control", "max-age=3600")
        super().end_headers()

    def log_message(self, *_):
        pass


class Elements(html.parser.HTMLParser):
    """Where a page leads, and the ids of its elements."""

    def __init__(self):
        super().__init__()
        self.targets: set[str] = set()
        self.ids: set[str] = set()

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.targets.add(value)
            elif name == "id" and value:
                self.ids.add(value)


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; connections that a browser leaves are nothing to tell."""

    def handle_error(self, *_):
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*_)


class Site:
    """The built site, served on this machine, and its pages."""

    def __init__(self, folder: Path, address: str):
        self.folder, self.address = folder, address
        self.pages = sorted(page.relative_to(folder).parent.as_posix() for page in folder.rglob("index.html"))

    def url(self, page: str) -> str:
        return self.address if page == "." else f"{self.address}{page}/"

    def file(self, path: str) -> Path:
        """The file that the server sends for the path of an address."""
        file = self.folder / unquote(path).lstrip("/")
        return file / "index.html" if file.is_dir() else file

    @functools.cache  # noqa: B019  a site lives as long as the tests
    def parse(self, file: Path) -> Elements:
        elements = Elements()
        elements.feed((file / "index.html" if file.is_dir() else file).read_text(encoding="utf-8"))
        return elements


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"MOMENTKV_SITE": PUBLISHED}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stderr
    with served(folder) as address:
        yield Site(folder, address)


@contextlib.contextmanager
def served(folder):
    """The address of a folder's files."""
    server = Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def quick_site(site, tmp_path_factory):
    """The same with one entry in the index of the search, of which every page that is shown makes a table."""
    folder = tmp_path_factory.mktemp("quick") / "site"
    shutil.copytree(site.folder, folder)
    file = folder / "search" / "search_index.json"
    index = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(index | {"docs": index["docs"][:1]}), encoding="utf-8")
    with served(folder) as address:
        yield Site(folder, address)


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        message = "no Chromium on the PATH and none in MOMENTKV_CHROMIUM"
        (pytest.fail if REQUIRED else pytest.skip)(message)
    if REQUIRED:
        import playwright.sync_api as api
    else:
        api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=PATIENCE)
        yield chromium
        chromium.close()


@contextlib.contextmanager
def new_tab(browser, **options):
    with browser.new_context(**options) as context:
        context.set_default_timeout(PATIENCE)
        yield context.new_page()


@contextlib.contextmanager
def opened(browser, site, *pages: str, size=DESKTOP, scheme="light", **options):
    """A tab with the page, or a function that makes one. It asks nobody else for anything and has no complaints."""
    complaints: list[str] = []

    def requested(request):
        if not request.url.startswith((site.address, "data:", "blob:")):
            complaints.append(f"{tab.url}: request to {request.url}")

    def answered(response):
        if response.status >= 400:
            complaints.append(f"{tab.url}: {response.status} for {response.url}")

    def logged(line):
        if line.type in ("error", "warning"):
            complaints.append(f"{tab.url}: {line.text}")

    def show(page):
        tab.goto(site.url(page), wait_until="load")
        return tab

    with new_tab(browser, viewport=size, color_scheme=scheme, **options) as tab:
        tab.on("request", requested)
        tab.on("response", answered)
        tab.on("console", logged)
        tab.on("pageerror", lambda error: complaints.append(f"{tab.url}: {error}"))
        yield show(*pages) if pages else show
    assert not complaints


def test_every_page_loads_by_itself_and_fits_a_phone_in_the_dark(browser, quick_site):
    assert len(quick_site.pages) > 40
    with opened(browser, quick_site) as show:
        for page in quick_site.pages:
            tab = show(page)
            text = tab.evaluate(MEANT_FOR_READERS)
            found = RAW_TEX.search(text)
            assert not found, f"{page} shows raw TeX: {found[0]}"
            assert "[][" not in text, f"{page} has a reference that leads nowhere"
            assert tab.evaluate(FLAT) == 0, f"{page} has mathematics that is not rendered"
            assert tab.evaluate(BROKEN_IMAGES) == [], f"{page} has a picture that is broken or has no text"
            assert tab.evaluate("document.querySelectorAll('article h1').length") == 1, f"{page} needs one title"
            assert tab.evaluate("document.documentElement.scrollWidth") <= DESKTOP["width"], f"{page} is too wide"
            assert tab.evaluate(CLIPPED, False) == [], f"{page} has something that is clipped"
            assert tab.evaluate("document.body.dataset.mdColorScheme") == "default"
            # The same page turned into a phone's: loading it takes longer than all of this.
            tab.evaluate("() => { document.body.dataset.mdColorScheme = 'slate'; }")
            tab.set_viewport_size(PHONE)
            width, wide = tab.evaluate("document.documentElement.scrollWidth"), tab.evaluate(WIDE)
            assert width <= PHONE["width"], f"{page} is {width} wide on a phone: {wide}"
            assert tab.evaluate(CLIPPED, True) == [], f"{page} has something clipped that nobody can scroll to"
            tab.goto("about:blank")  # a page without anything to be laid out anew
            tab.set_viewport_size(DESKTOP)


def test_a_reader_who_prefers_the_dark_gets_it(browser, site):
    with opened(browser, site, ".", size=PHONE, scheme="dark") as tab:
        assert tab.evaluate("document.body.dataset.mdColorScheme") == "slate"
        assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_every_internal_link_leads_to_a_page_and_an_element(site):
    checked = 0
    for page in site.pages:
        for link in {urljoin(site.url(page), target) for target in site.parse(site.file(page)).targets}:
            parts = urlsplit(link)
            if not link.startswith(site.address):
                assert parts.scheme in ("https", "mailto", "data"), f"{page} links to {link}"
                continue
            file, anchor = site.file(parts.path), unquote(parts.fragment)
            if file.suffix == ".svg" and anchor in ("only-light", "only-dark"):
                anchor = ""
            assert file.is_file(), f"{page} links to {link}, which does not exist"
            assert not anchor or anchor in site.parse(file).ids, f"{page} links to {link}, which has no such element"
            checked += 1
    assert checked > 1000


def test_formulas_are_laid_out_with_the_font_of_the_site(browser, site):
    with opened(browser, site, "derivations/correction") as tab:
        tab.evaluate("document.fonts.ready.then(() => true)")
        assert tab.evaluate("document.fonts.check('16px \"STIX Two Math\"')")
        loaded = "[...document.fonts].filter((x) => x.family.includes('STIX') && x.status === 'loaded').length"
        assert tab.evaluate(loaded) == 1
        # A fraction stands over its denominator, and the sum of a displayed formula is larger than its letters.
        stacked = """() => [...document.querySelectorAll("mfrac")].every((x) =>
          x.children[0].getBoundingClientRect().bottom <= x.children[1].getBoundingClientRect().top + 1)"""
        assert tab.evaluate(stacked)
        larger = """() => {
          const sum = [...document.querySelectorAll("div.math mo")].find((x) => x.textContent === "∑");
          return sum.getBoundingClientRect().height / parseFloat(getComputedStyle(sum).fontSize);
        }"""
        assert tab.evaluate(larger) > 1.2


@pytest.mark.parametrize(
    ("words", "page"),
    [
        ("anchor", "derivations/summaries"),
        ("quantization", "cache"),
        ("install", "install"),
        ("Llama", "support"),
        ("FAQ", "faq"),
    ],
)
def test_search_finds(browser, site, words, page):
    with opened(browser, site, ".") as tab:
        # The search listens to keys that are let go, so the word is typed: a value that is only set may go unseen.
        search = tab.locator("input.md-search__input")
        search.focus()
        search.press_sequentially(words)
        tab.locator(".md-search-result__meta", has_text="matching").wait_for()
        tab.locator(f".md-search-result__item a[href*='{page}/']").first.wait_for(state="attached")
        found = tab.locator(".md-search-result__item > a").evaluate_all("x => x.map((y) => y.href)")
        assert any(f"/{page}/" in address for address in found[:3]), found[:3]


def test_every_page_is_in_the_sitemap(site):
    sitemap = (site.folder / "sitemap.xml").read_text(encoding="utf-8")
    assert set(re.findall("<loc>(.*?)</loc>", sitemap)) == {
        PUBLISHED if page == "." else f"{PUBLISHED}{page}/" for page in site.pages
    }


def test_a_page_that_does_not_exist_leads_to_those_that_do(site):
    links = site.parse(site.folder / "404.html").targets
    assert {"/install/", "/guide/", "/measured/", "/derivations/", "/reference/"} <= links


def test_every_tab_has_a_page_of_its_own_that_leads_to_the_others(browser, site):
    with opened(browser, site, ".") as tab:
        tabs = tab.locator(".md-tabs__link").evaluate_all("x => x.map((y) => [y.textContent.trim(), y.href])")
    assert [name for name, _ in tabs] == ["Start", "Guide", "Results", "Theory", "Reference"]
    for name, address in tabs:
        with opened(browser, site) as show:
            page = show(address.removeprefix(site.address).strip("/") or ".")
            assert page.locator("article a[href]").count() > 8, name


def test_copied_code_has_no_prompts(browser, site):
    with opened(browser, site, "reference/attention") as tab:
        code = tab.locator("pre > code", has_text=">>>").first
        copied = code.evaluate("x => { x.setAttribute('data-md-copying', ''); return x.innerText; }")
        assert ">>>" in code.text_content()
        assert ">>>" not in copied
        assert "import numpy as np" in copied


def test_a_reader_can_turn_the_light_off(browser, site):
    with opened(browser, site, ".") as tab:
        tab.locator("label[title='Switch to dark mode']").click()
        tab.wait_for_function("document.body.dataset.mdColorScheme === 'slate'")


def errors(tab) -> dict[str, float]:
    """Errors in percent that the figure shows, by output."""
    rows = tab.locator("[data-output]")
    shown = {}
    for index in range(rows.count()):
        row = rows.nth(index)
        shown[row.get_attribute("data-output")] = float(row.locator(".explore-error").inner_text().removesuffix(" %"))
    return shown


def drawing(tab) -> str:
    return tab.locator("#explore svg").inner_html()


def test_the_figure_reacts_to_keys_and_shows_what_the_data_say(browser, site):
    data = json.loads((ROOT / "docs" / "data" / "heads.json").read_text(encoding="utf-8"))
    with opened(browser, site, "explore") as tab:
        tab.locator("#explore [name=budget]:enabled").wait_for()
        first, drawn = errors(tab), drawing(tab)
        assert first["summaries"] < first["order 1"] <= first["plain"]
        tab.locator("#explore [name=budget]").focus()
        tab.keyboard.press("End")
        last = errors(tab)
        assert last["plain"] < first["plain"]
        assert last["summaries"] < last["plain"]
        assert drawing(tab) != drawn
        assert "1024 of 2,048" in tab.locator(".explore-status").inner_text()
        assert tab.locator("[name=budget]").get_attribute("aria-valuetext") == "1024 of 2,048 tokens"
        tab.locator("#explore [name=query]").focus()
        tab.keyboard.press("Home")
        tab.locator("#explore [name=head]").select_option("1")
        points = data["heads"][1]["points"][-1]
        assert errors(tab) == pytest.approx(
            {"plain": 100 * points["plain"][0]}
            | {name: 100 * x["error"][0] for name, x in points["corrected"].items()},
            abs=0.0501,
        )
        assert "NaN" not in drawing(tab)


def test_the_figure_is_named_for_those_who_do_not_see_it(browser, site):
    with opened(browser, site, "explore") as tab:
        tab.locator("#explore [name=budget]:enabled").wait_for()
        for name in ("Head", "Budget", "Query"):
            assert tab.locator(f"#explore label:has-text('{name}')").locator("input, select").count() == 1
        assert tab.get_by_role("img", name="Outputs as arrows in a plane").count() == 1
        assert tab.get_by_role("slider").count() == 2
        assert "Error of plain eviction" in tab.get_by_role("status").inner_text()


def test_the_figure_does_not_move_for_those_who_want_rest(browser, site):
    moving = "bar => getComputedStyle(bar).transitionDuration"
    with opened(browser, site, "explore", reduced_motion="reduce") as tab:
        assert tab.locator(".explore-bar").first.evaluate(moving) == "0s"
    with opened(browser, site, "explore", reduced_motion="no-preference") as tab:
        assert tab.locator(".explore-bar").first.evaluate(moving) != "0s"


def test_the_figure_says_why_it_is_missing(browser, site):
    with opened(browser, site, "explore", java_script_enabled=False) as tab:
        assert "needs JavaScript" in tab.locator("#explore").inner_text()
    with new_tab(browser) as tab:
        tab.route("**/heads.json", lambda route: route.fulfill(status=404))
        tab.goto(site.url("explore"))
        tab.get_by_text("could not be drawn (404").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser, site, scheme):
    contrast = """() => {
      const parse = (colour) => { const c = document.createElement("canvas").getContext("2d");
        c.fillStyle = colour; c.fillRect(0, 0, 1, 1); return [...c.getImageData(0, 0, 1, 1).data]; };
      const light = (rgb) => rgb.slice(0, 3).map((x) => x / 255)
        .map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
        .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
      const over = (top, below) => top.map((x, i) => x * top[3] / 255 + below[i] * (1 - top[3] / 255)).slice(0, 3);
      const ground = parse(getComputedStyle(document.body).backgroundColor);
      return ["article p", "article h2", "article p > a", "article math"].map((query) => {
        const shown = document.querySelector(query);
        const [a, b] = [over(parse(getComputedStyle(shown).color), ground), ground].map(light);
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      });
    }"""
    with opened(browser, site, ".", scheme=scheme) as tab:
        assert min(tab.evaluate(contrast)) > 4.5
