import copy
import json

import pytest
import torch

from chatmagic import DataCollator, load_model, read_jsonl
from chatmagic.conversation.messages import MessagesError
from chatmagic.data.dataset import Conversation, ConversationFile, DataError, Examples, encode_example, write_jsonl
from chatmagic.prompts.labels import LabelsError
from chatmagic.prompts.templates import TemplateError
from quick import first


class Tokenizer:
    pad_token, pad_token_id, padding_side = "<pad>", 0, "left"


EXAMPLES = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    {"input_ids": [8, 9, 10, 11, 12], "labels": [-100, -100, -100, -100, 12]},
]


def test_a_batch_keeps_its_order_and_is_padded_on_the_right():
    batch = DataCollator(Tokenizer())(EXAMPLES)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]],
        "labels": [[-100, 6, 7, -100, -100], [-100, -100, -100, -100, 12]],
        "attention_mask": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_padding_to_a_multiple():
    assert DataCollator(Tokenizer(), pad_to_multiple_of=8)(EXAMPLES)["labels"].shape == (2, 8)
    assert DataCollator(Tokenizer(), pad_to_multiple_of=5)(EXAMPLES)["labels"].shape == (2, 5)


def test_the_rows_of_a_conversation_are_examples_each():
    batches = DataCollator(Tokenizer())([EXAMPLES, EXAMPLES[0]]), DataCollator(Tokenizer())([*EXAMPLES, EXAMPLES[0]])
    assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[1]) and len(batches[0]["labels"]) == 3


def test_tensors_are_examples_too():
    tensors = [{key: torch.tensor(value) for key, value in example.items()} for example in EXAMPLES]
    assert torch.equal(
        DataCollator(Tokenizer())(tensors)["input_ids"], DataCollator(Tokenizer())(EXAMPLES)["input_ids"]
    )


def test_a_pad_token_that_is_also_trained_is_refused():
    class PadsWithItsEnd(Tokenizer):
        pad_token, pad_token_id = "<|im_end|>", 7

    with pytest.raises(DataError, match="Example 0 trains '<.im_end.>', .* pad token too"):
        DataCollator(PadsWithItsEnd())(EXAMPLES)


def test_no_pad_token():
    class Bare:
        pad_token = pad_token_id = None

    with pytest.raises(DataError, match="has no pad token"):
        DataCollator(Bare())


TALK = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}]
SYSTEM = [{"role": "system", "content": "S"}]


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), "utf-8")
    return path


def test_the_three_forms(tmp_path):
    path = write(
        tmp_path / "talk.jsonl",
        {"messages": SYSTEM + TALK, "id": 3},
        {
            "conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "好"}],
            "system": "S",
        },
        {"conversations": [{"from": "user", "value": "你好"}, {"from": "assistant", "value": "好"}]},
        "",
        {"instruction": "你好", "input": "", "output": "好", "system": ""},
        {"instruction": "翻译", "input": "hello", "output": "你好", "history": [["一", "二"]]},
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))  # as a Windows editor saves it
    *first, last = read_jsonl(path, progress=False)
    assert first == [SYSTEM + TALK, SYSTEM + TALK, TALK, TALK]
    assert [message["content"] for message in last] == ["一", "二", "翻译\nhello", "你好"]


@pytest.mark.parametrize(
    "row, complaint",
    [
        ('{"messages": ', "line 3: Expecting value"),
        ({"text": "你好"}, "line 3: expected an object with 'messages', .* found the keys .'text'."),
        ("[1]", "line 3: .* found a JSON list"),
        ({"messages": TALK + TALK[1:]}, "line 3: Message 2 has role 'assistant'; expected user"),
        ({"messages": "你好"}, "line 3: The messages are of type str; expected a list"),
        ({"messages": 5}, "line 3: The messages are of type int; expected a list"),
        ({"messages": []}, "line 3: The list of messages is empty"),
        ({"conversations": [{"from": "function", "value": ""}]}, "line 3: Message 0 has role 'function'"),
        ({"conversations": ["hi"]}, "line 3: 'str' object has no attribute 'get'"),
        ({"instruction": "a"}, "line 3: Message 1 .assistant. has content of type NoneType"),
        ({"instruction": 7, "output": ""}, "line 3: Message 0 .user. has content of type int"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "line 3: zip.. argument 2 is shorter"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, row, complaint):
    path = write(tmp_path / "bad.jsonl", {"messages": TALK}, "", row, {"messages": TALK})
    rows = read_jsonl(path, progress=False)
    assert next(rows) == TALK
    with pytest.raises(DataError, match=complaint):
        next(rows)


def test_a_file_is_read_as_it_is_consumed(tmp_path):
    path = write(tmp_path / "long.jsonl", *[{"messages": TALK}] * 3, "broken")
    rows = read_jsonl(path, progress=False)
    assert [next(rows) for _ in range(3)] == [TALK] * 3  # the broken line has not been looked at


def test_the_bar_counts_bytes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("chatmagic.progress.DELAY", 0)
    path = write(tmp_path / "talk.jsonl", {"messages": TALK})
    assert list(read_jsonl(path)) == [TALK]
    assert "talk.jsonl: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["llama-2-13b-chat", "baichuan2-7b-chat"])
def test_an_example_says_which_labels_are_the_bases_own(tiny_models, folder):
    tokenizer = load_model(tiny_models / folder)[1]
    own = {"role": "assistant", "content": "Paris.", "replayed": True}
    capital = {"role": "user", "content": "Capital?"}
    for messages in [*TALK, capital, own], [capital, own, *TALK]:
        (example,) = encode_example(messages, tokenizer)
        old = [label for label, old in zip(example["labels"], example["replayed"]) if old]
        assert tokenizer.convert_ids_to_tokens(old)[-1] == "</s>" and tokenizer.decode(old[:-1]).strip() == "Paris."
        new = [label for label, old in zip(example["labels"], example["replayed"]) if label != -100 and not old]
        assert "好" in tokenizer.decode(new) and "Paris" not in tokenizer.decode(new)


def test_a_batch_pads_what_is_replayed():
    replayed = [False, True, True], [False, False, False, False, True]
    batch = DataCollator(Tokenizer())([each | {"replayed": old} for each, old in zip(EXAMPLES, replayed)])
    assert batch["replayed"].tolist() == [[False, True, True, False, False], [False, False, False, False, True]]


@pytest.mark.parametrize("folder", first(2, ["llama-2-13b-chat", "baichuan2-7b-chat", "qwen-7b-chat"]))
@pytest.mark.parametrize("masked", [(0,), (1,), (0, 2)])
def test_an_answer_of_weight_0_is_not_trained(tiny_models, folder, masked):
    tokenizer = load_model(tiny_models / folder)[1]
    words = "Paris.", "好", "Rome."
    talk = [
        each for word in words for each in ({"role": "user", "content": "?"}, {"role": "assistant", "content": word})
    ]
    (whole,) = encode_example(talk, tokenizer)
    for index in masked:
        talk[2 * index + 1] = talk[2 * index + 1] | {"weight": 0}
    (example,) = encode_example(talk, tokenizer)
    # Where the history leaves the ending out, the last answer has one only if it is trained.
    assert example["input_ids"] == whole["input_ids"][: len(example["input_ids"])]
    learnt = tokenizer.decode([label for label in example["labels"] if label != -100])
    assert [word in learnt for word in words] == [index not in masked for index in range(3)]
    same = [new == old for new, old in zip(example["labels"], whole["labels"]) if new != -100]
    assert same and all(same)


def test_the_oldest_rounds_that_do_not_fit_take_their_marks_along(tokenizer):
    talk = [
        {"role": "user", "content": "a" * 50},
        {"role": "assistant", "content": "one", "replayed": True},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "three", "weight": 0},
    ]
    short = encode_example(talk, tokenizer, max_length=100, drop_oldest=True)
    assert short[0]["input_ids"] == encode_example(talk[2:], tokenizer)[0]["input_ids"]
    assert not any(short[0]["replayed"])
    assert tokenizer.decode([label for label in short[0]["labels"] if label != -100]) == "two<|im_end|>"
    with pytest.raises(LabelsError, match="beyond the expected 100. Pass drop_oldest=True"):
        encode_example(talk, tokenizer, max_length=100)
    with pytest.raises(LabelsError, match="Nothing is trained: each answer has weight 0"):
        last = len(encode_example(talk[2:4], tokenizer)[0]["input_ids"]) + 5
        encode_example(talk, tokenizer, max_length=last, drop_oldest=True)


def test_what_cannot_be_encoded_is_named_by_its_line(tokenizer):
    long = Conversation([{"role": "user", "content": "a" * 500}, TALK[1]])
    long.place = "a.jsonl", 7, 7
    with pytest.raises(LabelsError, match="^a.jsonl, line 7: The conversation is .* message 0 .user. goes beyond"):
        encode_example(long, tokenizer, max_length=100)
    greeting = Conversation([TALK[1], *TALK])
    greeting.place = "a.jsonl", 8, 7
    with pytest.raises(
        MessagesError, match="^a.jsonl, line 8 .row 7.: Message 0 has role 'assistant'.* Leave its greeting out"
    ):
        encode_example(greeting, tokenizer)


def test_a_conversation_of_several_rows_is_in_one_batch():
    examples = [EXAMPLES, EXAMPLES[0]]
    batch = DataCollator(Tokenizer())(examples)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0, 0], [8, 9, 10, 11, 12], [5, 6, 7, 0, 0]]


GREETING = {"role": "assistant", "content": "Welcome.", "weight": 0}


@pytest.mark.parametrize("start", [[], SYSTEM])
def test_a_greeting_stays_where_the_template_writes_it(tokenizer, start):
    """ChatML does: before the question, as the assistant's, and not trained."""
    (example,) = encode_example([*start, GREETING, *TALK], tokenizer)
    system = "<|im_start|>system\nS<|im_end|>\n" if start else ""
    asked = "<|im_start|>assistant\nWelcome.<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(example["input_ids"]) in (written := f"{system}{asked}好<|im_end|>", written + "\n")
    assert tokenizer.decode([label for label in example["labels"] if label != -100]) == "好<|im_end|>"
    (short,) = encode_example([*start, GREETING, *TALK, *TALK], tokenizer, max_length=60, drop_oldest=True)
    assert "Welcome" not in tokenizer.decode(short["input_ids"])


@pytest.mark.parametrize("folder", ["llama-2-13b-chat", "baichuan2-7b-chat"])
def test_a_greeting_without_a_place_is_refused_with_the_way_out(tiny_models, folder):
    tokenizer = load_model(tiny_models / folder)[1]
    with pytest.raises(TemplateError, match="begins with the assistant, .* no place for that. Leave its greeting out"):
        encode_example([GREETING, *TALK], tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}",
        "{% set messages = messages[1:] if messages[0].role == 'assistant' else messages %}",
    ],
)
def test_a_chat_template_that_refuses_or_drops_a_greeting(tokenizer, template):
    own = copy.deepcopy(tokenizer)
    own.chat_template = template + tokenizer.chat_template
    assert encode_example(TALK, own) == encode_example(TALK, tokenizer)
    with pytest.raises(TemplateError, match="begins with the assistant, .* no place for that. Leave its greeting out"):
        encode_example([GREETING, *TALK], own)


def test_data_is_known_again_by_what_it_says_and_how_it_is_cut(tmp_path):
    """What `fit(resume=True)` compares, of a file and of a list."""
    talk = [[{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "yes"}] for n in range(3)]
    write_jsonl(talk, file := tmp_path / "train.jsonl")
    same = [Examples(ConversationFile(file), None).digest(), Examples(ConversationFile(file), None).digest()]
    without = Examples(ConversationFile(file, without=talk[1:2]), None).digest()
    cut = Examples(ConversationFile(file), None, max_length=9).digest()
    write_jsonl([*talk[:2], [talk[2][0], {"role": "assistant", "content": "no!"}]], file)
    changed = Examples(ConversationFile(file), None).digest()
    assert len({*same, without, cut, changed}) == 4
    assert Examples(talk, None).digest() == Examples([*talk], None).digest() != Examples(talk[:2], None).digest()
