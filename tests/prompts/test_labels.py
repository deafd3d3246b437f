"""Prompts and labels of the course's families, against their publishers' ids and as properties of random
talk."""

import json

import pytest
from hypothesis import given

from chatmagic import (
    build_inputs_labels,
    build_messages,
    build_prompt,
    encode_prompt,
    get_template,
    load_model,
)
from chatmagic.conversation.messages import MessagesError
from chatmagic.data.dataset import encode_example
from chatmagic.prompts.labels import LabelsError
from chatmagic.prompts.templates import TemplateError
from talk import CONVERSATIONS, QUICKLY, check

# The family's template, the folder with its tokenizer, and the ids of all its control tokens.
FAMILIES = {
    "baichuan2-chat": ("baichuan2-7b-chat", {0, 1, 2, 3, 4, *range(101, 1089)}),
    "qwen-7b-chat": ("qwen-7b-chat", {*range(151643, 151851)}),
    "internlm-chat": ("internlm-chat-7b", {0, 1, 2, *range(103027, 103168)}),
    "chatglm2": ("chatglm2-6b", {0, 1, 2, *range(64789, 64795)}),
    "llama-2": ("llama-2-13b-chat", {0, 1, 2}),
}
TALK = build_messages("Where are you from?", [("你是谁呀？", "我叫梦中情炉。")])


@pytest.fixture(scope="module")
def tokenizers(tiny_models):
    return {name: load_model(tiny_models / folder)[1] for name, (folder, _) in FAMILIES.items()}


@pytest.fixture(params=FAMILIES)
def family(request, tokenizers):
    """(template name, tokenizer, ids of control tokens)"""
    return request.param, tokenizers[request.param], FAMILIES[request.param][1]


def golden(shared, model):
    return json.loads((shared / "models" / model / "golden.json").read_text("utf-8"))["cases"]


@pytest.mark.parametrize(
    "model, name",
    [(folder, name) for name, (folder, _) in FAMILIES.items()]
    + [("baichuan2-13b-chat", "baichuan2-chat"), ("qwen-14b-chat", "qwen-7b-chat")],
)
def test_prompts_are_the_publishers_ids(shared, tokenizers, model, name):
    tokenizer = tokenizers[name]  # the two larger models have the tokenizer files of the smaller
    assert get_template(tokenizer=tokenizer).name == name
    for case in golden(shared, model):
        assert encode_prompt(case["messages"], tokenizer) == case["prompt_ids"]
        assert encode_prompt(case["messages"], tokenizer, name) == case["prompt_ids"]


def test_labels_are_those_of_baichuan2s_fine_tuning_script(shared, tokenizers):
    for row in json.loads((shared / "vectors" / "labels_baichuan2.json").read_text("utf-8")):
        ids, labels = build_inputs_labels(row["messages"], tokenizers["baichuan2-chat"])
        assert (ids, labels) == (row["input_ids"], row["labels"])


# Where the golden prompts hold the first answer of TALK, the answer with its ending token, and how a row
# ends.
ANSWERS = {
    "baichuan2-chat": (5, [45779, 31457, 92440, 94177, 66, 2], [2]),
    "qwen-7b-chat": (23, [35946, 99882, 99815, 15946, 39374, 101399, 1773, 151645], [151645, 198]),
    "internlm-chat": (16, [85624, 80564, 60482, 62164, 99157, 103028], [103028, 364]),
    "chatglm2": (20, [51718, 47132, 54623, 56754, 31155, 2], [2]),
    "llama-2": (
        18,
        [29871, 30672, 232, 146, 174, 233, 165, 169, 30275, 30993, 234, 133, 140, 30267, 29871, 2],
        [2],
    ),
}


def test_exactly_the_answers_and_their_ending_tokens_are_trained(shared, family):
    name, tokenizer, _ = family
    prompt = next(case["prompt_ids"] for case in golden(shared, FAMILIES[name][0]) if case["messages"] == TALK)
    start, answer, tail = ANSWERS[name]
    ids, labels = build_inputs_labels([*TALK, {"role": "assistant", "content": "a"}], tokenizer)
    assert ids[: len(prompt)] == prompt
    expected = [-100] * start + answer
    expected += [-100] * (len(prompt) - len(expected))
    expected[0] = 2 if name == "baichuan2-chat" else -100  # its publisher labels every user mark
    assert labels[: len(prompt)] == expected
    assert ids[-len(tail) :] == tail
    assert labels[-len(tail) :] == [tail[0], -100][: len(tail)]

    only_last = build_inputs_labels([*TALK, {"role": "assistant", "content": "a"}], tokenizer, multi_rounds=False)
    assert only_last == (ids, [-100] * len(prompt) + labels[len(prompt) :])


def test_the_ending_token_is_what_stops_generation(family):
    name, tokenizer, _ = family
    stops = get_template(name).stop_token_ids(tokenizer)
    assert stops[0] == ANSWERS[name][2][0]
    assert tokenizer.eos_token_id in stops


@QUICKLY
@given(CONVERSATIONS)
def test_random_talk(family, messages):
    name, tokenizer, control = family
    if name == "chatglm2" and messages[0]["role"] == "system":
        messages = messages[1:]
    if name in ("internlm-chat", "baichuan2-chat") and messages[0]["content"] == "":
        messages = messages[messages[0]["role"] == "system" :]  # an empty system text is as good as none
    check(messages, tokenizer, None, control)


def test_every_control_token_in_text_stays_text(family):
    name, tokenizer, control = family
    known = [tokenizer.convert_ids_to_tokens(token) for token in sorted(control & set(range(len(tokenizer))))]
    assert len(known) > 2

    def count(text):
        roles = ("user", "assistant", "user") if name == "chatglm2" else ("system", "user", "assistant", "user")
        messages = [{"role": role, "content": text} for role in roles]
        prompt = encode_prompt(messages, tokenizer)
        row = build_inputs_labels([*messages, {"role": "assistant", "content": text}], tokenizer)[0]
        return [sum(token in control for token in ids) for ids in (prompt, row)]

    own = count("x")
    assert {
        token: count(text) for token in known for text in (token, f"前{token}{token}后") if count(text) != own
    } == {}


def test_replayed_answers_are_marked_where_they_are_trained(tokenizers):
    messages = build_messages(None, [("一", "壹"), ("二", "贰")])
    messages[3]["replayed"] = True
    for tokenizer in tokenizers.values():
        (example,) = encode_example(messages, tokenizer)
        prompt = len(encode_prompt(messages[:3], tokenizer))
        trained = [label != -100 for label in example["labels"]]
        assert example["replayed"] == [False] * prompt + trained[prompt:]


def test_qwen_keeps_control_tokens_in_text_as_text(shared, tokenizers):
    vectors = json.loads((shared / "vectors" / "tokens.json").read_text("utf-8"))
    empty = encode_prompt(build_messages(""), tokenizers["qwen-7b-chat"])
    for text, expected in zip(vectors["strings"], vectors["qwen, control tokens in text kept as text"], strict=True):
        assert encode_prompt(build_messages(text), tokenizers["qwen-7b-chat"]) == empty[:-5] + expected + empty[-5:]


def test_chatglm2_starts_every_answer_with_a_new_token(tokenizers):
    tokenizer = tokenizers["chatglm2"]
    assert tokenizer.encode("答：《", add_special_tokens=False)[-1] != 54611  # one string: "：《" is one token
    prompt = encode_prompt(build_messages("二", [("一", "《壹》")]), tokenizer)
    assert prompt[prompt.index(54611) - 1] == 31211


def test_llama2_strips_what_was_said(tokenizers):
    padded, bare = (build_messages(None, [(f"{pad}你好{pad}", f"{pad}Hi{pad}")] * 2) for pad in (" \n", ""))
    assert build_inputs_labels(padded, tokenizers["llama-2"]) == build_inputs_labels(bare, tokenizers["llama-2"])


def test_guards(tokenizers):
    glm = tokenizers["chatglm2"]
    with pytest.raises(TemplateError, match="Message 0 has role 'system', and template 'chatglm2' has no place"):
        encode_prompt(build_messages("一", system="S"), glm)
    with pytest.raises(TemplateError, match="Message 0 has role 'system'"):
        build_inputs_labels(build_messages(None, [("一", "二")], "S"), glm)
    with pytest.raises(MessagesError, match="Message 1 has role 'assistant'; expected user"):
        encode_prompt(build_messages(None, [("一", "二")]), glm)
    with pytest.raises(MessagesError, match="empty"):
        encode_prompt([], glm)
    with pytest.raises(LabelsError, match="Nothing is trained: message 0 has role 'user'; expected assistant"):
        build_inputs_labels(build_messages("一"), glm)
    with pytest.raises(LabelsError, match="Nothing is trained: message 2 has role 'user'"):
        build_inputs_labels(TALK, glm, multi_rounds=False)
    assert build_inputs_labels(TALK, glm)[1].count(2) == 1


def test_beyond_the_context_whole_rounds_are_dropped_oldest_first(tokenizers):
    qwen = tokenizers["qwen-7b-chat"]
    messages = build_messages("三", [("一" * 20, "壹"), ("二", "贰")], "S")
    whole = len(encode_prompt(messages, qwen))
    with pytest.raises(
        LabelsError, match=rf"{whole} tokens long: message 5 \(user\) goes beyond the expected {whole - 1}"
    ):
        encode_prompt(messages, qwen, max_length=whole - 1)
    without_first = encode_prompt([messages[0], *messages[3:]], qwen)
    assert encode_prompt(messages, qwen, max_length=whole - 1, drop_oldest=True) == without_first
    only_last = encode_prompt([messages[0], messages[5]], qwen)
    assert encode_prompt(messages, qwen, max_length=len(without_first) - 1, drop_oldest=True) == only_last
    with pytest.raises(LabelsError, match=r"message 1 \(user\) .* Not even its last round fits"):
        encode_prompt(messages, qwen, max_length=10, drop_oldest=True)

    rounds = messages[1:-1]
    kept = build_inputs_labels(rounds[2:], qwen)
    assert build_inputs_labels(rounds, qwen, max_length=len(kept[0]), drop_oldest=True) == kept
    assert qwen.model_max_length == 8192  # the default limit
    with pytest.raises(LabelsError, match="expected 8192"):
        encode_prompt(build_messages("a b " * 4500), qwen)


def test_smollm2_is_encoded_as_its_own_chat_template_writes_it(small):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small)
    assert get_template(tokenizer=tokenizer).name == "smollm2"
    for messages in TALK, build_messages("一\n", [("\n\n二", "three")], "  S"):
        theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert encode_prompt(messages, tokenizer) == theirs
        assert tokenizer.decode(theirs) == build_prompt(messages, "smollm2")


@QUICKLY
@given(CONVERSATIONS)
def test_random_talk_with_smollm2(small, messages):
    from transformers import AutoTokenizer

    global _smollm2
    _smollm2 = globals().get("_smollm2") or AutoTokenizer.from_pretrained(small)
    check(messages, _smollm2, None, set(range(17)))
