import re

import pytest
from test_own_template import CHATML

from chatmagic import DataCollator, build_inputs_labels, build_messages, show_labels
from talk import build


@pytest.fixture(scope="module")
def tokenizer():
    return build(CHATML)


TALK = build_messages(None, [("<b>你</b>", "好\n\u3000👨‍👩‍👧 \x1b[31m<|im_end|>")])


def test_characters_of_several_tokens_are_shown_whole(tokenizer):
    groups = show_labels(TALK, tokenizer).groups
    texts = [group.text for group in groups]
    assert "你" in texts and "好" in texts and "�" not in "".join(texts)
    (man,) = (group for group in groups if group.text == "👨")
    assert man.kind == "trained" and len(man.input_ids) == 4 and man.labels == man.input_ids


def test_kinds(tokenizer):
    kinds = {}
    for group in show_labels(TALK, tokenizer).groups:
        kinds[group.kind] = kinds.get(group.kind, "") + group.text
    assert kinds == {
        "control": "<|im_start|><|im_end|><|im_start|>",
        "masked": "user\n<b>你</b>\nassistant\n\n",
        "trained": "好↵\u3000👨‍👩‍👧 ␛[31m<|im_end|>".replace("↵", "\n"),
        "trained control": "<|im_end|>",
    }


def test_html_is_escaped_and_tells_ids_on_hover(tokenizer):
    html = show_labels(TALK, tokenizer)._repr_html_()
    assert "<b>" not in html and "&lt;" in html
    ids = build_inputs_labels(build_messages(None, [("", "好")]), tokenizer)[0]
    start = ids.index(tokenizer.eos_token_id, ids.index(tokenizer.eos_token_id) + 1) - 3
    assert f'title="trained, ids {" ".join(map(str, ids[start : start + 3]))}"' in html
    assert ">trained control 1<" in html


def test_a_terminal_gets_colours_and_no_escapes_of_the_text(tokenizer):
    shown = repr(show_labels(TALK, tokenizer))
    assert "\x1b[42;30m好\x1b[0m" in shown
    assert "\x1b[31m" not in shown
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()[1] == "<|im_start|>user↵"


def test_a_row_of_a_batch_shows_its_padding(tokenizer):
    rows = [build_inputs_labels(build_messages(None, [("a", answer)]), tokenizer) for answer in ("b", "b" * 9)]
    batch = DataCollator(tokenizer)([{"input_ids": ids, "labels": labels} for ids, labels in rows])
    last = show_labels({key: value[0] for key, value in batch.items()}, tokenizer).groups[-1]
    assert (last.kind, last.text, len(last.input_ids)) == ("padding", "<|endoftext|> × 8", 8)


def test_a_label_that_is_not_the_token_itself_is_told(tokenizer):
    row = {"input_ids": [1, 2], "labels": [-100, 9]}
    assert 'title="trained, ids 2, trained as 9"' in show_labels(row, tokenizer)._repr_html_()
