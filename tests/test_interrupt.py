"""Ctrl-C: one line that says what was kept and how to go on, status 130, and no process left behind.

Each test waits for what a command writes before it sends the signal, never for a time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from models import save_with_bytes

from momentkv.cli import main
from momentkv.evaluation.processes import interrupts_later
from momentkv.evaluation.report import read_json

# A background job of a shell ignores SIGINT, and so would what it starts.
HEARS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
RUN = HEARS + "import runpy; runpy.run_module('momentkv', run_name='__main__', alter_sys=True)"
# Where each command is stopped; all in one process, since most import torch.
PLACES = {
    "demo": "momentkv.demo.load_model",
    "evaluate fidelity": "momentkv.evaluation.commands.load_model",
    "evaluate fidelity --output old.json": "momentkv.evaluation.commands.load_model",
    "evaluate fidelity --output old.json --fresh": "momentkv.evaluation.commands.load_model",
    "evaluate needles": "momentkv.evaluation.needles.load_model",
    "evaluate gap": "momentkv.evaluation.commands.load_model",
    "evaluate trust": "momentkv.evaluation.trust.load_model",
    "evaluate stream": "momentkv.evaluation.stream.load_model",
    "evaluate speed": "momentkv.evaluation.speed.in_a_process",
    "evaluate suite": "momentkv.evaluation.suite.run_all",
    "evaluate report": "momentkv.evaluation.report_page.write_report",
    "evaluate tradeoff a b": "momentkv.evaluation.tradeoff.read_json",
    "bench": "momentkv.evaluation.bench.measurements",
    "plan SmolLM2-135M --context 9 --budget 64": "momentkv.plan.plan",
    "lm-eval run": "momentkv.evaluation.lm_eval.main",
    "lm-eval run --use_cache x": "momentkv.evaluation.lm_eval.main",
}
STOPPED = (
    HEARS
    + f"places = {PLACES!r}"
    + """
import importlib, sys, types
# Whether lm_eval is installed or not.
sys.modules["momentkv.evaluation.lm_eval"] = types.ModuleType("momentkv.evaluation.lm_eval")
from momentkv.cli import main

def stop(*_, **__):
    print("ready", flush=True)
    signal.pause()

for words, place in places.items():
    module, _, name = place.rpartition(".")
    setattr(importlib.import_module(module), name, stop)
    print(main(words.split()), flush=True)
"""
)


def start(*command: str | Path, folder: Path, **more: object) -> subprocess.Popen[str]:
    """Python in a session of its own, so that the signal of a terminal can be sent to all that it starts."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], cwd=folder, start_new_session=True, **pipes, **more)


def test_every_command_ends_in_one_line_and_130(tmp_path: Path):
    (tmp_path / "old.json").write_text('{"protocol": {}, "rows": []}')
    process = start("-c", STOPPED, folder=tmp_path)
    for words in PLACES:
        while (line := process.stdout.readline().strip()) != "ready":  # rich may have something to say before
            assert process.poll() is None, (words, line, process.stderr.read())
        process.send_signal(signal.SIGINT)
        while not (line := process.stdout.readline().strip()).isdigit():
            assert process.poll() is None, (words, line, process.stderr.read())
        assert line == "130", words
    _, err = process.communicate()
    lines = dict(zip(PLACES, err.splitlines(), strict=True))
    kept = "what was measured is in {}, and the same command goes on from there"
    goes_on = {
        "evaluate fidelity --output old.json": kept.format("old.json"),
        "evaluate suite": kept.format("results/suite"),
        "lm-eval run": "nothing was written; with --use_cache FILE lm_eval goes on where it was",
        "lm-eval run --use_cache x": "lm_eval goes on from its cache when the same command is run again",
    }
    for words, line in lines.items():
        assert line == f"momentkv: interrupted; {goes_on.get(words, 'nothing was written; run it again')}"


def test_an_interrupted_measurement_is_kept_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    model = save_with_bytes(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    # So many settings that it is still at work when the first has been written, on any machine.
    source = ["--text", "compound", "--context", "200", "--following", "64"]
    command = ["evaluate", "fidelity", "--model", model, *source]
    many = ["--budgets", *map(str, range(100, 1100)), "--policies", "streaming", "h2o", "--corrections", "none"]
    process = start("-c", RUN, *command, *many, folder=tmp_path)
    results = tmp_path / "results" / "fidelity.json"
    while not results.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    place = Path("results") / "fidelity.json"
    kept = f"what was measured is in {place}, and the same command goes on from there"
    assert err == f"momentkv: interrupted; {kept}\n"
    content = read_json(results)
    assert not content["complete"]
    rows = content["rows"]
    # What is there is not measured again.
    monkeypatch.setattr("momentkv.evaluation.commands.measure", None)
    few = ["--budgets", str(rows[0]["bytes_as_tokens"]), "--policies", rows[0]["policy"], "--corrections", "none"]
    assert main([*command, *few]) == 0
    assert f"{len(rows)} results found" in " ".join(capsys.readouterr().out.split())
    assert read_json(results)["rows"] == rows


def test_the_suite_ends_its_measurements(tmp_path: Path):
    model = save_with_bytes(tmp_path / "model")
    process = start("-c", RUN, "evaluate", "suite", "--smoke", "--model", model, "--workers", "2", folder=tmp_path)
    # All of a terminal's processes get the signal.
    while len(list(tmp_path.glob("results/suite/smoke/*/*.log"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    place = Path("results") / "suite"
    kept = f"what was measured is in {place}, and the same command goes on from there"
    assert err == f"momentkv: interrupted; {kept}\n"
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert all("Traceback" not in log.read_text() for log in tmp_path.glob("results/suite/smoke/*/*.log"))


def test_an_interrupt_waits_for_the_end_of_the_block():
    after = []

    def block() -> None:
        with interrupts_later():
            signal.raise_signal(signal.SIGINT)
            after.append(1)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            block()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.signal(signal.SIGINT, before)
    assert after


WORKS = """
import os, signal, sys, time
from momentkv.evaluation.processes import in_a_process

def works(what):
    if what == "hangs":
        print(os.getpid(), flush=True)
        time.sleep(3600)
    if what == "fails":
        raise ValueError("budget is too small")
    if what == "is killed":
        signal.raise_signal(signal.SIGKILL)
    return what

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        print(in_a_process(works, sys.argv[1]))
    except (KeyboardInterrupt, ValueError, ChildProcessError) as error:
        print(repr(error))
"""


def test_a_process_of_its_own_ends_with_the_command_and_says_nothing(tmp_path: Path):
    (tmp_path / "works.py").write_text(WORKS)
    process = start("works.py", "hangs", folder=tmp_path)
    worker = int(process.stdout.readline())
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate() == ("KeyboardInterrupt()\n", "")
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("returns", "returns"),
        ("fails", "ValueError('budget is too small')"),
        ("is killed", "ChildProcessError('the process that ran works ended with status -9 and no answer; "),
    ],
)
def test_a_process_of_its_own_gives_what_the_function_gives(what: str, said: str, tmp_path: Path):
    (tmp_path / "works.py").write_text(WORKS)
    out, err = start("works.py", what, folder=tmp_path).communicate()
    assert out.startswith(said)
    assert not err
