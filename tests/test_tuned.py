"""Sizes of kernels that were measured on a device: when they count, how they are chosen, that nothing else measures."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is there on Linux only")

from triton.errors import TritonError

from momentkv.backends.layout import Layout
from momentkv.backends.triton import tuned
from momentkv.backends.triton.builds import Usage
from momentkv.backends.triton.reach import launches_of, tiers_of
from momentkv.backends.triton.tuned import Choice, Family, candidates, chosen, path_of, read, write
from momentkv.testing.gpu import tuning
from momentkv.testing.gpu.page import page_of
from momentkv.testing.gpu.tuning import Kind, best, builds_of, choices_of, compared, fits, kinds, main, of_kind, tune

ABOUT = {"device": "NVIDIA H200 of a test", "capability": "9.0", "processors": 132, "triton": "3.7.1", "kernels": "1"}
KIND = Kind(torch.bfloat16, 64, "none", 0)
FAMILY, BUILTIN = KIND.builtin
OTHER = Choice(32, 8, 3, 2)
DEVICE = torch.device("cuda", 0)


def sizes(choices: Any, dtype: torch.dtype = torch.bfloat16, batch: int = 1) -> tuple[int, int, int, int]:
    """Tokens, warps and stages of the decode kernel that a step launches, and parts of the sequence."""
    tiers = tiers_of(dtype, 64, batch, Layout(1, 65, (4096, 4096)), masked=False)
    first = next(launches_of(tiers, None, 4, scored=False, processors=132, choices=choices))
    return (first.constants["BLOCK_N"], *first.options.values(), first.arguments["splits"])


def test_a_choice_is_for_its_family_alone():
    assert sizes(None) == sizes({}) == (64, 4, 2, 64)
    assert sizes({FAMILY: OTHER}) == (32, 8, 3, 64)
    assert sizes({FAMILY: OTHER}, batch=16)[-1] == 10 > sizes({}, batch=16)[-1] == 6
    assert sizes({FAMILY: OTHER}, torch.float16) == (64, 4, 2, 64)
    for name, value in (("queries", 32), ("d", 128), ("dv", 128), ("estimate", "moments"), ("bits", 8)):
        assert sizes({FAMILY._replace(**{name: value}): OTHER}) == sizes({})


def test_every_kind_of_launch_is_a_family_of_its_own_and_begins_with_what_is_built_in():
    every = kinds([torch.bfloat16, torch.float16, torch.float32], [64, 128, 256])
    families = {kind.builtin[0] for kind in every}
    assert len(families) == len(every) == 3 * 3 * 3 * 3 - 2 * 3
    for kind in every:
        builtin = kind.builtin[1]
        tried = candidates(builtin, coded=kind.bits > 0)
        assert tried[0] == builtin
        assert not kind.bits or all(choice.tokens >= 16 * choice.num_warps for choice in tried)
        assert 4 <= len(set(tried)) == len(tried) <= 8
        for choice in tried:
            assert all(getattr(choice, name) in allowed for name, allowed in tuned.ALLOWED.items())


@pytest.fixture
def cache_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that would be read on a GPU of a test."""
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path))
    monkeypatch.setattr(tuned, "about_device", lambda device: ABOUT)
    chosen.cache_clear()
    yield path_of(ABOUT)
    chosen.cache_clear()


def test_what_was_written_is_read_once(cache_of_a_user: Path):
    assert cache_of_a_user.name == "decode-NVIDIA-H200-of-a-test-9.0.json"
    assert chosen(DEVICE) == {}
    chosen.cache_clear()
    write(cache_of_a_user, ABOUT, {FAMILY: OTHER})
    assert chosen(DEVICE) == {FAMILY: OTHER}
    cache_of_a_user.unlink()
    assert chosen(DEVICE) == {FAMILY: OTHER}
    assert not list(cache_of_a_user.parent.iterdir())


def content(**changes: Any) -> str:
    made = {**ABOUT, "choices": [{"family": FAMILY._asdict(), "choice": OTHER._asdict()}]} | changes
    return json.dumps(made)


WRONG = {
    "another GPU": (content(device="NVIDIA A100"), "its device is 'NVIDIA A100', and here it is 'NVIDIA H200"),
    "another Triton": (content(triton="3.6.0"), "its triton is '3.6.0'"),
    "other kernels": (content(kernels="0"), "its kernels is '0'"),
    "no JSON": ("{", "Expecting property name"),
    "no UTF-8": (b"\xff", "can't decode"),
    "no object": ("[]", "no list of choices"),
    "no choices": (content(choices=None), "no list of choices"),
    "no choice": (content(choices=[3]), "3 is no choice"),
    "no family": (content(choices=[{"choice": OTHER._asdict()}]), "is no choice"),
    "an unknown family": (content(choices=[{"family": {"d": 3}, "choice": OTHER._asdict()}]), "is no choice"),
    "a tile of 48": (
        content(choices=[{"family": FAMILY._asdict(), "choice": OTHER._replace(tokens=48)._asdict()}]),
        "tokens is 48; it must be one of (16, 32, 64, 128, 256)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_or_stale_file_is_ignored_with_one_warning_that_names_it(name: str, cache_of_a_user: Path):
    text, why = WRONG[name]
    cache_of_a_user.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(RuntimeWarning) as caught:
        assert chosen(DEVICE) == {}
    [warning] = caught
    for part in (str(cache_of_a_user), "is ignored", why, "python -m momentkv.testing.gpu.tuning"):
        assert part in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(DEVICE) == {}


def test_choices_are_of_the_kernels_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here = Path(tuned.__file__).parent
    for path in here.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = tuned.fingerprint()
    monkeypatch.setattr(tuned, "__file__", str(tmp_path / "tuned.py"))
    assert tuned.fingerprint() == before
    for name in ("codes_kernel.py", "decode.py"):
        (tmp_path / name).write_text("# other\n")
        assert tuned.fingerprint() != before
        before = tuned.fingerprint()


def test_files_are_where_the_variable_or_the_cache_of_the_user_says(monkeypatch: pytest.MonkeyPatch):
    assert os.environ[tuned.VARIABLE] == ""  # as all tests run
    assert path_of(ABOUT) is None
    monkeypatch.setenv(tuned.VARIABLE, "/some/where")
    assert str(path_of(ABOUT)) == "/some/where/decode-NVIDIA-H200-of-a-test-9.0.json"
    monkeypatch.delenv(tuned.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert str(path_of(ABOUT)).startswith("/caches/momentkv/tuned/")
    for relative in ("", "caches"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        monkeypatch.setenv("HOME", "/home/someone")
        assert str(path_of(ABOUT)).startswith("/home/someone/.cache/momentkv/tuned/")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert path_of(ABOUT) is None


def test_what_is_chosen_is_faster_by_a_margin_and_slower_nowhere():
    for times, expected in (
        ([1.0, 1.0], BUILTIN),
        ([0.98, 0.98], BUILTIN),  # by less than the margin
        ([0.9, 0.9], OTHER),
        ([0.5, 1.05], BUILTIN),  # in the mean, but not everywhere
        ([1.5, 1.5], BUILTIN),
    ):
        of = {BUILTIN: [1.0, 1.0], OTHER: times}
        found, share = best(BUILTIN, [BUILTIN, OTHER], of.__getitem__)
        assert found == expected
        assert share == (1.0 if expected == BUILTIN else pytest.approx(compared(times, [1.0, 1.0])))
    assert best(BUILTIN, [BUILTIN], {BUILTIN: [1.0]}.__getitem__) == (BUILTIN, 1.0)


def test_a_choice_that_was_faster_by_chance_is_not_taken():
    """All are measured once more before they are taken; the next best one is, then."""
    third = OTHER._replace(num_warps=4)
    series = {BUILTIN: [1.0] * 3, OTHER: [0.5, 1.0], third: [0.8, 0.85]}
    measured: list[Choice] = []

    def seconds(choice: Choice) -> list[float]:
        measured.append(choice)
        return [series[choice][measured.count(choice) - 1]]

    assert best(BUILTIN, [BUILTIN, OTHER, third], seconds) == (third, pytest.approx(0.85))
    assert measured.count(BUILTIN) == 3


def test_candidates_that_err_or_have_no_room_are_not_even_timed():
    tried = candidates(BUILTIN)
    rows = [{"fits": i != 1, "right": None if i == 1 else i != 2, "error": 0.5} for i in range(len(tried))]
    timed = []

    def seconds(choice: Choice) -> list[float]:
        timed.append(choice)
        return [1.0 if choice == BUILTIN else 1.0 / (2 + tried.index(choice._replace(waves=1)) + choice.waves)]

    made = list(of_kind(KIND, rows, seconds))
    assert tried[1] not in timed
    assert tried[2] not in timed
    assert [row["right"] for row in made[:-1]] == [row["right"] for row in rows]
    # The last of them is the fastest, and most waves.
    assert choices_of(made) == {FAMILY: tried[-1]._replace(waves=3)}
    assert made[-1]["share"] < 1
    page = page_of(
        {
            "about": dict.fromkeys(("torch", "triton", "cuda", "numpy", "date"), "")
            | {"device": ABOUT | {"name": "one"}},
            "parts": [{"name": "tuning", "state": "done", "why": "", "rows": made}],
        }
    )
    assert "waves 3" in page
    assert page.count("WRONG") == 1
    # Without the built-in sizes nothing is faster than they.
    none = [row | {"right": False} for row in rows]
    assert choices_of(of_kind(KIND, none, seconds)) == {}


def test_a_candidate_that_raises_costs_itself_alone(monkeypatch: pytest.MonkeyPatch):
    def fails(*arguments: Any, **settings: Any) -> Any:
        raise TritonError("out of resource")

    monkeypatch.setattr(tuning, "error_of", fails)
    row = tuning.examined((KIND, BUILTIN, None))
    torch.use_deterministic_algorithms(False)
    assert (row["fits"], row["right"], row["why"]) == (True, False, "out of resource")


def test_a_kind_is_compiled_with_all_that_takes_room(monkeypatch: pytest.MonkeyPatch):
    for kind, parts in (
        (KIND, [", masked, scored", "counted, packed, scored"]),
        (KIND._replace(estimate="moments"), ["full slope", "full variance"]),
        (KIND._replace(estimate="summaries", bits=4), ["summaries 12", "6 and 4/3 bits"]),
        (KIND._replace(bits=8), ["8/8 bits"]),
    ):
        choice = kind.builtin[1]._replace(tokens=128, num_warps=8)
        builds = builds_of(kind, choice)
        assert all(any(part in build.name for build in builds) for part in parts)
        tile = f"tile {4 if kind.bits else 16} x 128"
        assert all(tile in build.name and dict(build.options)["num_warps"] == 8 for build in builds)
    monkeypatch.setattr(tuning, "compile_build", lambda *_, **__: Usage(255, 0, 2**20))
    assert not fits(KIND, BUILTIN, 90)
    monkeypatch.setattr(tuning, "compile_build", lambda *_, **__: Usage(64, 0, 2**10))
    assert fits(KIND, BUILTIN, 90)

    def fails(*_: Any, **__: Any) -> Usage:
        raise TritonError("no layout")

    monkeypatch.setattr(tuning, "compile_build", fails)
    assert not fits(KIND, BUILTIN, 90)


def test_candidates_compile_for_hopper():
    """Every tile, and other warps, of the smallest kind; all that a device tries, it compiles itself."""
    assert [fits(KIND, choice, 90) for choice in candidates(BUILTIN)[::2]] == [True] * 4


def test_what_was_not_measured_again_stays(cache_of_a_user: Path, monkeypatch: pytest.MonkeyPatch):
    other = FAMILY._replace(d=128)
    rows = [{"family": FAMILY._asdict(), "choice": OTHER._asdict(), "chosen": True, "share": 0.8}]
    monkeypatch.setattr(tuning, "capability", lambda: 90)
    monkeypatch.setattr(tuning, "about_device", lambda device: ABOUT)
    monkeypatch.setattr(tuning, "times", lambda *arguments: iter(rows))
    write(cache_of_a_user, ABOUT, {FAMILY: BUILTIN, other: BUILTIN})
    assert tune() == cache_of_a_user
    assert read(cache_of_a_user, ABOUT) == {FAMILY: OTHER, other: BUILTIN}
    cache_of_a_user.write_text("{}")
    assert main([]) == 0
    assert read(cache_of_a_user, ABOUT) == {FAMILY: OTHER}
    monkeypatch.setenv(tuned.VARIABLE, "")
    with pytest.raises(RuntimeError, match="MOMENTKV_TUNED is empty"):
        tune()


def test_without_a_gpu_that_it_knows_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "PyTorch finds no GPU here" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert main([]) == 2
    assert "compute capability 7.5; limits are known for 8.0, 9.0, 10.0 alone" in capsys.readouterr().out
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main([]) == 2
    assert "an interpreter has no speed" in capsys.readouterr().out


def test_families_are_read_as_they_were_written():
    assert Family(**json.loads(json.dumps(FAMILY._asdict()))) == FAMILY
