"""Prompts and labels of the course's families: against their publishers' text and ids, and as properties of random
talk."""

import json
import re
from itertools import groupby
from operator import itemgetter

import pytest
from hypothesis import given

from chatmagic import (
    build_inputs_labels,
    build_messages,
    build_prompt,
    encode_prompt,
    get_template,
)
from chatmagic.conversation.messages import MessagesError
from chatmagic.data.dataset import encode_example
from chatmagic.prompts.labels import LabelsError
from chatmagic.prompts.templates import TemplateError
from golden import KINDS, golden
from published import MODELS
from quick import first
from talk import CONVERSATIONS, QUICKLY, check

FAMILIES = {MODELS[name].template: name for name in reversed(MODELS)}  # to the smallest model of each
TALK = build_messages("Where are you from?", [("你是谁呀？", "我叫梦中情炉。")])


@pytest.fixture(scope="module", params=first(1, KINDS))
def tokenizers(request, loaded):
    """template name -> tokenizer; all ours, or all the publishers'"""
    return {name: loaded(folder, request.param)[1] for name, folder in FAMILIES.items()}


@pytest.fixture(params=FAMILIES)
def family(request, tokenizers):
    """(template name, tokenizer, ids of control tokens)"""
    return request.param, tokenizers[request.param], MODELS[FAMILIES[request.param]].control


def text(tokenizer, ids):
    """The ids as tests/golden writes them: piece by piece, control tokens by their names."""
    if not tokenizer.convert_tokens_to_ids("▁"):  # of bytes
        return tokenizer.decode(ids)
    tokens = [token.encode() for token in tokenizer.convert_ids_to_tokens(ids)]
    byte = re.compile(rb"<0x(..)>")
    tokens = [bytes([int(found[1], 16)]) if (found := byte.fullmatch(token)) else token for token in tokens]
    return b"".join(tokens).decode().replace("▁", " ")


@pytest.mark.parametrize("name", golden("publishers")["prompts"])
def test_prompts_are_the_publishers_text(name, loaded):
    """And `build_prompt`'s, but for the tokens before the first turn, and the space that SentencePiece begins with."""
    for case in golden("publishers")["prompts"][name]:
        shown, written = build_prompt(case["messages"], name), re.sub("(<s>|sop) ", r"\1", case["prompt"])
        assert written.removesuffix(shown) + shown == written
        assert written.removesuffix(shown) in ("", "<s>", "[gMASK]sop")
        if name in FAMILIES:
            tokenizer = loaded(FAMILIES[name])[1]
            assert get_template(tokenizer=tokenizer).name == name
            assert encode_prompt(case["messages"], tokenizer) == encode_prompt(case["messages"], tokenizer, name)
            assert text(tokenizer, encode_prompt(case["messages"], tokenizer)) == case["prompt"]


def test_labels_are_the_text_of_baichuan2s_fine_tuning_script(loaded):
    tokenizer = loaded("baichuan2-7b-chat")[1]
    for row in golden("publishers")["baichuan2_labels"]:
        ids, labels = build_inputs_labels(row["messages"], tokenizer)
        assert text(tokenizer, ids) == "".join(run for run, _ in row["runs"])
        runs = [
            ("masked" if label == -100 else "same" if label == token else "other", token, label)
            for token, label in zip(ids, labels)
        ]
        found = []
        for kind, run in groupby(runs, key=itemgetter(0)):
            tokens, labels = zip(*((token, label) for _, token, label in run))
            found.append([text(tokenizer, tokens), None if kind == "masked" else text(tokenizer, labels)])
        assert found == row["runs"]


def cases(shared, model):
    return json.loads((shared / "models" / model / "golden.json").read_text("utf-8"))["cases"]


@pytest.mark.parametrize(
    "model, name",
    first(
        2,
        [(folder, name) for name, folder in FAMILIES.items()]
        + [("baichuan2-13b-chat", "baichuan2-chat"), ("qwen-14b-chat", "qwen-7b-chat")],
    ),
)
@pytest.mark.slow
def test_prompts_and_answers_are_the_publishers_ids(shared, loaded, model, name):
    tokenizer = loaded(FAMILIES[name], "golden")[1]  # the two larger models have the tokenizer files of the smaller
    assert get_template(tokenizer=tokenizer).name == name
    for case in cases(shared, model):
        assert encode_prompt(case["messages"], tokenizer) == case["prompt_ids"]
        assert encode_prompt(case["messages"], tokenizer, name) == case["prompt_ids"]

    prompt = next(case["prompt_ids"] for case in cases(shared, model) if case["messages"] == TALK)
    start, answer, tail = ANSWERS[name]
    ids, labels = build_inputs_labels([*TALK, {"role": "assistant", "content": "a"}], tokenizer)
    assert ids[: len(prompt)] == prompt
    expected = [-100] * start + answer
    expected += [-100] * (len(prompt) - len(expected))
    expected[0] = 2 if name == "baichuan2-chat" else -100  # its publisher labels every user mark
    assert labels[: len(prompt)] == expected
    assert ids[-len(tail) :] == tail
    assert labels[-len(tail) :] == [tail[0], -100][: len(tail)]


@pytest.mark.slow
def test_labels_are_those_of_baichuan2s_fine_tuning_script(shared, loaded):
    for row in json.loads((shared / "vectors" / "labels_baichuan2.json").read_text("utf-8")):
        ids, labels = build_inputs_labels(row["messages"], loaded("baichuan2-7b-chat", "golden")[1])
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


def test_exactly_the_answers_and_their_ending_tokens_are_trained(family):
    name, tokenizer, _ = family
    end, tail = MODELS[FAMILIES[name]].stops[0], MODELS[FAMILIES[name]].tail
    talk = [*TALK, {"role": "assistant", "content": "OK"}]
    ids, labels = build_inputs_labels(talk, tokenizer)
    prompt = encode_prompt(TALK, tokenizer)
    assert ids[: len(prompt)] == prompt
    once, again = TALK[1]["content"], "OK"
    trained = [label for label in labels[1:] if label != -100]
    assert [once, again] == [part.strip() for part in tokenizer.decode(trained).split(tokenizer.decode([end]))[:-1]]
    assert trained.count(end) == 2 and trained[-1] == end
    assert labels[0] == (end if name == "baichuan2-chat" else -100)  # its publisher labels every user mark
    assert tokenizer.decode(ids[ids.index(end, len(prompt)) + 1 :]) == tail

    only_last = build_inputs_labels(talk, tokenizer, multi_rounds=False)
    assert only_last == (ids, [-100] * len(prompt) + labels[len(prompt) :])


def test_the_ending_token_is_what_stops_generation(family):
    name, tokenizer, _ = family
    stops = get_template(name).stop_token_ids(tokenizer)
    assert stops[0] == MODELS[FAMILIES[name]].stops[0]
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


def test_qwen_keeps_control_tokens_in_text_as_text(shared, loaded):
    vectors, qwen = (
        json.loads((shared / "vectors" / "tokens.json").read_text("utf-8")),
        loaded("qwen-7b-chat", "golden")[1],
    )
    empty = encode_prompt(build_messages(""), qwen)
    for words, expected in zip(vectors["strings"], vectors["qwen, control tokens in text kept as text"], strict=True):
        assert encode_prompt(build_messages(words), qwen) == empty[:-5] + expected + empty[-5:]


def test_chatglm2_starts_every_answer_with_a_new_token(tokenizers):
    tokenizer = tokenizers["chatglm2"]
    joined, before, opening = map(tokenizer.convert_tokens_to_ids, ("：《", "：", "《"))
    assert tokenizer.encode("答：《", add_special_tokens=False)[-1] == joined  # of one string
    prompt = encode_prompt(build_messages("二", [("一", "《壹》")]), tokenizer)
    assert prompt[prompt.index(opening) - 1] == before and joined not in prompt


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
