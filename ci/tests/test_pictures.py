# SPDX-License-Identifier: Apache-2.0
"""The concepts' pictures are drawn from the code as it is, and their labels do not collide."""

import sys
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs"))
pictures = pytest.importorskip("pictures")


@pytest.mark.parametrize("draw", pictures.DRAWN, ids=lambda draw: draw.__name__)
def test_labels_do_not_collide(draw, monkeypatch):
    figures = []
    monkeypatch.setattr(pictures, "save", lambda figure, name: figures.append(figure))
    draw()
    renderer = FigureCanvasAgg(figures[0]).get_renderer()
    figures[0].draw(renderer)
    texts = [text for ax in figures[0].axes for text in [*ax.texts, ax.title, ax._left_title] if text.get_text()]
    boxes = [(text.get_text(), text.get_window_extent(renderer).shrunk(0.98, 0.8)) for text in texts]
    assert [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)] == []
