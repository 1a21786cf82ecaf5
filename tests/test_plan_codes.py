"""Plans of bits that are chosen by what is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import prompt, tiny

import momentkv.hf
from momentkv.cache.budget_rules import parse_budget
from momentkv.cache.coded_budget import CODES
from momentkv.cli import main
from momentkv.codes import bits_as_text, bits_from_text, record_bytes
from momentkv.plan import KNOWN, find_shape, plan, plan_codes, table_of_codes


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("budget", [40, "64KiB", 0.05])
@torch.inference_mode()
def test_plans_of_bits_that_are_chosen_are_those_of_a_cache(
    family: str, code: tuple[int, int], budget: int | str | float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whatever is chosen, the plan of it is what the cache holds, before tokens are coded and after."""
    monkeypatch.setattr("momentkv.cache.coded_budget.CODES", (code,))
    model = tiny(family)
    model.config.save_pretrained(tmp_path)
    shape, ids = find_shape(str(tmp_path)), prompt(1, 1001)
    cache = momentkv.hf.MomentCache(model, budget, bits="auto")
    model(ids[:, :30], past_key_values=cache)
    assert {each.total for each in plan_codes(shape, 30, budget, dtype="float32").values()} == {cache.nbytes}
    cache.reset()
    model(ids[:, :1000], past_key_values=cache)
    planned = plan_codes(shape, 1000, budget, dtype="float32")
    assert len(planned) == len(CODES)
    one, heads = planned[bits_as_text(code)], shape.full_layers * shape.kv_heads
    left = one.budget * heads - sum(sum(core.budgets) for core in cache.moment_layers.values())
    assert 0 <= left < heads  # what whole tokens for each head leave
    assert cache.nbytes == one.total - left * (record_bytes(16, 16, code) + 4)
    model(ids[:, 1000:], past_key_values=cache)
    assert cache.nbytes == one.total - left * (record_bytes(16, 16, code) + 4)
    if isinstance(budget, str):
        assert one.total <= parse_budget(budget).total


@pytest.mark.parametrize(("seen", "coded"), [(60, False), (91, False), (92, True)])
@torch.inference_mode()
def test_bits_are_chosen_when_a_block_more_than_the_budget_has_come(seen: int, coded: bool, tmp_path: Path):
    model = tiny("llama")
    model.config.save_pretrained(tmp_path)
    cache = momentkv.hf.MomentCache(model, 60, bits="auto")
    model(prompt(1, seen), past_key_values=cache)
    totals = {each.total for each in plan_codes(find_shape(str(tmp_path)), seen, 60, dtype="float32").values()}
    assert (len(totals) > 1) == coded
    assert all((core.config.bits is not None) == coded for core in cache.moment_layers.values())
    assert coded or totals == {cache.nbytes}


def test_tokens_in_few_bits_are_those_of_a_plan_of_these_bits():
    """The bytes of a total are the same whichever bits take them."""
    shape = KNOWN["Qwen2.5-7B"]
    for bits, each in plan_codes(shape, 10**6, "256MiB", batch=2).items():
        fixed = plan(shape, 10**6, each.budget, bits=bits_from_text(bits), batch=2)
        assert fixed.total == each.total
        assert 0.995 * 2**28 < each.total <= 2**28


def test_one_plan_of_bits_that_are_chosen_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"bits is 'auto': .* `plan_codes` plans each"):
        plan(KNOWN["Qwen2.5-7B"], 1000, 64, bits="auto")
    with pytest.raises(ValueError, match="context is 0"):
        plan_codes(KNOWN["Qwen2.5-7B"], 0, "64MiB")


@pytest.mark.parametrize("name", [*KNOWN])
@pytest.mark.parametrize(("context", "budget", "batch"), [(100, 64, 1), (10**6, 0.25, 64), (10**8, "900GiB", 1)])
def test_tables_of_bits_fit_sixty_columns(name: str, context: int, budget: int | float | str, batch: int):
    lines = table_of_codes(plan_codes(KNOWN[name], context, budget, batch=batch), name).splitlines()
    assert max(map(len, lines)) <= 60
    assert sum("%" in line for line in lines) == 1 + len(CODES)


MODEL = ["plan", "llama-3.1-8b", "--context", "131072"]


@pytest.mark.parametrize("options", [["--budget", "64MiB"], ["--budget", "64MiB", "--bits", "auto"]])
def test_bits_of_a_budget_in_bytes_are_chosen_as_a_cache_does(options: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([*MODEL, *options]) == 0
    out = capsys.readouterr().out
    assert "4              1,708  63.97 MiB    0.39%" in out
    assert "which one is chosen by errors" in out


def test_a_budget_in_tokens_can_be_planned_so_too(capsys: pytest.CaptureFixture[str]):
    assert main([*MODEL, "--budget", "512", "--bits", "auto"]) == 0
    assert "budget 512 tokens at full precision" in capsys.readouterr().out
    assert main([*MODEL[:-1], "500", "--budget", "512", "--bits", "auto"]) == 0
    assert "all tokens fit as they come" in capsys.readouterr().out


def test_tokens_as_they_come_can_be_asked_for(capsys: pytest.CaptureFixture[str]):
    assert main([*MODEL, "--budget", "64MiB", "--bits", "none"]) == 0
    assert "budget 64MiB: 458 retained per KV head" in capsys.readouterr().out
