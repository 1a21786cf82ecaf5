"""The pages run, and their links lead somewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import pydoc
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))])
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
CROSS_REFERENCE = re.compile(r"\[[^\]]+\]\[(?P<target>[\w.-]+)\]")
HEADING = re.compile(r"^#{1,6} +(?P<title>.+?)(?: *\{ *#(?P<id>[\w-]+) *\})? *$", re.MULTILINE)

REASON = re.compile(r"<!-- not run: (.+?) -->\s*\Z")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


class Block(NamedTuple):
    """A Python block of a page.

    Attributes
    ----------
    code : str
        On its own lines of the page.
    runs : bool
        False for a block marked ``notest``.
    reason : str or None
        The comment before it, ``<!-- not run: REASON -->``, without the frame.
    output : str or None
        The block marked ``output`` after it, which shows what it prints.
    """

    code: str
    runs: bool
    reason: str | None
    output: str | None


def code_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    blocks: list[Block] = []
    for fence in FENCE.finditer(text):
        info = re.findall(r"\w+", fence["info"])
        if info[:1] == ["python"]:
            code = "\n" * (text[: fence.start()].count("\n") + 1) + fence["code"]
            reason = REASON.search(text[: fence.start()])
            blocks.append(Block(code, "notest" not in info, reason and reason[1], None))
        elif "output" in info:
            assert blocks, f"{page.name} shows output before any code"
            assert blocks[-1].output is None, f"{page.name} shows the output of one block twice"
            blocks[-1] = blocks[-1]._replace(output=fence["code"])
    return blocks


def agrees(shown: str, printed: str) -> bool:
    """Whether words and whole numbers are the same, and decimal fractions and percentages but for their last digit."""
    pattern = re.compile(r"[-+]?\d+\.\d+|\d+(?=%)")
    if pattern.sub("#", shown).split() != pattern.sub("#", printed).split():
        return False
    pairs = zip(pattern.findall(shown), pattern.findall(printed), strict=True)
    return all(abs(float(a) - float(b)) < 1.01 * 10.0 ** -len(a.partition(".")[2]) for a, b in pairs)


def needs_model(page: Path) -> bool:
    return any("load_model()" in block.code for block in code_blocks(page) if block.runs)


def marked(page: Path):
    """The page as a test case, marked where it runs the real model."""
    return pytest.param(page, marks=pytest.mark.model if needs_model(page) else ())


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "``", FENCE.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """Ids of a page's headings, given or made from the title."""
    headings = HEADING.finditer(FENCE.sub("", page.read_text()))
    return {
        heading["id"] or re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading["title"]).strip().lower())
        for heading in headings
    }


def load_hook(name: str):
    """A module of docs/hooks, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_hooks_{name}", DOCS / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_shown_output_is_compared_but_for_the_last_digit_of_a_fraction():
    assert agrees("a 1.25\nb 97%\n", "a  1.26\nb 96%")
    assert not agrees("1.25", "1.27")
    assert not agrees("12 tokens", "13 tokens")
    assert not agrees("found", "lost")
    assert not agrees("1.25", "-1.25")


@pytest.mark.parametrize("page", [marked(page) for page in PAGES], ids=name_of)
def test_python_blocks_run_and_print_what_the_page_shows(page, request):
    if needs_model(page):
        request.getfixturevalue("builtin")
    namespace = {"__name__": page.stem}
    for block in code_blocks(page):
        code = compile(block.code, str(page), "exec", dont_inherit=True)
        if not block.runs:
            assert block.reason, f"{page.name}: a block marked notest needs <!-- not run: REASON --> before it"
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, namespace)
        if block.output is not None:
            printed = printed.getvalue()
            assert agrees(block.output, printed), f"{page.name} shows\n{block.output}\nbut its code prints\n{printed}"


def test_every_tutorial_shows_output():
    tutorials = [page for page in PAGES if page.parent.name == "tutorials"]
    assert len(tutorials) == 8
    for page in tutorials:
        assert sum(block.output is not None for block in code_blocks(page)) >= 2, page.name


@pages
def test_relative_links_lead_to_a_file_and_a_heading(page):
    for link in LINK.finditer(prose(page)):
        path, _, anchor = link["target"].partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = (page.parent / path).resolve() if path else page
        if anchor in ("only-light", "only-dark"):  # a picture for pages of one colour
            anchor = ""
        assert target.exists(), f"{page.name} links to {link['target']}, but there is no such file"
        assert not anchor or anchor in anchors(target), (
            f"{page.name} links to {link['target']}, but it has no such heading"
        )


@pages
def test_cross_references_name_an_object(page):
    for reference in CROSS_REFERENCE.finditer(prose(page)):
        assert pydoc.locate(reference["target"]) is not None, f"{page.name} refers to {reference['target']}"


def test_readme_and_home_page_say_the_same_in_code_and_numbers():
    readme, home = (path.read_text(encoding="utf-8") for path in (ROOT / "README.md", DOCS / "index.md"))
    for start, end in (("from pydoc_data", "```"), ("| KL to the full cache", "\n\n")):
        first, second = (text[text.index(start) :].partition(end)[0] for text in (readme, home))
        assert first == second


def test_the_pages_have_code():
    assert sum(block.runs for page in PAGES for block in code_blocks(page)) >= 40


@pytest.mark.parametrize("tex", [r"\nosuchcommand{x}", "a & b", r"\frac{1}{"])
def test_a_formula_that_cannot_be_converted_stops_the_build(tex):
    errors = pytest.importorskip("mkdocs.exceptions")
    with pytest.raises(errors.PluginError, match="cannot convert"):
        load_hook("mathml").convert_page(f'<span class="arithmatex">\\({tex}\\)</span>', "page")


def test_options_in_code_stay_in_one_piece():
    keep_flags = load_hook("flags").keep_flags
    assert keep_flags("<code>a --new-b 4</code>, a--b") == '<code>a <span class="flag">--new-b</span> 4</code>, a--b'
    assert keep_flags("<code>-inf</code>") == '<code><span class="flag">-inf</span></code>'


def test_a_percentage_stays_in_one_piece():
    kept = load_hook("flags").keep_flags("of 14 %, <code>14 % 4</code>")
    assert kept == "of 14\N{NO-BREAK SPACE}%, <code>14 % 4</code>"


def test_punctuation_stays_with_its_formula():
    pytest.importorskip("mkdocs.exceptions")
    page = load_hook("mathml").convert_page('of <span class="arithmatex">\\(a\\)</span>, so', "page")
    assert page.endswith("</math>,</span> so")


def test_pages_and_theorems_in_docstrings_become_links():
    pytest.importorskip("griffe")
    to_markdown = load_hook("docstrings").to_markdown
    assert to_markdown("Of $a$; see docs/derivations/moments.md.") == "Of $a$; see [Moments][derivation-moments]."
    assert to_markdown("docs/derivations/summaries.md#anchor") == "[Anchored summaries][anchor]"
    assert to_markdown("Theorem B8': above B8.") == "[Theorem B8'][b8-prime]: above B8."
    with pytest.raises(pytest.importorskip("mkdocs.exceptions").PluginError, match="first line needs an id"):
        to_markdown("See docs/what-we-tried.md.")


def test_parameters_that_share_a_description_have_types_and_defaults_of_their_own():
    pytest.importorskip("griffe")
    start, end = "Sum.\n\nParameters\n----------\n", "\nNotes\n-----\nx, y\n    z"
    docstring = f"{start}a, b\n    As there.\nc, d : int\n    Two.\n{end}"
    entries = "a\n    As there.\nb\n    As there.\nc : int\n    Two.\nd : int\n    Two.\n"
    assert load_hook("docstrings").to_markdown(docstring) == f"{start}{entries}{end}"


def test_what_is_wrongly_parted_stops_the_build():
    errors = pytest.importorskip("mkdocs.exceptions")
    with pytest.raises(errors.PluginError, match="cannot convert"):
        load_hook("mathml").convert_page(r'<div class="arithmatex">\[\left( a \qquad b \right)\]</div>', "page")


def test_formulas_beside_each_other_may_stand_below_each_other():
    pytest.importorskip("mkdocs.exceptions")
    tex = r"a = b \qquad \sqrt{c \qquad d} \qquad c \in \{0, 1\}"
    page = load_hook("mathml").convert_page(f'<div class="arithmatex">\\[{tex}\\]</div>', "page")
    assert page.count("<math") == 3


def test_doctests_before_all_sections_become_code_blocks():
    pytest.importorskip("griffe")
    docstring = "Sum.\n\n>>> 1 + 1  # doctest: +SKIP\n2\n\nMore.\n\nExamples\n--------\n>>> 1\n1"
    fenced = "Sum.\n\n```pycon\n>>> 1 + 1\n2\n```\n\nMore.\n\nExamples\n--------\n>>> 1\n1"
    assert load_hook("docstrings").to_markdown(docstring) == fenced
