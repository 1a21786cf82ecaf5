"""Which code measured: other files, names or contents are other code, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import momentkv
from momentkv.evaluation.code import code_version, digest_of_source


def test_results_say_by_which_code(tmp_path: Path):
    def digest(files: dict[str, str]) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return digest_of_source(folder)

    same = digest({"a.py": "1", "b/c.py": "2"})
    assert same == digest({"b/c.py": "2", "a.py": "1", "b/d.txt": "no code"})
    others = ({"a.py": "1", "b/c.py": "3"}, {"a.py": "1", "b/e.py": "2"}, {"a.py": "12", "b/c.py": ""}, {"a.py": "1"})
    assert len({same, *map(digest, others)}) == 5
    assert digest({"a.py": "1b/c.py2"}) != same  # the same letters one behind the other
    assert code_version() == f"{momentkv.__version__}+{digest_of_source(Path(momentkv.__file__).parent)}"
