"""The pictures of a run, and their glyphs."""

import math
from pathlib import Path

import pytest

from chatmagic.training import plots
from chatmagic.training.plots import LiveCurve
from tiny_runs import adalora, fit


@pytest.mark.slow
def test_pictures_lie_beside_the_adapter(tmp_path):
    fit(adalora(), tmp_path, plot=True)
    for name in ("history", "ranks", "importance"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_chinese_label_has_its_glyphs():
    from fontTools.ttLib import TTFont

    from chatmagic.training import plots

    glyphs = TTFont(plots.FONT).getBestCmap()
    labels = {character for character in Path(plots.__file__).read_text() if ord(character) > 0x2FFF}
    assert len(labels) > 10 and labels <= {chr(code) for code in glyphs}


@pytest.mark.slow
def test_the_curve_has_no_star_before_an_epoch_counts(tmp_path, monkeypatch):
    """And no picture before there is something to see: each is looked at as it is drawn."""
    drawn = []
    draw = LiveCurve.update_graph

    def seen(self, model, *args, **options):
        draw(self, model, *args, **options)
        stars = [line for line in self.graph_ax.lines if line.get_marker() == "*"]
        places = [x for line in stars for x in line.get_xdata() if not math.isnan(x)]
        drawn.append((len(model.history["epoch"]), places, self.graph_ax.get_title(), model.best))

    monkeypatch.setattr(LiveCurve, "update_graph", seen)
    fit(adalora(), tmp_path, plot=True)
    assert [epochs for epochs, *_ in drawn][:2] == [1, 2]
    without = [each for each in drawn if each[3] is None]
    assert without and all(places == [] and "no epoch counts" in title for _, places, title, _ in without)
    _, places, title, best = drawn[-1]
    assert places == [best["epoch"]] and f"@epoch {best['epoch']}" in title


def test_the_bar_counts_the_steps_and_says_the_epoch(tmp_path, monkeypatch):
    shown = []

    class Bar(plots.Bar):
        def update(self, by=1):
            super().update(by)
            shown.append((self.n, self.total, self.postfix))

    monkeypatch.setattr(plots, "Bar", Bar)
    fit(adalora(), tmp_path)
    steps = [step for step, _, _ in shown]
    assert shown[0] == (1, 40, "epoch 1 of 10") and steps[-1] == 40 and steps == sorted(steps)
    assert len(set(steps)) > 30
