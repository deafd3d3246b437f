"""Widths, control characters and spellings: what every message and table shares."""

import sys
from unicodedata import bidirectional, category

import pytest

from chatmagic.text import did_you_mean, fit, mend, nearest, visible, width


@pytest.mark.parametrize(
    "text, columns, shown",
    [
        ("你是谁", 8, "你是谁  "),
        ("a b\n c", 6, "a b c "),
        ("你是谁呀", 6, "你是… "),
        ("abcdef", 4, "abc…"),
        ("ab", 2, "ab"),
    ],
)
def test_a_table_cell_fits_its_columns(text, columns, shown):
    assert fit(text, columns) == shown and width(shown) == columns


def test_no_control_character_reaches_a_terminal():
    shown = visible("".join(map(chr, range(0x100))))
    assert [char for char in shown if ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0] == ["\t", "\n"]
    assert visible("\x1b[31m红\x00\x7f") == "␛[31m红␀␡"


def test_what_is_shown_is_what_a_terminal_obeys_and_no_other_character():
    """Control characters, halves of characters, and what turns the direction of writing, by Unicode's own tables."""
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    every = [*map(chr, range(sys.maxunicode + 1))]
    obeyed = {c for c in every if category(c) in ("Cc", "Cs") or bidirectional(c) in turning} - {"\n", "\t"}
    assert {char for char in every if visible(char) != char} == obeyed
    assert visible("\u202e\ud83d") == "<U+202E>\ufffd"


def test_halves_are_joined():
    assert mend("\ud83d\ude42 你") == "🙂 你" and mend("a\ud83d") == "a\ufffd"


def test_spellings():
    assert did_you_mean("Temprature", ["top_p", "temperature"]) == "; did you mean 'temperature'?"
    assert did_you_mean("abcd", ["abce", "abcf", "xyz"]) == "; did you mean 'abcf' or 'abce'?"
    assert did_you_mean("zzz", ["a", "b"]) == "" and nearest("zzz", ["A", "b"], cutoff=0) == ["b", "A"]
