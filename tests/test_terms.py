"""docs/terms.md: each of its words is used in its language, and none of their rivals is."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_PROSE = re.compile(
    r"^( *)```.*?^\1```|`[^`\n]*`|\]\([^)]*\)|https?://\S+|\b\d\d-[a-z-]+\b", re.DOTALL | re.MULTILINE
)
SHARED = {"terms", "template-list"}  # pages for readers of both languages


def rows() -> list[list[str]]:
    lines = (ROOT / "docs/terms.md").read_text("utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return cells[1:]


def prose() -> dict[str, str]:
    """What is written for readers, without code and addresses, by language."""
    texts = {"en": "", "zh": ""}
    for path in [path for where in ("README*.md", "docs/*.md", "benchmarks/*.md") for path in ROOT.glob(where)]:
        if path.stem not in SHARED:
            texts["en" if ".en." in path.name else "zh"] += NOT_PROSE.sub(" ", path.read_text("utf-8")) + "\n"
    for language, pattern in (("zh", "*.ipynb"), ("en", "en/*.ipynb")):
        for path in (ROOT / "notebooks").glob(pattern):
            cells = nbformat.read(path, as_version=4).cells
            told = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
            texts[language] += NOT_PROSE.sub(" ", told) + "\n"
    return texts


PROSE = prose()


def uses(language: str, term: str) -> list[str]:
    """Where a text has a term, with what stands around it; an English one may go on (`quantised`, `steps`)."""
    text = PROSE[language]
    pattern = rf"\b(?i:{re.escape(term)})" if language == "en" else re.escape(term)
    return [text[max(found.start() - 30, 0) : found.end() + 10] for found in re.finditer(pattern, text)]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_term(row):
    english, english_rivals, chinese, chinese_rivals, meaning, chinese_meaning = row
    assert meaning and chinese_meaning
    for language, term, rivals in (("en", english, english_rivals), ("zh", chinese, chinese_rivals)):
        assert uses(language, term), f"nothing says {term!r}"
        assert {rival: uses(language, rival) for rival in rivals.split(", ") if rival and uses(language, rival)} == {}


def test_the_table_has_each_term_once():
    for column in (0, 2):
        terms = [row[column] for row in rows()]
        assert len(terms) > 40 and len({*terms}) == len(terms)
