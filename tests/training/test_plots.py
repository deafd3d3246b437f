"""The pictures of a run, and their glyphs."""

from pathlib import Path

from tiny_runs import adalora, fit


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
