"""Tokens that become text: whole characters, and nothing from a stop string on."""

from chatmagic.backends.streaming import StopStrings, TextStream
from chatmagic.conversation.pieces import Thought


def test_pieces_join_to_the_text_of_every_family(family):
    _, tokenizer, _ = family
    text = "你好，世界！ Two  spaces,\n\n　１２３ 🙂🏳️‍🌈 café ꧁ def f(x):\n\treturn x"
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer, [])
    pieces = [stream.push(token) for token in ids] + [stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert "\ufffd" not in "".join(pieces)


def test_characters_and_stop_strings_arrive_whole(tokenizer):
    ids = tokenizer.encode("你好🙂 a#b ##c\n##END and more", add_special_tokens=False)
    stream = TextStream(tokenizer, ["##END", "</s>"])
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stop.found:
            break
    assert stream.flush() == "" and stream.stop.found
    assert [piece for piece in pieces if piece] == [*"你好🙂", " ", "a", "#b", " ", "##c", "\n"]


def test_an_unfinished_character_or_stop_string_is_shown_in_the_end(tokenizer):
    stream = TextStream(tokenizer, ["##END"])
    ids = tokenizer.encode("a##E你", add_special_tokens=False)
    pieces = [stream.push(token) for token in ids[:-1]]
    assert "".join(pieces) == "a" and stream.flush() == "##E\ufffd"


def test_a_stop_string_ends_words_and_no_thought():
    stop = StopStrings(["\n\n"])
    pieces = [Thought("let me\n\n"), Thought("see"), "a", "\n", "b\n", "\nc", "d"]
    assert [stop.push(piece) for piece in pieces] == [Thought("let me\n\n"), Thought("see"), "a", "", "\nb", "", ""]
    assert stop.found and stop.flush() == ""
