"""The scripts in examples/ run as they are and show what they say."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from models import save_with_bytes

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    """What the script prints, in a process of its own."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def run_alone(monkeypatch, capsys):
    """The same in this process, which has imported everything already."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def run_here(builtin, run_alone):
    """And which has loaded the built-in model already."""
    return run_alone


def test_arrays_shows_that_each_order_lowers_the_error():
    errors = [float(x) for x in re.findall(r"relative error ([\d.]+)", run("arrays.py"))]
    plain, zero, one = errors
    assert one < zero < plain


GENERATE = ("generate.py", "--tokens", "400", "--budget", "128", "--new-tokens", "4")


@pytest.mark.model
def test_generate_stays_within_its_budget(run_here):
    check_generated(run_here(*GENERATE))


def test_generate_takes_a_model_of_yours(tmp_path, run_alone):
    check_generated(run_alone(*GENERATE, "--model", save_with_bytes(tmp_path)))


def check_generated(out: str) -> None:
    seen, used, full = re.search(r"(\d+) tokens seen, cache ([\d.]+) MiB of ([\d.]+) MiB", out).groups()
    assert int(seen) == 403
    # 403 tokens against fewer than 128 + 32, moments and all.
    assert float(used) < float(full) * 220 / 403


@pytest.mark.model
def test_document_is_compressed_once_and_asked_often(run_here):
    small = ("--tokens", "200", "--budget", "64", "--new-tokens", "1")
    out = run_here("document.py", *small, "--question", "What is a loop?", "What is a class?")
    assert out.count("  full  :") == out.count("  moment:") == 2
    full, used = (float(x) for x in re.search(r"cache, MiB +([\d.]+) +([\d.]+)", out).groups())
    # 200 tokens against 64 and a block of 32, and summaries that cost as much as 16 of float32.
    assert used < full * 115 / 200
    held = float(re.search(r"file, MiB +([\d.]+)", out).group(1))
    assert used <= held < used + 0.5


@pytest.mark.model
def test_tradeoff_tries_every_correction(run_here):
    small = ("--context", "300", "--following", "16", "--texts", "types", "--budget", "64")
    out = run_here("summaries_tradeoff.py", *small)
    assert all(name in out for name in ("plain eviction", "one, compact", "12, rank 2", "24, rank 4"))


@pytest.mark.model
def test_shares_read_again_stand_beside_one_reading(run_here):
    small = ("--context", "300", "--following", "16", "--texts", "types", "--needles", "300", "--depths", "0.5")
    out = run_here("share_read_again.py", *small, "--shares", "0.5")
    once, half = re.findall(r"(once|twice, 50%).*?([\d.]+) +│ +([\d.]+) +│ +([01]\.\d+) +│$", out, re.MULTILINE)
    assert once[0] == "once"
    assert half[0] == "twice, 50%"
    assert once[1] == "1.00"


# Of kvpress_peers.py only what needs no environment is run: it installs kvpress and an older transformers from a
# package index, and measures for many minutes.
def test_kvpress_peers_shows_its_help():
    assert "--budgets" in run("kvpress_peers.py", "--help")


@pytest.mark.parametrize("budget", ["0", "4096"])
def test_kvpress_peers_refuses_a_budget_that_compresses_nothing_or_all(budget):
    with pytest.raises(subprocess.CalledProcessError) as error:
        run("kvpress_peers.py", "--budgets", budget)
    assert f"budget is {budget}" in error.value.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("quantized_peers.py", ("--texts", "nope"), "text is 'nope', which is neither a file, nor a topic"),
        ("quantized_peers.py", ("--context", "159"), "context is 159, but KIVI's layout begins with 32 tokens before"),
        ("quantized_peers.py", ("--output", "/proc/x"), "output is '/proc/x', which cannot be written"),
        ("document.py", ("--cache", "/nope/x"), "cache is '/nope/x', whose folder does not exist; make it, or name"),
    ],
)
def test_examples_refuse_by_name_before_they_load_a_model(
    name: str, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("momentkv.evaluation.sources.load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit, match=message) as caught:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert str(caught.value.code).startswith(f"{name}: ")


@pytest.mark.parametrize("budget", ["8", "41"])
def test_quantized_peers_says_the_smallest_budget_before_it_measures(budget: str, tmp_path, monkeypatch):
    given = ["--model", save_with_bytes(tmp_path), "--texts", "import", "--context", "300", "--budgets", budget]
    monkeypatch.setattr("momentkv.evaluation.capture.CaptureCache", lambda *_: pytest.fail("something was measured"))
    monkeypatch.setattr(sys, "argv", ["quantized_peers.py", *given, "--output", str(tmp_path / "x.json")])
    with pytest.raises(SystemExit, match=rf"budgets has {budget}, but 34 tokens of default@6 .* use at least 42$"):
        runpy.run_path(str(EXAMPLES / "quantized_peers.py"), run_name="__main__")


@pytest.mark.parametrize("backend", [None, "hqq"])
def test_quantized_peers_measures_each_layout_beside_our_own(tmp_path, run_alone, backend):
    if backend is not None:
        pytest.importorskip(backend)
    output = tmp_path / "peers.json"
    small = ["--texts", "import", "--context", "300", "--following", "8", "--budgets", "128", "--methods", "default@4"]
    small += [] if backend is None else ["--backends", backend]
    run_alone("quantized_peers.py", "--model", save_with_bytes(tmp_path / "model"), *small, "--output", str(output))
    rows = json.loads(output.read_text())["import"]
    names = {name.rpartition(", ")[0] for name in rows}
    layouts = {f"{name}, {bits} bits" for bits in (2, 4) for name in ("default in KIVI's layout", "KIVI")}
    assert {name.removesuffix(", all tokens") for name in names} >= layouts | {"default@4"}
    assert any(name.startswith("QuantizedCache") for name in names) == (backend is not None)
    kl = {name.rpartition(", ")[0]: row["kl"] for name, row in rows.items()}
    assert kl["KIVI, 4 bits, all tokens"] < kl["KIVI, 2 bits, all tokens"]
    # 160 of 300 tokens in codes of 2 bits, a scale and an offset for each 32 numbers of them, and 140 as they came.
    (size,) = [row["tokens"] for name, row in rows.items() if name.startswith("KIVI, 2 bits")]
    assert size == 140 + 160 * (2 * 16 * 2 / 8 + 4 * 16 / 32 + 4) / (4 * 16)
