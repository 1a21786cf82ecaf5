"""Models by a name, a folder or a GGUF file; what is none of these says so before anything is read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import real, save_with_bytes

from momentkv.cli import main
from momentkv.evaluation.sources import built_in, load_model, located


@pytest.mark.model
def test_the_model_that_is_loaded_where_none_is_named_is_a_gguf_file():
    folder, file = built_in()
    assert located(str(Path(folder) / file)) == (folder, file)
    model, tokenizer = real()
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "momentkv"
    assert tokenizer.decode(tokenizer("What is left?").input_ids) == "What is left?"


@pytest.mark.parametrize("named", ["model.GGUF", "."])
def test_a_gguf_file_is_a_model_by_its_path_and_by_its_folder(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What transformers is asked for: it takes twenty seconds to read a real one."""
    asked = []

    class Loaded:
        @classmethod
        def from_pretrained(cls, *arguments: Any, **options: Any) -> Loaded:
            asked.append((arguments, options))
            return cls()

        def to(self, device: str) -> Loaded:
            return self

        def eval(self) -> Loaded:
            return self

    for kind in ("AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(f"momentkv.evaluation.sources.{kind}", Loaded)
    (tmp_path / "model.GGUF").touch()
    load_model(str(tmp_path / named))
    place, file = (str(tmp_path),), {"gguf_file": "model.GGUF"}
    assert asked == [(place, file), (place, {"dtype": "float32", "attn_implementation": "momentkv", **file})]


def test_a_gguf_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """For the tokenizer and for the model; afterwards the package is as it was."""
    gguf, parsed = pytest.importorskip("gguf"), []

    def parse(*arguments: Any) -> object:
        parsed.append(arguments)
        return object()

    class Loaded:
        @staticmethod
        def from_pretrained(folder: str, *, gguf_file: str, **options: Any) -> Any:
            read = [gguf.GGUFReader(f"{folder}/{gguf_file}") for _ in range(2)]
            named = [gguf.get_tensor_name_map("llama", layers) for layers in (2, 2, 3)]
            assert read[0] is read[1]
            assert named[0] is named[1] is not named[2]
            return torch.nn.Module()

    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, parse)
    for kind in ("AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(f"momentkv.evaluation.sources.{kind}", Loaded)
    path = tmp_path / "model.gguf"
    path.touch()
    for times in (1, 2):  # another load parses again: the file may have changed
        load_model(str(path))
        assert parsed == [(str(path),), ("llama", 2), ("llama", 3)] * times
        assert gguf.GGUFReader is gguf.get_tensor_name_map is parse


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
    with pytest.raises(ValueError, match=r"model is '.*x', but there is no such folder"):
        load_model(str(tmp_path / "x"))


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
