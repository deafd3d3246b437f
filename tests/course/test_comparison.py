"""The table of before and after: whole replies, what changed marked with more than colour."""

import re
from html import unescape

from chatmagic.course import before_after
from chatmagic.course.comparison import marked

BEFORE = {"你是谁？": "我是 Qwen。\n很高兴见到你。", "2 + 2?": "It is <4>.", "Who?": "It were William Shakespeare."}
AFTER = {"2 + 2?": "It is <4>.", "你是谁？": "我叫梦中情炉。", "Who?": "It was William Shakespeare."}


def text(html):
    return unescape(re.sub("<[^>]+>", "", html))


def new(html):
    return re.findall("<ins[^>]*>(.*?)</ins>", html)


def cells(html):
    rows = re.findall("<tr>(.*?)</tr>", html, re.DOTALL)[1:]
    return [re.findall("<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in rows]


def test_replies_are_whole_and_in_the_questions_order():
    table = before_after(BEFORE, AFTER)
    rows = [[text(cell) for cell in row] for row in cells(table._repr_html_())]
    assert rows == [
        ["≠", "你是谁？", "我是 Qwen。\n很高兴见到你。", "我叫梦中情炉。"],
        ["=", "2 + 2?", "It is <4>.", "It is <4>."],
        ["≠", "Who?", "It were William Shakespeare.", "It was William Shakespeare."],
    ]
    assert repr(table).splitlines() == [
        "≠ 你是谁？",
        "    before  我是 Qwen。",
        "            很高兴见到你。",
        "    after   我叫梦中情炉。",
        "= 2 + 2?",
        "    both    It is <4>.",
        "≠ Who?",
        "    before  It were William Shakespeare.",
        "    after   It was William Shakespeare.",
    ]


def test_only_what_is_new_is_marked_and_by_an_element():
    rows = cells(before_after(BEFORE, AFTER)._repr_html_())
    assert [new(row[3]) for row in rows] == [["我叫梦中情炉。"], [], ["was"]]


def test_a_word_in_other_letters_ends_where_chinese_begins():
    assert new(marked("我叫Qwen是模型", "我叫Tom是模型")) == ["Tom"]
    assert new(marked("a模型", "a机型")) == ["机"]


def test_a_reply_stays_the_same_text_wherever_it_is_marked():
    replies = ["", "a", "a b <c> & d", "甲乙丙", "甲乙丁丙\n戊", "a c b"]
    for before in replies:
        for after in replies:
            assert text(marked(before, after)) == after


def test_text_of_a_model_is_text():
    table = before_after({"<b>\x1b?": "<i>\x1b[1m"}, {"<b>\x1b?": "<script>\x1b[31m"})
    html = table._repr_html_()
    assert "<script>" not in html and "<b>\N{SYMBOL FOR ESCAPE}?" not in html and "<i>" not in html
    assert "\x1b" not in html and "\x1b" not in repr(table)
