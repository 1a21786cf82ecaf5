"""What commands say of arguments that they cannot use: the option, what was given, and what to give instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from momentkv.cli import main

NEEDLES, FIDELITY, STREAM = (["evaluate", command] for command in ("needles", "fidelity", "stream"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*FIDELITY, "--methods", "default@7"], "methods has 'default@7', whose bits is '7'; use 3, 4, 5, 6, 8 or 16,"),
        ([*FIDELITY, "--methods", "twice@4@4"], "methods has 'twice@4@4', whose bits is '4@4'; use 3, 4,"),
        ([*FIDELITY, "--methods", "default@4/"], "or auto, tried or full"),
        ([*FIDELITY, "--budgets", "64", "128", "64"], "budgets has 64 twice; name it once"),
        ([*FIDELITY, "--policies", "h2o", "h2o"], "policies has h2o twice; name it once"),
        ([*FIDELITY, "--corrections", "none", "none"], "corrections has none twice; name it once"),
        ([*NEEDLES, "--depths", "0.5", ".5"], "depths has 0.5 twice; name it once"),
        ([*NEEDLES, "--lengths", "100", "100"], "lengths has 100 twice; name it once"),
        ([*NEEDLES, "--question", "seen", "seen"], "question has seen twice; name it once"),
        ([*STREAM, "--corrections", "none", "none"], "corrections has none twice; name it once"),
        (
            [*STREAM, "--context", "100", "--following", "20", "--budget", "120"],
            "budget is 120, but context and following tokens are 120, none of which would be evicted; use a",
        ),
        (["plan", "--context", "9", "--budget", "3", ""], "model is '', which names none; use the name of a model"),
        (
            ["plan", "--context", "9", "--budget", "3", "--bits", "4/", "SmolLM2-135M"],
            "bits is '4/'; use 3, 4, 5, 6, 8 or 16, two of 2, 3, 4, 5, 6, 8 and 16 with / between them",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_was_given_is_named(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 1
    assert said in capsys.readouterr().err


def test_results_that_were_cut_off_are_named_by_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "cut.json"
    path.write_text('{"rows": [')
    assert main([*FIDELITY, "--output", str(path)]) == 1
    assert f"output {str(path)!r} is no JSON, or was cut off" in capsys.readouterr().err
    assert path.read_text() == '{"rows": ['
