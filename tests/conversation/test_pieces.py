"""Thoughts and words apart, however a reply is cut into pieces."""

import pytest

from chatmagic.conversation.pieces import AllThought, Heard, Notice, Parting, Thought, mended

GPT_OSS = {
    "openings": ("<|channel|>analysis<|message|>",),
    "closing": "<|end|>",
    "lead": "<|start|>assistant<|channel|>final<|message|>",
}
CASES = {
    "no thought": ({}, "Hi <b>", "", "Hi <b>"),
    "whitespace before words is theirs": ({}, "\n Hi\n", "", "\n Hi\n"),
    "a thought": ({}, "<think>\nHm.\n\nYes\n</think>\n\nHi\n", "Hm.\n\nYes", "Hi\n"),
    "an empty thought": ({}, "<think>\n\n</think>\n\nHi", "", "Hi"),
    "a thought that never ends": ({}, "<think>\nHm. </thi\n", "Hm. </thi", ""),
    "nothing": ({}, "", "", ""),
    "half an opening": ({}, "\n<thin", "", "\n<thin"),
    "a tag in the words": ({}, "Write <think> first, then </think>.", "", "Write <think> first, then </think>."),
    "an example of tags": ({}, "So:\n<think>\nHm\n</think>\n\nYes", "", "So:\n<think>\nHm\n</think>\n\nYes"),
    "a second closing": ({}, "<think>a</think>b\n</think>\n\nc", "a", "b\n</think>\n\nc"),
    "a closing that nothing opened": ({}, "Hm\n</think>\n\nHi", "Hm", "Hi"),
    "opened by the prompt": ({"opened": True}, "Hm\n</think>\n\nHi", "Hm", "Hi"),
    "opened by the prompt, closed at once": ({"opened": True}, "</think>\n\nHi", "", "Hi"),
    "opened by the prompt, never closed": ({"opened": True}, "Hm", "Hm", ""),
    "channels": (GPT_OSS, f"{GPT_OSS['openings'][0]}Hm<|end|>{GPT_OSS['lead']}Hi", "Hm", "Hi"),
}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("marks, text, thought, words", CASES.values(), ids=CASES)
def test_parting(marks, text, thought, words, size):
    parting, heard = Parting(**marks), Heard(lambda piece: None)
    for start in range(0, len(text), size):
        for piece in parting.push(text[start : start + size]):
            heard(piece)
    for piece in parting.flush():
        heard(piece)
    assert ("".join(heard.thought).strip(), "".join(heard.said)) == (thought, words)
    assert Parting(**marks).part(text) == (thought, words.strip())


def test_pieces_are_not_held_back_without_need():
    parting = Parting()
    assert [parting.push(piece) for piece in ("<think>", "a", " b", "</", "think>", "\n\n", "c", " d")] == [
        *([], ["a"], [" b"], [], [], [], ["c"], [" d"])
    ]
    plain = Parting()
    assert [plain.push(piece) for piece in ("a", " b", "\n", "c")] == [["a"], [" b"], [], ["\nc"]]


def test_mended_pieces_keep_their_kind():
    pieces = [Thought("a\ud83d"), Thought("\ude42"), "b\udc00", Notice("n"), AllThought(), "\ud83d"]
    mended_pieces = list(mended(pieces))
    assert mended_pieces == ["a", "🙂", "b\ufffd", "n", "", "", "\ufffd"]
    assert list(map(type, mended_pieces)) == [Thought, Thought, str, Notice, AllThought, str, str]


def test_a_notice_is_a_line_of_its_own():
    written = []
    heard = Heard(written.append)
    for piece in (Notice("busy"), "a", Notice("cut"), Notice("also")):
        heard(piece)
    assert "".join(written) == "[busy]\na\n[cut]\n[also]\n" and heard.notices == ["busy", "cut", "also"]
