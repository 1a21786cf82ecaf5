"""Plots of commands: what is written on them is within them."""

from __future__ import annotations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_report import FULL, OURS, PEER, fidelity_rows, needle_rows

from momentkv.evaluation.lines import fidelity_lines, needle_lines, needles_of
from momentkv.evaluation.report_plots import plot_found, plot_kl

LONG = "folder/of/models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf: needles in " + "+".join(["comparisons"] * 6)


@pytest.mark.parametrize("kind", ["fidelity", "needles"])
@pytest.mark.parametrize("title", ["a model: a text", LONG], ids=["short", "long"])
def test_a_title_is_within_its_plot(title: str, kind: str):
    """Of a model in a folder and a text of many topics it was cut off at both ends."""
    if kind == "fidelity":
        figure = plot_kl(fidelity_lines(fidelity_rows()), bits=16, title=title)
    else:
        lines = needle_lines(needles_of(needle_rows({FULL: [1, 1], OURS: [1, 0], PEER: [0, 0]})))
        figure = plot_found(lines, bits=16, title=title)
    FigureCanvasAgg(figure).draw()
    (written,) = (text for text in figure.texts if text.get_text().startswith(title[:7]))
    box = written.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert written.get_text().replace("\n", "").replace(" ", "") == title.replace(" ", "")
    assert ("\n" in written.get_text()) == (title == LONG)
