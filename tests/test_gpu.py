"""The command for a GPU, rehearsed: all parts run, one that fails costs only itself, predictions are arithmetic."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

pytest.importorskip("triton", reason="Triton is there on Linux only")

from momentkv import LayerCache
from momentkv._array import leading_by_squaring, orthonormal_by_gram
from momentkv.backends.plain import decode_plain
from momentkv.backends.triton.builds import GPUS, Usage, build_of, compile_build, occupancy
from momentkv.backends.triton.reach import Calls, launched, reachable
from momentkv.cache.config import MODEL_DEFAULTS
from momentkv.cache.joining import flush_together
from momentkv.codes import pair_of_bits
from momentkv.policies import POLICIES
from momentkv.statistics import clustering
from momentkv.testing.gpu import checks, kernels, modes, run, steps, tuning
from momentkv.testing.gpu.operators import Fused, Log, step_without_data
from momentkv.testing.gpu.page import page_of
from momentkv.testing.gpu.parts import PARTS, Part
from momentkv.testing.gpu.predict import COPY, KINDS, LAUNCH, predictions, seconds_of

ROOT = Path(__file__).parents[1]


def test_a_rehearsal_runs_all_parts_and_says_what_it_skips(tmp_path: Path):
    path = tmp_path / "gpu.json"
    command = [sys.executable, str(Path(__file__).with_name("rehearsal.py")), "--output", str(path)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    content = json.loads(path.read_text())
    parts = {part["name"]: part for part in content["parts"]}
    assert list(parts) == list(PARTS)
    assert {name: part["why"] for name, part in parts.items() if part["state"] == "skipped"} == {
        "kernels, bfloat16": "Triton's interpreter cannot multiply matrices of bfloat16",
        "compute-sanitizer": "a rehearsal has no GPU to watch",
    }
    for name, part in parts.items():
        assert part["state"] == "skipped" or (part["state"] == "done" and part["rows"]), (name, part["why"])
        assert all(row.get("right", True) for row in part["rows"])
    assert {row["kind"] for row in parts["steps as graphs"]["rows"]} == {"default", "the paper's", "observed", "plain"}
    assert [row["name"] for row in parts["a model of 8B"]["rows"]] == [
        "budget 24",
        "full cache of 64",
        "full cache of 128",
    ]
    assert [(row["layers"], row["name"]) for row in parts["flushes as graphs"]["rows"]] == [
        (layers, way) for layers in (1, 2) for way in ("captured", "launched")
    ]
    operators = [row["operator"] for row in parts["operators PyTorch checks"]["rows"]]
    assert operators == ["decode"] * 3 + ["step", "flush"] * 4
    names = [row["name"] for row in parts["tokens in few bits"]["rows"]]
    assert names == ["copy", "codes of 4 bits", "codes of 8 bits"]
    kinds = [(gpu, name) for gpu in GPUS for name in KINDS]
    assert [(row["gpu"], row["name"]) for row in content["predictions"]] == kinds
    assert "a rehearsal, no timing" in ran.stdout


def test_what_fails_or_takes_too_long_costs_only_itself():
    late = run.run_part(PARTS["kernels, float32"]._replace(seconds=1.0), seconds=100, rehearse=True)
    assert (late["state"], late["why"]) == ("late", "stopped after 1 s")
    failed = run.run_part(Part("no such part", 60, "nowhere:rows"), seconds=100, rehearse=True)
    assert failed["state"] == "failed"
    assert "nowhere" in failed["why"]
    assert run.run_part(PARTS["one layer"], seconds=0.5, rehearse=True)["state"] == "no time"


def test_all_parts_fit_into_nine_minutes_most_of_the_time_for_what_measures():
    parts = [part for part in PARTS.values() if not part.rehearsed]
    assert sum(part.seconds for part in parts[:6]) <= run.TOTAL <= 9 * 60


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main([]) == 2
    assert "--rehearse" in capsys.readouterr().out


def test_it_needs_neither_transformers_nor_rich():
    """The bare machine: every module of the command, but for the part that is about transformers."""
    code = (
        "import sys\nsys.modules.update(dict.fromkeys(('transformers', 'rich', 'matplotlib', 'psutil', 'scipy')))\n"
        "import momentkv.testing.gpu.run\n"
        + "\n".join(f"import momentkv.testing.gpu.{part.function.partition(':')[0]}" for part in PARTS.values())
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("off", [0.0, 3e-2, math.nan])
def test_a_kernel_that_errs_is_called_wrong(monkeypatch: pytest.MonkeyPatch, off: float):
    def decode(*arguments: Any) -> Any:
        *inputs, _, coding, _ = arguments
        out, lse, logits = decode_plain(*inputs, coding)
        out.view(-1)[1] += off
        return out, lse, logits

    monkeypatch.setattr(kernels, "decode_triton", decode)
    cases = kernels.rehearsed(torch.float32)
    rows = [kernels.tried(case) for case in cases]
    torch.use_deterministic_algorithms(False)
    assert len(rows) == kernels.FEW
    assert [row["right"] for row in rows] == [off == 0.0] * kernels.FEW
    assert all(row["share"] > 1.0 for row in rows) == (off != 0.0)


def test_an_operator_that_lies_is_called_wrong():
    def lying(x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x.clone()

    operator = torch.library.custom_op("momentkv_tests::lying", lying, mutates_args=())
    row = checks.outcome("lying", "one number", operator, (torch.zeros(1),))
    assert not row["right"]
    assert "is not defined as mutable but was mutated" in row["why"]
    part = {"name": "operators PyTorch checks", "state": "done", "why": "", "rows": [row]}
    assert run.wrong(part)
    page = page_of(measured() | {"parts": [part]})
    assert "0 of 1 calls are as the operators say" in page
    assert "wrong: lying, one number: test_schema" in page


@pytest.mark.parametrize("off", [0.0, 0.1, math.nan])
def test_a_graph_that_does_something_else_is_called_wrong(monkeypatch: pytest.MonkeyPatch, off: float):
    captured = steps.captured

    def other(*arguments: Any, **settings: Any) -> Any:
        replay = captured(*arguments, **settings)
        return lambda: None if (out := replay()) is None else out + off

    monkeypatch.setattr(steps, "captured", other)
    row = next(iter(steps.graphs(True)))
    assert row["right"] == (off == 0.0)


@pytest.mark.parametrize("off", [0.0, 0.1, math.nan])
def test_a_mode_that_is_wrong_on_the_device_is_called_wrong(monkeypatch: pytest.MonkeyPatch, off: float):
    made: list[str] = []

    def logits_of(model: str, **mode: Any) -> torch.Tensor:
        made.append(model)
        return torch.ones(2, 3, 5) + (off if model == "there" else 0.0)

    monkeypatch.setattr(modes, "logits_of", logits_of)
    row = modes.nearest("here", "there", {"static": True, "graphs": "steps"})
    assert row["right"] == (off == 0.0)
    assert made == ["here", "there"] * (1 if off == 0.0 else modes.TRIES)


def test_a_mode_that_raises_costs_itself_alone(monkeypatch: pytest.MonkeyPatch):
    def nearest(on_cpu: Any, there: Any, mode: dict[str, Any]) -> dict[str, Any]:
        if mode.get("bits"):
            raise ValueError("no bits here")
        return {"right": True}

    monkeypatch.setattr(modes, "nearest", nearest)
    rows = {row["mode"]: row for row in modes.compared(True)}
    # Without a device nothing is captured.
    coded = {name for name, mode in modes.MODES.items() if mode.get("bits") and "graphs" not in mode}
    assert coded == {name for name, row in rows.items() if not row["right"]}
    assert rows["4 bits"]["why"] == "ValueError: no bits here"


def test_bytes_of_a_token_are_counted_from_the_loads():
    """A key and a value of two bytes a number, once for the whole group; masks leave out what does not exist."""
    code = (
        "from momentkv.testing.gpu.predict import traffic_of\nfrom momentkv.evaluation.layer_times import Shape\n"
        "found = [traffic_of(Shape(1, 1, 4, 96, n, 0), 'retained only', 1) for n in (0, 64, 65, 200)]\n"
        "coded = [traffic_of(Shape(1, 1, 4, 128, n, 0), 'codes of 4 bits', 1) for n in (64, 192)]\n"
        "print([[x.loaded + x.stored, x.touched] for x in found + coded])"
    )
    interpreted = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=interpreted, cwd=ROOT)
    *vectors, few, more = json.loads(ran.stdout)
    none, *some = (x[0] for x in vectors)
    # Rows of vectors are whole sectors. Of codes, planes of 32, 16 and 32 bytes lie in rows of 80, those of 32 and 16
    # in rows of 48: they touch 1.5, 1, 1.5, 1.5 and 1 sectors in the mean. Steps of two bytes follow each other.
    assert vectors[1][1] - vectors[0][1] == 64 * 2 * 96 * 2
    assert more[0] - few[0] == 128 * 132
    assert more[1] - few[1] == 128 * (32 * 6.5 + 4)
    # Four queries and outputs of 96 halves, and four lse of 4 bytes.
    assert none == 2 * 4 * 96 * 2 + 4 * 4
    assert [x - none for x in some] == [n * 2 * 96 * 2 for n in (64, 65, 200)]


def launch_row(**changes: Any) -> dict[str, Any]:
    shape = {"batch": 64, "kv_heads": 8, "group": 4, "d": 128, "budget": 512, "context": 8192}
    row = {"shape": shape, "name": "retained only", "target": 90, "blocks": 3, "programs": 512, "asked": 32768}
    return row | changes


def test_predictions_are_bytes_over_bandwidth_where_enough_is_asked_for():
    traffic = {"shape": launch_row()["shape"], "name": "retained only", "a_token": 512.0, "a_head": 2064.0}
    traffic["touched"] = 512.0
    parts = [{"name": "compiled kernels", "rows": [launch_row()]}, {"name": "bytes of kernels", "rows": [traffic]}]
    found = {each.gpu: each for each in predictions(parts)}
    assert set(found) == set(GPUS)
    for name, gpu in GPUS.items():
        assert found[name].bytes == 512 * (512 * 512 + 2064)
        least = LAUNCH + found[name].bytes / (COPY * gpu.bandwidth)
        assert least <= found[name].seconds <= 1.3 * least
    assert predictions([{"name": "bytes of kernels", "rows": [traffic]}]) == []
    gpu = GPUS["H100"]
    # A program of 128 on as many processors: bound by the instructions of its tokens, where these are many.
    few, many = (seconds_of(1e6, launch_row(programs=128, issued=n), gpu, 128 * 512) for n in (1.0, 400.0))
    assert few == seconds_of(1e6, launch_row(programs=128), gpu)
    assert many == pytest.approx(512 * 400 / (4 * 1.98e9))
    assert seconds_of(1e6, launch_row(programs=128), gpu, 128 * 512, 6e9) == pytest.approx(1e-3)
    assert seconds_of(1e6, launch_row(programs=8), gpu) > 3 * seconds_of(1e6, launch_row(programs=132), gpu)


def test_occupancy_follows_from_each_limit():
    assert occupancy(Usage(registers=255, stack=0, shared=0), warps=8, target=90) == 1
    assert occupancy(Usage(registers=32, stack=0, shared=0), warps=4, target=90) == 16
    assert occupancy(Usage(registers=16, stack=0, shared=0), warps=1, target=80) == 32
    assert occupancy(Usage(registers=16, stack=0, shared=113 * 1024), warps=4, target=90) == 2
    assert occupancy(Usage(registers=16, stack=0, shared=113 * 1024), warps=4, target=80) == 1


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_what_a_cache_launches_is_among_what_is_enumerated(static: bool):
    known = set(reachable((torch.float32,), (64,)))
    found = set()
    for settings in (
        MODEL_DEFAULTS,
        {"policy": "h2o", "correction": "moments"},
        {"policy": "momentkv", "order": 0},
        {"policy": "snapkv", "order": None},
    ):
        cache = LayerCache(24, window=8, block=4, static=static, backend=Fused(), **settings)
        q, k = torch.randn(2, 8, 60, 64), torch.randn(2, 2, 60, 64)
        cache.step(q, k, k)
        with Calls() as calls:
            for _ in range(6):
                cache.step(q[:, :, :1], k[:, :, :1], k[:, :, :1])
        assert len(calls.arguments) == 6
        for arguments in calls.arguments:
            found |= {build_of(launch) for launch in launched(arguments, 132)}
    assert found <= known
    assert len(found) >= 4


@pytest.mark.parametrize("budget", [40, [30, 50]], ids=["equal", "ragged"])
@pytest.mark.parametrize(("bits", "static"), [(4, False), (8, False), ((3, 6), False), (4, True), (8, True)], ids=str)
@pytest.mark.parametrize(
    "settings", [MODEL_DEFAULTS, {"policy": "h2o", "correction": "moments"}], ids=["default", "observed"]
)
def test_a_cache_of_codes_decodes_by_the_operator_as_by_plain_operators(
    settings: Any, bits: Any, static: bool, budget: Any
):
    """Weights that a policy observes, too: else other tokens would stay, and outputs differ by more."""
    settings = settings | {"window": 8, "block": 4, "bits": bits}
    caches = [
        LayerCache(budget, backend=Fused(), static=static, **settings),
        LayerCache(budget, **settings),
    ]
    rng = torch.Generator().manual_seed(0)
    for n in (90, *[1] * 10):
        q, k, v = (torch.randn(2, heads, n, 64, generator=rng) for heads in (8, 2, 2))
        with Calls() as calls:
            out = caches[0].step(q, k, v)
        torch.testing.assert_close(out, caches[1].step(q, k, v), rtol=2e-5, atol=2e-5)
        # Behind the parts of the expansion, bits are the last numbers that the operator is given.
        assert n > 1 or [x for x in calls.arguments[-1] if type(x) is int][-2:] == list(pair_of_bits(bits))


def stepped(budget: int | list[int], *, static: bool, batch: int = 2, **settings: Any) -> tuple[Log, LayerCache]:
    """A decoding step on tensors that have no data, as CUDA would do it, and what it was asked to do."""
    cache = LayerCache(budget, static=static, backend=Fused(), window=8, block=8, **settings)
    q, k = torch.randn(batch, 8, 700, 64), torch.randn(batch, 2, 700, 64)
    cache.step(q, k, k)
    cache.step(q[:, :, :1], k[:, :, :1], k[:, :, :1])
    return step_without_data(cache), cache


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_step_of_the_default_reads_in_place_and_never_asks_the_device(static: bool):
    """Without data whoever asks for some fails; what it makes is no larger than a few queries or the statistics."""
    default = MODEL_DEFAULTS
    log, cache = stepped([300, 600], static=static, **default)
    queries = 2 * 8 * 64 * 4
    statistics = 2 * 2 * 30 * 64 * 4  # rows, KV heads, vectors of summaries that are widened from 16 bits
    assert cache.nbytes > 50 * queries
    assert max(made for made, _ in log.made) <= statistics
    assert sum(made > queries for made, _ in log.made) == 2  # as float32, and times their steps
    exact, _ = stepped([300, 600], static=static, **default | {"statistics_bits": None})
    assert max(made for made, _ in exact.made) <= queries
    # The same whatever heads retain and however many rows there are.
    for other in (stepped(400, static=static, **default), stepped([90, 600], static=static, batch=1, **default)):
        assert other[0].launched == log.launched


@pytest.mark.parametrize("bits", [None, 4], ids=["vectors", "codes"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("policy", ["balanced", "momentkv", "h2o", "snapkv"])
def test_a_step_uploads_nothing_whatever_heads_retain(policy: str, static: bool, bits: int | None):
    """A constant made of the host's numbers is an upload, which waits, and which a CUDA graph cannot hold."""
    log, _ = stepped([90, 600], static=static, policy=policy, correction="moments", bits=bits)
    assert log.launched["decode"] == 1
    assert not log.launched["lift_fresh"]


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("budget", [40, [30, 50]], ids=["equal", "ragged"])
@pytest.mark.parametrize(
    "settings",
    [
        MODEL_DEFAULTS,
        MODEL_DEFAULTS | {"bits": 4},
        *({"policy": name, "correction": "summaries"} for name in sorted(POLICIES)),
    ],
    ids=["default", "codes", *sorted(POLICIES)],
)
def test_a_flush_uploads_nothing_and_asks_no_routine_whether_it_succeeded(
    settings: dict[str, Any], budget: Any, layers: int, monkeypatch: pytest.MonkeyPatch
):
    """Either waits for the device, and no CUDA graph can hold it; tensors without data do not show the latter."""
    monkeypatch.setattr(clustering, "orthonormal", orthonormal_by_gram)
    monkeypatch.setattr(clustering, "leading", leading_by_squaring)
    if POLICIES[settings["policy"]].couples_heads and not isinstance(budget, int):
        pytest.skip("heads that are ranked together have one budget")
    caches = [LayerCache(budget, static=True, window=8, **settings) for _ in range(layers)]
    for cache in caches:
        q, k = torch.randn(1, 4, 90, 16), torch.randn(1, 2, 90, 16)
        cache.step(q, k, k)
    flush_together(caches)  # uploads what the layout says, once
    with Log() as log:
        flush_together(caches)
    assert log.launched["linalg_cholesky_ex"] > 0  # of the columns of the summaries' slope
    waiting = {
        "lift_fresh",
        "linalg_inv",
        "linalg_inv_ex",
        "linalg_lu_factor_ex",
        "linalg_qr",
        "_linalg_eigh",
        "_linalg_check_errors",
        "_local_scalar_dense",
    }
    assert not waiting & set(log.launched)


def test_asking_the_device_is_noticed():
    class Asks(Fused):
        def decode(self, q: Any, tiers: Any, expansion: Any, *, scale: float, weights: bool = False) -> Any:
            assert bool((tiers.keys > 0).any())
            return super().decode(q, tiers, expansion, scale=scale, weights=weights)

    cache = LayerCache(40, backend=Asks(), window=8)
    q, k = torch.randn(1, 4, 90, 64), torch.randn(1, 2, 90, 64)
    cache.step(q, k, k)
    with pytest.raises(DataDependentOutputException):
        step_without_data(cache)


def test_accesses_of_spilled_registers_in_loops_are_seen():
    """A kernel that is given too few registers, compiled: the report would fail."""
    builds = reachable((torch.bfloat16,), (64,))
    build = next(build for build in builds if dict(build.constants).get("SUMMARIES") == 12)
    usage = compile_build(build._replace(options=(*build.options, ("maxnreg", 40))), 90)
    assert usage.looped > 0
    assert not usage.fits(90)
    assert compile_build(build, 90).fits(90)


def measured() -> dict[str, Any]:
    """A result as of a GPU, made up: a layer twice as slow as predicted, all kernels right."""
    predicted = json.loads((ROOT / "docs" / "data" / "gpu-predicted.json").read_text())
    layer = [{"name": "copy", "bytes": 2**31, "seconds": {"median": 1e-3}}]
    for row in predicted["predictions"]:
        if row["gpu"] == "H100":
            seconds = {"median": 2 * row["seconds"]}
            layer.append({"name": row["name"], "shape": row["shape"], "bytes": row["bytes"], "seconds": seconds})
    kernels = [{"case": "d=3", "right": True, "share": 0.5, "relative": 1.5e-3}]
    family, builtin = tuning.Kind(torch.bfloat16, 64, "none", False).builtin
    kind = {"family": family._asdict(), "choice": builtin._asdict(), "chosen": True}
    tuned = [kind | {"share": 1.0}, kind | {"share": 0.82}]
    return {
        "about": predicted["about"] | {"rehearsal": False, "device": {"name": "NVIDIA H100 of a test"}},
        "parts": [
            {"name": "one layer", "state": "done", "why": "", "seconds": 1.0, "rows": layer},
            {"name": "kernels, bfloat16", "state": "done", "why": "", "seconds": 1.0, "rows": kernels},
            {"name": "tuning", "state": "done", "why": "", "seconds": 1.0, "rows": tuned},
        ],
    }


def page_script() -> Any:
    spec = importlib.util.spec_from_file_location("speed_page", ROOT / "docs" / "figures" / "speed.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copied(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "assets").mkdir()
    shutil.copy(ROOT / "docs" / "speed.md", tmp_path)
    for path in (ROOT / "docs" / "data").glob("gpu-*.json"):
        shutil.copy(path, tmp_path / "data")
    return tmp_path


def test_the_page_is_what_its_data_say(tmp_path: Path):
    docs = copied(tmp_path)
    page_script().main(["--docs", str(docs)])
    assert (docs / "speed.md").read_text() == (ROOT / "docs" / "speed.md").read_text()


def test_a_measured_result_goes_beside_the_predictions(tmp_path: Path):
    docs = copied(tmp_path)
    result = tmp_path / "result.json"
    result.write_text(json.dumps(measured()))
    page_script().main([str(result), "--docs", str(docs)])
    text = (docs / "speed.md").read_text()
    assert "measured, NVIDIA H100 of a test, us" in text
    assert "at most 8e-3 | | | | 1.5e-03 |" in text
    assert "1 of 1" in text
    assert "better sizes than the built-in ones | 1 of 2; least time, of the built-in's: 82 % |" in text
    # Twice as slow in every row: the same ratios as predicted.
    [order] = [line.split(" | ") for line in text.splitlines() if line.startswith("| order 1 over no moments")]
    assert order[-1].removesuffix(" |") == order[3]
    assert (docs / "assets" / "speed.svg").stat().st_size > 0
    assert "wrong" not in page_of(measured())
