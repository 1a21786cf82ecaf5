"""The pages run, and their links lead somewhere."""

from __future__ import annotations

import importlib.util
import pydoc
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))])
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
CROSS_REFERENCE = re.compile(r"\[[^\]]+\]\[(?P<target>[\w.-]+)\]")
HEADING = re.compile(r"^#{1,6} +(?P<title>.+?)(?: *\{ *#(?P<id>[\w-]+) *\})? *$", re.MULTILINE)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def code_blocks(page: Path) -> list[str]:
    """Python blocks of a page, each on its own lines, save those marked ``notest`` (they need a download)."""
    text, blocks = page.read_text(), []
    for fence in FENCE.finditer(text):
        info = re.findall(r"\w+", fence["info"])
        if info[:1] == ["python"] and "notest" not in info:
            blocks.append("\n" * (text[: fence.start()].count("\n") + 1) + fence["code"])
    return blocks


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


@pages
def test_python_blocks_run(page):
    namespace = {"__name__": page.stem}
    for block in code_blocks(page):
        exec(compile(block, str(page), "exec"), namespace)


@pages
def test_relative_links_lead_to_a_file_and_a_heading(page):
    for link in LINK.finditer(prose(page)):
        path, _, anchor = link["target"].partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link['target']}, but there is no such file"
        assert not anchor or anchor in anchors(target), (
            f"{page.name} links to {link['target']}, but it has no such heading"
        )


@pages
def test_cross_references_name_an_object(page):
    for reference in CROSS_REFERENCE.finditer(prose(page)):
        assert pydoc.locate(reference["target"]) is not None, f"{page.name} refers to {reference['target']}"


def test_the_pages_have_code():
    assert sum(len(code_blocks(page)) for page in PAGES) >= 10


@pytest.mark.parametrize("tex", [r"\nosuchcommand{x}", r"\begin{aligned} a &= b \end{aligned}", r"\frac{1}{"])
def test_a_formula_that_cannot_be_converted_stops_the_build(tex):
    errors = pytest.importorskip("mkdocs.exceptions")
    with pytest.raises(errors.PluginError, match="cannot convert"):
        load_hook("mathml").convert_page(f'<span class="arithmatex">\\({tex}\\)</span>', "page")


def test_docstring_mathematics_becomes_markdown():
    pytest.importorskip("griffe")
    docstring = "Sum.\n\n.. math:: a = b, \\qquad\n          c = d\n\nOf :math:`a`; see docs/derivations/moments.md."
    assert load_hook("docstrings").to_markdown(docstring).split("\n") == [
        "Sum.", "", "", "$$", "a = b, \\qquad c = d", "$$", "", "Of $a$; see [Moments][derivation-moments].",
    ]  # fmt: skip


def test_doctests_before_all_sections_become_code_blocks():
    pytest.importorskip("griffe")
    docstring = "Sum.\n\n>>> 1 + 1  # doctest: +SKIP\n2\n\nMore.\n\nExamples\n--------\n>>> 1\n1"
    fenced = "Sum.\n\n```pycon\n>>> 1 + 1\n2\n```\n\nMore.\n\nExamples\n--------\n>>> 1\n1"
    assert load_hook("docstrings").to_markdown(docstring) == fenced
