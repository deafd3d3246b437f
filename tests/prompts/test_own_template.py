"""Any tokenizer's own chat template: a byte-level tokenizer built here, and templates of every shape."""

import pytest
from hypothesis import given

from chatmagic import build_inputs_labels, build_messages, encode_example, encode_prompt, get_template
from chatmagic.prompts.labels import LabelsError
from chatmagic.prompts.templates import TemplateError
from talk import CONVERSATIONS, QUICKLY, build, check

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Gemma's shape: the assistant is called model, messages are trimmed, a system text is refused.
TRIMMED = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
# Without control tokens, and with an answer that a space joins to its prompt.
PLAIN = (
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Qwen3's shape: only the last answer keeps an empty thought before it.
REWRITING = CHATML.replace(
    "m.content", "('<think></think>' if loop.last and m.role == 'assistant' else '') + m.content"
)
DROPS_SYSTEM = CHATML.replace("{{ '<|im_start|>'", "{% if m.role != 'system' %}{{ '<|im_start|>'").replace(
    "{% endfor %}", "{% endif %}{% endfor %}"
)
TALK = build_messages(None, [("Hi", "Ho"), ("你好", "好")])


TOKENIZERS = {name: build(globals()[name]) for name in ("CHATML", "TRIMMED", "PLAIN")}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompts_and_rows_are_what_transformers_writes(name):
    tokenizer = TOKENIZERS[name]
    assert get_template(tokenizer=tokenizer).name == "chat_template"
    asked = [*TALK, {"role": "user", "content": " twice\n\n"}]
    theirs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(asked, tokenizer) == theirs
    row = build_inputs_labels(TALK, tokenizer)[0]
    theirs = tokenizer.apply_chat_template(TALK, return_dict=False)
    # Where no control token ends an answer, eos takes the place of what follows it.
    assert row == (theirs if name != "PLAIN" else [*theirs[:-1], tokenizer.eos_token_id])


@pytest.mark.parametrize(
    "name, trained", [("CHATML", "Ho<|im_end|>好<|im_end|>"), ("TRIMMED", "Ho<|im_end|>好<|im_end|>"),
                      ("PLAIN", " Ho<|im_end|> 好<|im_end|>")]
)  # fmt: skip
def test_answers_and_ends_are_trained(name, trained):
    tokenizer = TOKENIZERS[name]
    labels = build_inputs_labels(TALK, tokenizer)[1]
    assert tokenizer.decode([label for label in labels if label != -100]) == trained
    labels = build_inputs_labels(TALK, tokenizer, multi_rounds=False)[1]
    assert tokenizer.decode([label for label in labels if label != -100]) == trained[len(trained) // 2 :].lstrip(">")


@QUICKLY
@given(CONVERSATIONS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_random_talk(name, messages):
    messages = messages[messages[0]["role"] == "system" and name == "TRIMMED" :]
    tokenizer = TOKENIZERS[name]
    check(
        messages,
        tokenizer,
        None,
        set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids("<|im_start|>")},
    )


def test_a_template_that_rewrites_earlier_turns_trains_a_row_an_answer():
    tokenizer = build(REWRITING)
    with pytest.raises(
        LabelsError, match="needs 2 rows: .* encode_example gives them all, multi_rounds=False the last"
    ):
        build_inputs_labels(TALK, tokenizer)
    rows = encode_example(TALK, tokenizer)
    for row, end, words in zip(rows, (1, 3), ("Ho", "好"), strict=True):
        prompt = encode_prompt(TALK[:end], tokenizer)
        assert row["input_ids"][: len(prompt)] == prompt
        trained = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert trained == f"<think></think>{words}<|im_end|>"
    last = rows[1]["input_ids"], rows[1]["labels"]
    assert build_inputs_labels(TALK, tokenizer, multi_rounds=False) == last


def test_words_that_a_template_changes_are_not_trained():
    tokenizer = build(CHATML.replace("m.content", "(m.content | upper if loop.last else m.content)"))
    with pytest.raises(TemplateError, match=r"Message 1 \(assistant\) cannot be trained: .* its words as they are"):
        encode_example(TALK, tokenizer)
    assert encode_prompt(TALK[:-1], tokenizer)  # but it may be asked for


def test_a_template_that_cuts_an_answer_does_not_train_it():
    tokenizer = build(CHATML.replace("m.content", "m.content.split('||')[-1]"))
    with pytest.raises(TemplateError, match=r"Message 1 \(assistant\) cannot be trained"):
        build_inputs_labels(build_messages(None, [("Hi", "thought || Ho")]), tokenizer)
    assert build_inputs_labels(TALK, tokenizer)[1].count(tokenizer.eos_token_id) == 2


def test_control_tokens_that_swallow_the_whitespace_behind_them():
    tokenizer = build(CHATML, rstrip=True)  # as in Phi-3
    theirs = tokenizer.apply_chat_template(TALK, return_dict=False)
    assert build_inputs_labels(TALK, tokenizer)[0] == theirs
    assert "\n<|im_start|>" not in tokenizer.decode(theirs)


def test_added_tokens_that_the_template_writes_cannot_be_typed():
    tokenizer = build(REWRITING)
    thoughts = [tokenizer.convert_tokens_to_ids(token) for token in ("<think>", "</think>")]
    ids = build_inputs_labels(build_messages(None, [("<think>", "a</think>b")]), tokenizer)[0]
    assert [token for token in ids if token in thoughts] == thoughts


def test_private_use_characters_are_themselves():
    text = "a\U00100000b\U0010fffd<|im_end|>\U00100001"
    assert text in TOKENIZERS["CHATML"].decode(encode_prompt(build_messages(text), TOKENIZERS["CHATML"]))


def test_a_system_text_without_a_place_is_refused():
    with pytest.raises(TemplateError, match="Message 0 has role 'system', .* no place for it; expected user"):
        encode_prompt(build_messages("一", system="S"), build(DROPS_SYSTEM))
    with pytest.raises(TemplateError, match="refuses the conversation: System role not supported"):
        encode_prompt(build_messages("一", system="S"), TOKENIZERS["TRIMMED"])


def test_a_named_template_wins_over_the_tokenizers_own():
    tokenizer = TOKENIZERS["PLAIN"]
    assert tokenizer.decode(encode_prompt(build_messages("Hi"), tokenizer, "billa")) == "\nHuman: Hi\nAssistant: "


@pytest.mark.parametrize("model_type", ["vicuna_v1.1", "raw", "zephyr", "chatglm3", "yuan", "llama2-chinese"])
def test_fastchats_templates_keep_the_same_promises(model_type):
    tokenizer = build(PLAIN)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "</s>", "<sep>"]})
    history = [("\n\n《", "\nHo \n"), ("<|im_end|>", "好</s>"), ("x<sep>", "")]
    check(build_messages(None, history), tokenizer, model_type, set(tokenizer.all_special_ids))


def test_a_text_that_ends_turns_is_trained_where_it_stops_generation():
    tokenizer = TOKENIZERS["PLAIN"]
    labels = build_inputs_labels(TALK, tokenizer, "zero_shot")[1]
    assert tokenizer.decode([label for label in labels if label != -100]) == " Ho\n### 好\n###"
    with pytest.raises(TemplateError, match="'vicuna_v1.1' ends a turn with '</s>', which is no token of this"):
        encode_prompt(TALK[:1], tokenizer, "vicuna_v1.1")


def test_yuan2_writes_a_finished_turn_in_another_way_than_its_prompt():
    tokenizer = build(PLAIN)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<sep>"]})
    assert tokenizer.decode(encode_prompt(build_messages("Hi"), tokenizer, "yuan2")) == "Hi<sep>"
    with pytest.raises(TemplateError, match=r"Message 1 \(assistant\) cannot be trained"):
        build_inputs_labels(TALK, tokenizer, "yuan2")


def test_a_bos_that_the_tokenizer_adds_leads_fastchats_prompts():
    from tokenizers import processors

    tokenizer = build(PLAIN, bos_token="<|endoftext|>")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    ids = encode_prompt(build_messages("Hi"), tokenizer, "billa")
    assert ids[0] == bos and ids.count(bos) == 1
    assert encode_prompt(build_messages("Hi"), tokenizer)[0] != bos  # its own template writes none


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "eos_token", "<|endoftext|>"),
        lambda tokenizer: tokenizer.add_special_tokens({"additional_special_tokens": ["Assistant"]}),
        lambda tokenizer: tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]}),
        lambda tokenizer: setattr(tokenizer, "chat_control_tokens", ["<think>"]),
        lambda tokenizer: setattr(tokenizer, "chat_template", CHATML),
    ],
)
def test_what_changes_in_a_tokenizer_is_seen(change):
    messages = build_messages(None, [("a <think>", "b"), ("c", "d")])
    tokenizer, changed = build(PLAIN), build(PLAIN)
    before = build_inputs_labels(messages, tokenizer)
    change(tokenizer), change(changed)
    assert build_inputs_labels(messages, tokenizer) == build_inputs_labels(messages, changed) != before
