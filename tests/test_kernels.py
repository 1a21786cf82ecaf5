"""The Triton kernels without a GPU: right in Triton's interpreter, and compiled without spilling registers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is there on Linux only")

from momentkv.backends.layout import Layout
from momentkv.backends.triton import report as kernels_report
from momentkv.backends.triton.builds import TARGETS, Build, Usage, compile_build
from momentkv.backends.triton.decode import SPLITS, decode_blocks, number_of_splits
from momentkv.backends.triton.reach import expansions, launches_of, reachable, tiers_of
from momentkv.backends.triton.report import few, sampled


def test_kernels_agree_with_the_oracle_in_the_interpreter():
    """In a process of its own: Triton chooses between compiler and interpreter when a kernel is defined."""
    file = Path(__file__).with_name("interpreted.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=file.parent.parent)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


@pytest.fixture(scope="module")
def builds() -> list[Build]:
    """Those that hold most, of head dimensions 128 and 256."""
    return few(list(reachable((torch.bfloat16, torch.float32), (128, 256))))


# The default, codes of unequal bits, and more summaries than go through at once.
HOLDING = [
    *(
        f"bf16, d {d}, {kind}"
        for d in (128, 256)
        for kind in ("summaries 12", "codes of 6 and 4/3 bits", "summaries 40")
    ),
    "fp32, d 256, summaries 40",
]


def widest(builds: list[Build], kind: str) -> Build:
    """Of those of a dtype, a head dimension and an estimate the one with most queries in a tile, packed."""
    dtype, dimension, of = kind.split(", ")
    tiles = f"decode, {dtype}, {dimension}, tile "
    alike = [x for x in builds if re.match(rf"{tiles}\d+ x \d+, {of},", x.name) and "packed" in x.name]
    return max(alike, key=lambda build: dict(build.constants)["BLOCK_M"])


def test_kernels_compile_without_spilling_registers_in_loops(builds: list[Build]):
    (merge,) = (build for build in builds if build.name == f"combine, bf16, d 256, up to {SPLITS} splits")
    for build in [merge, *(widest(builds, kind) for kind in HOLDING)]:
        # What fits at head dimension 256 decides for all; of 128 one target has to do.
        for target in TARGETS if "d 256" in build.name else (90,):
            usage = compile_build(build, target, loops=False)
            assert usage.fits(target), f"sm_{target}: {build.name}: {usage}"
            assert 0 < usage.registers <= 255


# Of each kind that did not fit, builds of one name, and the target.
ONCE_SPILLED = {
    "moments beside codes": ("bf16, d 128, tile 4 x 64, codes of 5/3 bits, summaries 1, full slope fp32 across", 80),
    "many queries of narrow heads": (
        "bf16, d 64, tile 16 x 128, codes of 6 and 4/3 bits, summaries 12, diagonal variance, anchored", 80,
    ),
    "float32": ("fp32, d 64, tile 8 x 64, codes of 4/2 bits", 80),
    "wide heads": (
        "bf16, d 256, tile 4 x 64, codes of 6 and 4/3 bits, summaries 12, rank 2, diagonal variance, anchored", 100,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ONCE_SPILLED)
def test_what_spilled_once_fits(kind: str):
    name, target = ONCE_SPILLED[kind]
    dtype = torch.float32 if name.startswith("fp32") else torch.bfloat16
    dimension = int(re.findall(r", d (\d+),", name)[0])
    builds = [x for x in reachable((dtype,), (dimension,)) if x.name == f"decode, {name}, counted, packed"]
    assert builds
    for build in builds:
        usage = compile_build(build, target, loops=False)
        assert usage.fits(target), usage


@pytest.mark.parametrize(
    "usage",
    [Usage(255, 8, 1024, 1), Usage(255, 4096, 1024), Usage(64, 0, 2**20)],
    ids=["spills in a loop", "spills much", "shared memory"],
)
def test_a_build_that_takes_too_much_fails_the_report(
    usage: Usage, builds: list[Build], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(kernels_report, "reachable", lambda: builds[:2])
    monkeypatch.setattr(kernels_report, "compile_build", lambda *_, **__: usage)
    assert kernels_report.main(["--targets", "90"]) == 1
    assert "FAILS" in capsys.readouterr().out
    monkeypatch.setattr(kernels_report, "compile_build", lambda *_, **__: Usage(64, 0, 1024))
    assert kernels_report.main(["--targets", "90"]) == 0


def test_processes_compile_what_one_compiles(builds: list[Build]):
    merges = [build for build in builds if build.name.startswith("combine")][:2]
    tasks = [(build, target) for build in merges for target in (80, 90)]
    alone = list(kernels_report.compiled(tasks))
    assert list(kernels_report.compiled(tasks, workers=2)) == alone
    assert [(build, target) for build, target, _ in alone] == tasks


def test_a_sample_is_always_the_same_and_part_of_every_larger_one(
    builds: list[Build], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert [sampled(builds, n) for n in (3, 5)] == [sampled(builds, len(builds))[:n] for n in (3, 5)]
    assert set(sampled(builds, 10**6)) == set(builds)
    assert sampled(builds, 10**6) != builds
    with pytest.raises(ValueError, match="sample is 0"):
        sampled(builds, 0)
    monkeypatch.setattr(kernels_report, "reachable", lambda: builds)
    monkeypatch.setattr(kernels_report, "compile_build", lambda *_, **__: Usage(64, 0, 1024))
    assert kernels_report.main(["--targets", "90", "--sample", "3"]) == 0
    printed = capsys.readouterr().out
    assert f"3 of {len(builds)} specialisations" in printed
    assert all(build.name in printed for build in sampled(builds, 3))


def test_what_a_file_has_is_not_compiled_again(
    builds: list[Build], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A run that was stopped in the middle of a line goes on, and what it found counts."""
    path, spills, asked = tmp_path / "new" / "builds.jsonl", Usage(255, 8, 1024, 1), []
    one, two = builds[:2]

    def stopped(build: Build, target: int, **_: Any) -> Usage:
        asked.append((build, target))
        if build == two:
            raise KeyboardInterrupt
        return spills

    monkeypatch.setattr(kernels_report, "reachable", lambda: [one, two])
    monkeypatch.setattr(kernels_report, "compile_build", stopped)
    command = ["--targets", "80", "90", "--file", str(path)]
    with pytest.raises(KeyboardInterrupt):
        kernels_report.main(command)
    capsys.readouterr()
    with path.open("a") as file:
        file.write('["half')
    monkeypatch.setattr(kernels_report, "compile_build", lambda *task, **_: asked.append(task) or Usage(64, 0, 1024))
    for _ in range(2):  # the second finds all
        assert kernels_report.main(command) == 1
        printed = capsys.readouterr().out
        assert printed.count("FAILS") == 2
        assert "2 of 4 spill in a loop or have no room" in printed
    assert asked == [(one, 80), (one, 90), (two, 80), (two, 80), (two, 90)]
    assert "4 of 4 are in" in printed
    assert len({kernels_report.digest(build, target) for build in builds for target in TARGETS}) == 3 * len(builds)
    monkeypatch.setattr(kernels_report.triton, "__version__", "other")
    assert kernels_report.digest(one, 80) not in path.read_text()


def test_nothing_is_compiled_in_the_interpreter(builds: list[Build], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_build(builds[0], 90)


def test_wide_heads_go_through_many_summaries_with_few_queries_at_a_time():
    """40 summaries beside a tile of 32 queries spilled 88 bytes at head dimension 128, on sm_80."""
    tiles = {
        (d, summaries): decode_blocks(24, d, d, torch.bfloat16, summaries, bits=0).BLOCK_M
        for d in (64, 128)
        for summaries in (0, 12, 16, 17, 40)
    }
    assert {at for at, queries in tiles.items() if queries == 16} == {(128, 17), (128, 40)}
    assert set(tiles.values()) == {16, 32}


def test_splits_fill_the_device_and_are_no_smaller_than_a_tile():
    for programs in (1, 7, 8, 512):
        for capacity in (0, 1, 64, 512, 131072):
            splits = number_of_splits(programs, capacity, 64, 132)
            assert 1 <= splits <= min(SPLITS, max(1, -(-capacity // 64)))
            assert splits * programs >= 132 or splits in (-(-capacity // 64), SPLITS, 1)


@pytest.mark.parametrize("d", [64, 256])
def test_a_merge_holds_no_more_splits_than_fit_into_registers(d: int):
    """With that of recent tokens and the estimate: 128 spilled at head dimension 256."""
    tiers = tiers_of(torch.float16, d, 1, Layout(1, 65, (2**15, 2**15)), masked=False)
    for expansion in (None, expansions(d)["summaries"]):
        _, merge = launches_of(tiers, expansion, 4, scored=False)
        assert merge.arguments["splits"] == merge.constants["BLOCK_S"] == SPLITS
