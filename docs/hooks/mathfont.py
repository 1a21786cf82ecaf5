"""Gives the site a mathematical font of its own, so that formulas look alike everywhere and nothing is fetched.

An mkdocs hook. Browsers lay MathML out by the tables of an OpenType mathematical font; without one, large operators,
accents and indices are misplaced. STIX Two Math (SIL Open Font License 1.1) comes with the package ziamath; the
characters that formulas use are written to the site as one WOFF file. Nothing of the font is in the repository.
"""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

from fontTools import subset
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

FONT = "fonts/STIXTwoMath-Regular.ttf"
TARGET = "assets/fonts/stix-two-math.woff"
# Latin, Greek, punctuation, arrows, operators, brackets and the mathematical alphabets.
CHARACTERS = [
    (0x20, 0x17F), (0x2B0, 0x36F), (0x370, 0x3FF), (0x2000, 0x206F), (0x20D0, 0x20F0), (0x2100, 0x22FF),
    (0x2308, 0x230B), (0x23DC, 0x23E1), (0x25A0, 0x25FF), (0x27E6, 0x27EF), (0x2A00, 0x2AFF), (0x1D400, 0x1D7FF),
]  # fmt: skip


def find_font() -> Path:
    """Where the installed package has the font."""
    spec = importlib.util.find_spec("ziamath")
    if spec is None or not spec.submodule_search_locations:
        raise PluginError(
            "the site's mathematical font comes with the package ziamath; run pip install 'momentkv[docs]'"
        )
    path = Path(spec.submodule_search_locations[0]) / FONT
    if not path.is_file():
        raise PluginError(f"the package ziamath has no {FONT}; install the version in .ci/constraints.txt")
    return path


def compress(path: Path) -> bytes:
    """The font with the characters of formulas alone, as WOFF; its tables for mathematics and its licence stay."""
    options = subset.Options(flavor="woff", layout_features=["*"], name_IDs=["*"], hinting=False, notdef_outline=True)
    font = subset.load_font(path, options)
    # Primes and other marks are drawn for superscripts: Chromium finds these forms with the letters' scripts alone.
    table = font["GSUB"].table
    forms = {i for i, record in enumerate(table.FeatureList.FeatureRecord) if record.FeatureTag == "ssty"}
    for script in table.ScriptList.ScriptRecord:
        script.Script.DefaultLangSys.FeatureIndex = sorted(forms.union(script.Script.DefaultLangSys.FeatureIndex))
    chosen = subset.Subsetter(options)
    chosen.populate(unicodes=[code for first, last in CHARACTERS for code in range(first, last + 1)])
    chosen.subset(font)
    out = io.BytesIO()
    font.flavor = "woff"
    font.save(out)
    return out.getvalue()


def on_files(files: Any, *, config: Any, **_: Any) -> Any:
    """Called by mkdocs with the files of the site."""
    files.append(File.generated(config, TARGET, content=compress(find_font())))
    return files
