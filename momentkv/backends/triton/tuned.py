"""Sizes of the decode kernel that were measured to be best on a device: where they are kept, and when they count.

``python -m momentkv.testing.gpu.tuning`` measures them, when a person says so; nothing is measured while a model
decodes. There is one small JSON file for each kind of GPU, which is read at the first launch. Without one, or where it
is of other kernels, sizes are those of `momentkv.backends.triton.decode.decode_blocks`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

__all__ = [
    "VARIABLE",
    "Choice",
    "Choices",
    "Family",
    "about_device",
    "candidates",
    "chosen",
    "path_of",
    "read",
    "write",
]

# Folder of the files, in the environment; nothing is read if it is empty.
VARIABLE = "MOMENTKV_TUNED"
AGAIN = "run python -m momentkv.testing.gpu.tuning to measure again, or delete the file"


class Family(NamedTuple):
    """Launches of the decode kernel that share a choice.

    Attributes
    ----------
    dtype : str
        Of queries.
    queries, d, dv : int
        Queries of a group in one tile; dimension of keys and of values, padded.
    estimate : str
        ``"none"``, ``"moments"`` (one set of them) or ``"summaries"`` (several).
    bits : int
        Of a number of a key and one of a value together, where tokens are records of few; 0 where they are vectors.
    """

    dtype: str
    queries: int
    d: int
    dv: int
    estimate: str
    bits: int


class Choice(NamedTuple):
    """What may differ from device to device, and changes no result but by rounding.

    Attributes
    ----------
    tokens : int
        Of a tile.
    num_warps, num_stages : int
        Of a block; tiles in flight.
    waves : int
        Least number of blocks of the sequence for each multiprocessor.
    """

    tokens: int
    num_warps: int
    num_stages: int
    waves: int


Choices = Mapping[Family, Choice]
# What a file may say: anything else was not written here.
ALLOWED: dict[str, tuple[int, ...]] = {
    "tokens": (16, 32, 64, 128, 256),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
    "waves": (1, 2, 3),
}


def candidates(builtin: Choice, *, coded: bool = False) -> list[Choice]:
    """The built-in choice, and the handful around it that are tried on a device; all keep its waves.

    Of records each warp multiplies tokens of its own, sixteen at least.

    Examples
    --------
    >>> len(candidates(Choice(tokens=64, num_warps=4, num_stages=2, waves=1)))
    8
    """
    tiles = [builtin.tokens, 2 * builtin.tokens, builtin.tokens // 2]
    least, most = (16 * builtin.num_warps, 256) if coded else (16, 128)
    tiles = [n for n in tiles if least <= n <= most]
    stages = [builtin.num_stages, *(s for s in (ALLOWED["num_stages"] if coded else (2, 3)) if s != builtin.num_stages)]
    made = [builtin._replace(tokens=n, num_stages=s) for n in tiles for s in stages]
    if not coded:
        made += [builtin._replace(tokens=n, num_warps=12 - builtin.num_warps) for n in tiles[:2]]
    return made[:8]


def about_device(device: torch.device) -> dict[str, Any]:
    """What a choice depends on besides its family."""
    found = torch.cuda.get_device_properties(device)
    return {
        "device": found.name,
        "capability": f"{found.major}.{found.minor}",
        "processors": found.multi_processor_count,
        "triton": triton.__version__,
        "kernels": fingerprint(),
    }


def fingerprint() -> str:
    """Of the kernels' source and of what launches them."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for path in [*sorted(folder.glob("*_kernel.py")), folder / "decode.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def path_of(about: Mapping[str, Any]) -> Path | None:
    """The file of a kind of GPU, in ``$MOMENTKV_TUNED`` or the user's cache; None for "" or no home."""
    folder = os.environ.get(VARIABLE)
    if folder == "":
        return None
    if folder is None:
        cache_home = Path(os.environ.get("XDG_CACHE_HOME", ""))
        # The XDG Base Directory Specification: a relative path is to be ignored.
        if not cache_home.is_absolute():
            try:
                cache_home = Path.home() / ".cache"
            except RuntimeError:  # a user of a container who has no home decodes all the same
                return None
        folder = str(cache_home / "momentkv" / "tuned")
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{about['device']} {about['capability']}")
    return Path(folder) / f"decode-{name}.json"


@cache
def chosen(device: torch.device) -> Choices:
    """The choices of a device, read once in a process; a file that is wrong or stale is ignored with a warning."""
    about = about_device(device)
    path = path_of(about)
    if path is None or not path.exists():
        return {}
    try:
        return read(path, about)
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} is ignored: {error}; {AGAIN}", RuntimeWarning, stacklevel=2)
        return {}


def read(path: Path, about: Mapping[str, Any]) -> dict[Family, Choice]:
    """The choices in a file.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is of another device, Triton or kernels, or says what no tuning writes.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("choices"), list):
        raise ValueError("it has no list of choices")
    for name, here in about.items():
        if content.get(name) != here:
            raise ValueError(f"its {name} is {content.get(name)!r}, and here it is {here!r}")
    choices = {}
    for each in content["choices"]:
        try:
            family, choice = Family(**each["family"]), Choice(**each["choice"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{each!r} is no choice") from error
        for name, allowed in ALLOWED.items():
            if getattr(choice, name) not in allowed:
                raise ValueError(f"{name} is {getattr(choice, name)!r}; it must be one of {allowed}")
        choices[family] = choice
    return choices


def write(path: Path, about: Mapping[str, Any], choices: Choices) -> None:
    """Write a file, whole or not at all."""
    made = [{"family": family._asdict(), "choice": choice._asdict()} for family, choice in choices.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({**about, "choices": made}, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
