"""What is published is whole: the sdist has all that tests need, the wheel installs and runs."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import momentkv

pytestmark = pytest.mark.xdist_group("packages")  # built once

ROOT = Path(__file__).parents[1]
# Only for the repository itself.
NOT_PUBLISHED = (".git", ".github")
FOLDERS = ("momentkv", "tests", "docs", "examples", ".ci")


# What releasing.md says to set; whether they are set elsewhere changes nothing here.
ADDRESSES = {"MOMENTKV_SITE": "https://docs.example.org/", "MOMENTKV_SOURCE": "https://code.example.org/momentkv"}


def run(*command: str | Path, folder: Path, path: Path | None = None) -> str:
    """Output of a Python command; imports come from ``path`` and the environment, not from the repository."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | ADDRESSES
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel built from it."""
    output = tmp_path_factory.mktemp("dist")
    # Without isolation: the backend is among the development dependencies, and nothing is fetched.
    run("-m", "build", "--no-isolation", "--outdir", output, ROOT, folder=output)
    return output


def files_of(folder: str) -> set[str]:
    """Files of the repository that belong to a folder's sources."""
    found = {path for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


def test_the_sdist_holds_what_tests_and_pages_need(built: Path):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert path.name == f"momentkv-{momentkv.__version__}.tar.gz"
    for folder in FOLDERS:
        assert files_of(folder) <= names, folder
    single = {
        path.name
        for path in ROOT.iterdir()
        if path.is_file() and path.name not in NOT_PUBLISHED and not path.name.startswith(".")
    }
    assert single <= names
    assert not any(name.startswith(NOT_PUBLISHED) and name != ".gitignore" for name in names)


def test_the_wheel_holds_the_package_alone(built: Path):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
    code = {name for name in names if ".dist-info/" not in name}
    assert code == files_of("momentkv")
    assert "momentkv/py.typed" in code
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_descriptions_render_and_metadata_is_valid(built: Path):
    assert run("-m", "twine", "check", "--strict", *sorted(built.iterdir()), folder=built).count("PASSED") == 2


def test_what_pypi_shows_leads_to_the_site_and_the_source(built: Path):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(wheel.read(name))
    urls = dict(entry.split(", ") for entry in metadata.get_all("Project-URL"))
    site, source = ADDRESSES.values()
    assert urls == {
        "Paper": "https://arxiv.org/abs/2606.01563",
        "Documentation": site,
        "Source": source,
        "Changelog": f"{site}changelog/",
    }
    shown = metadata.get_payload()
    links = re.findall(r'\]\(([^)\s]+)\)|(?:src|srcset)="([^"]+)"', shown)
    targets = {target or picture for target, picture in links if not target.startswith("#")}
    assert len(targets) > 15
    for target in targets:
        assert target.startswith("https://"), target
        if target.startswith(site):
            path, _, _ = target.removeprefix(site).partition("#")
            page = ROOT / "docs" / path
            assert page.is_file() or page.with_suffix(".md").is_file() or (page / "index.md").is_file(), target
    assert f"{site}held-out/#held-out" in targets
    assert f"{source}/blob/HEAD/CONTRIBUTING.md" in targets


def test_the_wheel_installs_and_its_command_runs(built: Path, tmp_path: Path):
    (path,) = built.glob("*.whl")
    target = tmp_path / "installed"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--target", str(target)]
    run("-m", "pip", "install", *options, path, folder=tmp_path)
    where = run("-c", "import momentkv; print(momentkv.__file__)", folder=tmp_path, path=target)
    assert Path(where.strip()).is_relative_to(target)
    assert run("-m", "momentkv", "--version", folder=tmp_path, path=target) == f"momentkv {momentkv.__version__}\n"
    plan = ["plan", "llama-3.1-8b", "--context", "32000", "--budget", "512"]
    assert "MiB" in run("-m", "momentkv", *plan, folder=tmp_path, path=target)


def test_tests_run_from_the_unpacked_sdist(built: Path, tmp_path: Path):
    (path,) = built.glob("*.tar.gz")
    shutil.unpack_archive(path, tmp_path)
    (folder,) = tmp_path.iterdir()
    quick = ["tests/test_attention.py", "tests/test_docs.py::test_relative_links_lead_to_a_file_and_a_heading"]
    assert " passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", *quick, folder=folder, path=folder)


def test_the_version_is_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", momentkv.__version__)
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]
    assert f"version = {{{momentkv.__version__}}}" in (ROOT / "docs" / "cite.md").read_text()


def test_the_citation_file_is_valid():
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert content["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license"} <= content.keys()
    paper = content["preferred-citation"]
    assert {"type", "title", "authors", "year", "url"} <= paper.keys()
    # BibTeX reads a line break as a blank.
    cited = " ".join((ROOT / "docs" / "cite.md").read_text().replace("{", "").replace("}", "").split())
    assert paper["title"] in cited
    assert paper["url"] in cited
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert " and ".join(names) in cited


FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


@pytest.mark.skipif(not FORMS, reason="not in the sdist")
def test_issue_forms_are_valid():
    for form in FORMS:
        content = yaml.safe_load(form.read_text())
        if form.name == "config.yml":
            continue
        assert {"name", "description", "body"} <= content.keys(), form.name
        for field in content["body"]:
            assert field["type"] in {"markdown", "textarea", "checkboxes", "input", "dropdown"}, form.name
            assert field["type"] == "markdown" or {"id", "attributes"} <= field.keys(), form.name
