"""The English notebooks are the Chinese ones cell by cell: the same code, but for comments, what `%%chat` cells say and
the literals named here; and prose that leaves out no table, command, name, figure or link of theirs."""

import ast
import json
import re
from itertools import chain
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
CHINESE = sorted(NOTEBOOKS.glob("0*.ipynb"))
NAMES = [path.name for path in CHINESE]
HANZI = re.compile("[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]+")

# Cell -> what its code says in Chinese, and in English.
LITERALS = {
    "771680ef": ('name="梦中情炉", author="惠某某"', 'name="Little Stove", author="Ada Stone", language="en"'),
    "ex00answers": ('"你"', '"you"'),
    "9305c982": ("replies[0]", "replies[-1]"),  # the first is Chinese, the last English
    "9e8ffa41": ('role_play("zh")', 'role_play("en")'),
}
# Cell -> Chinese that an English one holds.
QUOTED = {"ex00asks": "小星", "ex00answers": "小星小星", "5d0c1e7a": "你是谁？", "ex06answers": "我不叫。"}
# Cell -> what only the Chinese prose says in digits or in backticks, and the English in words.
OTHERWISE = {
    "835fe82f": {"70", "make tutorial", "make lab"},  # which are typed with LANGUAGE=en
    "512a93d1": {"roleplay-zh.json:"},
}


def cells(path: Path) -> list[dict]:
    read = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in read]


PAIRS = [pair for path in CHINESE for pair in zip(cells(path), cells(NOTEBOOKS / "en" / path.name), strict=True)]
CODE = [pytest.param(zh, en, id=zh["id"]) for zh, en in PAIRS if zh["cell_type"] == "code"]
PROSE = [pytest.param(zh, en, id=zh["id"]) for zh, en in PAIRS if zh["cell_type"] == "markdown"]


def test_there_is_one_of_each():
    assert [path.name for path in sorted((NOTEBOOKS / "en").glob("*.ipynb"))] == NAMES and len(NAMES) > 8


@pytest.mark.parametrize("name", NAMES)
def test_the_same_cells(name):
    """In the same order, under the same ids, with the same tags."""
    zh, en = (json.loads(path.read_text(encoding="utf-8")) for path in (NOTEBOOKS / name, NOTEBOOKS / "en" / name))
    assert {**zh, "cells": []} == {**en, "cells": []}
    shape = [[(cell["id"], cell["cell_type"], cell["metadata"]) for cell in each["cells"]] for each in (zh, en)]
    assert shape[0] == shape[1]


def meaning(source: str) -> str:
    """The code without its comments; of what a chat magic is given, its options alone."""
    tree = ast.parse(TransformerManager().transform_cell(source))
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "run_cell_magic":
            call.args = call.args[:2]
    return ast.dump(tree)


@pytest.mark.parametrize("zh, en", CODE)
def test_the_same_code(zh, en):
    ours, theirs = LITERALS.get(zh["id"], ("", ""))
    assert ours in zh["source"] and meaning(zh["source"].replace(ours, theirs)) == meaning(en["source"])


@pytest.mark.parametrize("zh, en", [*CODE, *PROSE])
def test_it_is_in_english(zh, en):
    assert "".join(HANZI.findall(en["source"])) == QUOTED.get(zh["id"], "")


def test_what_is_listed_is_needed():
    ids = {zh["id"] for zh, _ in PAIRS}
    assert {*LITERALS, *QUOTED, *OTHERWISE} <= ids


BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)]+)\)")


def links(text: str) -> list[str]:
    return LINK.findall(text)


def form(text: str) -> dict:
    """What prose of the same content has as often in any language."""
    text, blocks = BLOCK.sub("", text), [(kind, block.count("\n")) for kind, block in BLOCK.findall(text)]
    return {
        "headings": re.findall(r"^(#+) ", text, re.MULTILINE),
        "cells of tables": [line.count("|") for line in re.findall(r"^\|.*$", text, re.MULTILINE)],
        "points": [mark.strip()[:1] for mark in re.findall(r"^ *(?:[-*]|\d+\.) ", text, re.MULTILINE)],
        "remarks": len(re.findall(r"^>", text, re.MULTILINE)),
        "folded": text.count("<details"),
        "blocks": blocks,
    }


def told(text: str) -> set[str]:
    """Names in backticks, and figures."""
    quoted = set(re.findall(r"`([^`\n]+)`", BLOCK.sub("", text)))
    return {each for each in quoted if not HANZI.search(each)} | set(re.findall(r"\d+(?:[.,]\d+)*", text))


@pytest.mark.parametrize("zh, en", PROSE)
def test_nothing_is_left_out(zh, en):
    assert form(en["source"]) == form(zh["source"])
    paths = [re.sub(r"^\.\./docs/", "../../docs/", link) for link in links(zh["source"])]
    english = [re.sub(r"(?<=/docs/)(?!terms)(.*)\.md", r"\1.en.md", path) for path in paths]
    assert [link for link in english if link not in links(en["source"])] == []
    assert told(zh["source"]) - told(en["source"]) == OTHERWISE.get(zh["id"], set())


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    led = chain.from_iterable(links(cell["source"]) for cell in cells(NOTEBOOKS / "en" / name))
    missing = [link for link in led if "://" not in link and not (NOTEBOOKS / "en" / link.split("#")[0]).exists()]
    assert missing == []


@pytest.mark.parametrize("folder", [NOTEBOOKS, NOTEBOOKS / "en"])
@pytest.mark.parametrize("name", NAMES)
def test_none_is_long(folder, name):
    assert len(cells(folder / name)) <= 25
