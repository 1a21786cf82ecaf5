"""Models by a name, a folder or a GGUF file; what is none of these says so before anything is read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from models import real, save_with_bytes

from momentkv.cli import main
from momentkv.evaluation.sources import built_in, load_model, located


@pytest.mark.model
def test_a_gguf_file_is_a_model_by_its_path_and_by_its_folder(tmp_path: Path):
    folder, file = built_in()
    assert located(str(Path(folder) / file)) == (folder, file)  # what is loaded where no model is named
    (tmp_path / "model.GGUF").symlink_to(Path(folder) / file)
    assert located(str(tmp_path)) == (str(tmp_path), "model.GGUF")
    model, tokenizer = real()  # was loaded so; reading such a file takes twenty seconds
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "momentkv"
    assert tokenizer.decode(tokenizer("What is left?").input_ids) == "What is left?"


def test_a_folder_with_a_configuration_is_not_searched_for_gguf_files(tmp_path: Path):
    save_with_bytes(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    assert load_model(str(tmp_path))[0].config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "a folder with neither config.json nor a GGUF file; name the folder of a model"),
        (["notes.txt"], "a folder with neither config.json nor a GGUF file"),
        (["b.gguf", "a.gguf"], "a folder with 2 GGUF files: a.gguf, b.gguf; name one"),
    ],
)
def test_a_folder_that_is_no_model_says_what_it_holds(
    files: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name in files:
        (tmp_path / name).touch()
    assert main(["evaluate", "gap", "--model", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"momentkv: model is '{tmp_path}', ")
    assert message in err
    assert err.count("\n") == 1


def test_a_gguf_file_that_is_not_there_is_not_looked_up(tmp_path: Path):
    with pytest.raises(ValueError, match=r"model is '.*x\.gguf', but there is no such file"):
        load_model(str(tmp_path / "x.gguf"))


def test_a_gguf_file_without_its_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "x.gguf").touch()
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["evaluate", "gap", "--model", str(tmp_path / "x.gguf")]) == 1
    assert capsys.readouterr().err == (
        "momentkv: x.gguf is a GGUF file, which the package gguf reads; it is missing; "
        "run pip install 'momentkv[demo]'\n"
    )
