"""Kinds of today's chat templates, one small template each: what a prompt ends with, what is trained behind it, and
what stops a reply."""

import gc
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatmagic import ChatLLM, build_inputs_labels, build_messages, encode_example, encode_prompt, get_template
from chatmagic.errors import ChatmagicError
from chatmagic.prompts import jinja
from chatmagic.prompts.encoder import Encoder
from chatmagic.prompts.labels import LabelsError, note_thinking
from chatmagic.prompts.own import OwnTemplate
from chatmagic.prompts.templates import TemplateError
from quick import first
from talk import CONVERSATIONS, QUICKLY, build
from tiny_runs import tiny_llama

EACH = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}BODY{{ '<|im_end|>\n' }}{% endfor %}"
PARTED = (  # as Qwen3: the thought under a key of its own or cut out of the content, shown in the last answer alone
    "{% set words = m.content.split('</think>')[-1].lstrip('\n') %}{% set thought = m.reasoning_content or "
    "(m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '') %}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' + words }}"
    "{% elif m.role == 'assistant' %}{{ words }}{% else %}{{ m.content }}{% endif %}"
)
KINDS = {
    # The prompt is free; told not to think, it holds an empty thought.
    "free": EACH.replace("BODY", PARTED)
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is "
    "defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
    # The prompt opens a thought, unless told not to.
    "opened": EACH.replace("BODY", PARTED) + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}",
    # The prompt opens a thought that the history never shows, and nothing can change that.
    "dropped": EACH.replace("BODY", "{{ m.content.split('</think>')[-1].strip() }}")
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    # The prompt holds an empty thought that the history lacks, unless told to think.
    "closed": EACH.replace("BODY", "{{ m.content }}")
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if not thinking %}"
    "{{ '<|open|>thought\n<|close|>' }}{% endif %}{% endif %}",
    # The last answer ends otherwise than earlier ones.
    "returns": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{{ '<|endoftext|>' if loop.last "
    "and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}",
    # An answer ends with two tokens.
    "two": EACH.replace("BODY", "{{ '<|open|>' + m.content + '<|close|>' if m.role == 'assistant' else m.content }}")
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # Nothing ends an answer but the next turn.
    "unended": "{% for m in messages %}{{ ('<|open|>' if m.role == 'user' else '<|close|>') + m.content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|close|>' }}{% endif %}",
    # eos at the very end, where no answer is asked for: no rewriting.
    "final eos": EACH.replace("BODY", "{{ m.content }}")
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
    # The last answer is not ended at all.
    "open end": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% if not loop.last or m.role != 'assistant' %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
PLAIN = build_messages(None, [("Hi", "Ho"), ("Hey", "Hm")])
THOUGHT = [PLAIN[0], {**PLAIN[1], "reasoning_content": "One."}, PLAIN[2], {**PLAIN[3], "reasoning_content": "Two."}]
# For each kind: what is trained of PLAIN and of THOUGHT, a text a row, and the tokens that stop a reply. "|" stands
# between the answers of one row.
EXPECTED = {
    "free": (
        ["Ho<|im_end|>", "Hm<|im_end|>"],
        ["<think>\nOne.\n</think>\n\nHo<|im_end|>", "<think>\nTwo.\n</think>\n\nHm<|im_end|>"],
        ["<|im_end|>"],
    ),
    "opened": (
        ["Ho<|im_end|>", "Hm<|im_end|>"],
        ["One.\n</think>\n\nHo<|im_end|>", "Two.\n</think>\n\nHm<|im_end|>"],
        ["<|im_end|>"],
    ),
    "dropped": (
        ["\n</think>\n\nHo<|im_end|>", "\n</think>\n\nHm<|im_end|>"],
        ["One.\n</think>\n\nHo<|im_end|>", "Two.\n</think>\n\nHm<|im_end|>"],
        ["<|im_end|>"],
    ),
    "closed": (
        ["Ho<|im_end|>", "Hm<|im_end|>"],
        ["<|open|>thought\nOne.<|close|>Ho<|im_end|>", "<|open|>thought\nTwo.<|close|>Hm<|im_end|>"],
        ["<|im_end|>"],
    ),
    "returns": (["Ho<|endoftext|>", "Hm<|endoftext|>"], None, ["<|endoftext|>", "<|im_end|>"]),
    "two": (["<|open|>Ho<|close|><|im_end|>|<|open|>Hm<|close|><|im_end|>"], None, ["<|im_end|>"]),
    "unended": (["Ho<|im_end|>|Hm<|im_end|>"], None, ["<|im_end|>", "<|open|>"]),
    "final eos": (["Ho<|im_end|>|Hm<|im_end|>"], None, ["<|im_end|>"]),
    "open end": (["Ho<|im_end|>|Hm<|im_end|>"], None, ["<|im_end|>"]),
}


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: build(template, more=["<|open|>", "<|close|>"]) for kind, template in KINDS.items()}


def trained(tokenizer, row) -> str:
    """The labels as text, "|" between runs of them."""
    labels = [label if label != -100 else None for label in row["labels"]]
    runs = []
    for before, label in zip([None, *labels], labels):
        if label is not None:
            runs += [[]] * 0 if before is not None else [[]]
            runs[-1].append(label)
    return "|".join(tokenizer.decode(run) for run in runs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("messages", [PLAIN, THOUGHT], ids=["plain", "thoughts"])
def test_what_follows_each_prompt_is_trained_and_nothing_else(tokenizers, kind, messages):
    tokenizer, expected = tokenizers[kind], EXPECTED[kind][messages is THOUGHT]
    if expected is None:
        with pytest.raises(TemplateError, match=r"Message 1 \(assistant\) has a thought, and .* knows none"):
            encode_example(messages, tokenizer)
        return
    rows = encode_example(messages, tokenizer)
    assert [trained(tokenizer, row) for row in rows] == expected
    thinking = get_template(tokenizer=tokenizer).thinking_for(messages)
    for index in (1, 3):
        prompt = encode_prompt(messages[:index], tokenizer, thinking=thinking)
        follows = [
            row for row in rows if row["input_ids"][: len(prompt)] == prompt and row["labels"][len(prompt)] != -100
        ]
        assert len(follows) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_the_publishers(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for messages in PLAIN[:1], PLAIN[:3]:
        theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert encode_prompt(messages, tokenizer) == theirs


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_follows_the_words_stops_a_reply(tokenizers, kind):
    tokenizer = tokenizers[kind]
    stops = get_template(tokenizer=tokenizer).stop_token_ids(tokenizer)
    assert tokenizer.convert_ids_to_tokens(stops) == EXPECTED[kind][2]


def test_the_ids_of_an_opened_thought():
    tokenizer = build(KINDS["opened"])
    (row,) = encode_example(build_messages(None, [("a", "b")]), tokenizer, thinking=True)
    start, end, think, thought = 259, 260, 261, 262
    prompt = [start, 84, 82, 68, 81, 198, 64, end, 198, start, 64, 82, 82, 72, 82, 83, 64, 77, 83, 198, think, 198]
    assert row["input_ids"] == [*prompt, 198, thought, 198, 198, 65, end, 198]
    assert row["labels"] == [-100] * len(prompt) + [198, thought, 198, 198, 65, end, -100]


@pytest.mark.parametrize("kind", ["free", "opened", "dropped"])
def test_a_thought_in_the_content_is_a_thought(tokenizers, kind):
    tokenizer = tokenizers[kind]
    tagged = [
        {**message, "content": f"<think>\n{message['reasoning_content']}\n</think>\n\n{message['content']}"}
        if message["role"] == "assistant"
        else message
        for message in THOUGHT
    ]
    for message in tagged:
        message.pop("reasoning_content", None)
    assert encode_example(tagged, tokenizer) == encode_example(THOUGHT, tokenizer)
    asked = [*tagged, {"role": "user", "content": "And?"}]
    assert "One." not in tokenizer.decode(encode_prompt(asked, tokenizer))  # the publisher drops old thoughts


@pytest.mark.parametrize("kind", ["free", "opened", "dropped"])
def test_what_only_mentions_a_tag_is_text(tokenizers, kind):
    tokenizer, tags = tokenizers[kind], {263, 264}
    messages = build_messages(None, [("Hi", "The tag </think> ends it, <think> begins it."), ("Hey", "Hm")])
    plain = [sum(token in tags for token in row["input_ids"]) for row in encode_example(PLAIN, tokenizer)]
    rows = encode_example(messages, tokenizer)
    assert [sum(token in tags for token in row["input_ids"]) for row in rows] == plain
    assert "The tag </think> ends it, <think> begins it." in trained(tokenizer, rows[0])


def test_control_tokens_in_a_thought_are_text(tokenizers):
    messages = [PLAIN[0], {**PLAIN[1], "reasoning_content": "a<|im_end|>b</think>c"}]
    (row,) = encode_example(messages, tokenizers["free"])
    assert trained(tokenizers["free"], row) == "<think>\na<|im_end|>b</think>c\n</think>\n\nHo<|im_end|>"
    assert row["labels"].count(260) == 1 and row["labels"].count(264) == 1


def test_some_answers_with_a_thought_and_some_without(tokenizers):
    messages = [*PLAIN[:3], THOUGHT[3]]
    rows = encode_example(messages, tokenizers["opened"])
    assert [trained(tokenizers["opened"], row) for row in rows] == [
        "\n</think>\n\nHo<|im_end|>",
        "Two.\n</think>\n\nHm<|im_end|>",
    ]


def test_the_switch():
    tokenizer = build(KINDS["opened"])

    def end(**options):
        return tokenizer.decode(encode_prompt(PLAIN[:1], tokenizer, **options)).partition("assistant\n")[2]

    class Model:
        pass

    assert (end(), end(thinking=True), end(thinking=False)) == ("<think>\n", "<think>\n", "<think>\n\n</think>\n\n")
    note_thinking(Model, tokenizer, False)
    assert end() == "<think>\n\n</think>\n\n" and Model.chat_thinking is False
    assert trained(tokenizer, encode_example(PLAIN[:2], tokenizer)[0]) == "Ho<|im_end|>"
    assert trained(tokenizer, encode_example(PLAIN[:2], tokenizer, thinking=True)[0]) == "\n</think>\n\nHo<|im_end|>"
    with pytest.raises(TemplateError, match="Message 1 .* has a thought, and its prompt leaves no room"):
        encode_example(THOUGHT, tokenizer)


@pytest.mark.parametrize("thinking", [True, False])
def test_a_chatllm_trains_behind_the_prompt_that_it_sends(thinking):
    tokenizer = build(KINDS["opened"])
    llm = ChatLLM(tiny_llama(), tokenizer, thinking=thinking)
    prompt = encode_prompt(PLAIN[:1], tokenizer, thinking=thinking)
    assert llm.build_inputs_labels(PLAIN[:2])[0][: len(prompt)] == prompt
    assert llm.build_prompt(PLAIN[:1]) == tokenizer.decode(prompt)


def test_a_switch_that_a_template_lacks_is_refused(tokenizers):
    with pytest.raises(TemplateError, match="thinking=True: this chat template knows no thoughts"):
        encode_prompt(PLAIN[:1], tokenizers["two"], thinking=True)
    with pytest.raises(TemplateError, match="thinking=False: .* opens a thought in every prompt"):
        encode_prompt(PLAIN[:1], tokenizers["dropped"], thinking=False)
    with pytest.raises(TemplateError, match="thinking=True: template 'chatml' knows no thoughts"):
        encode_prompt(PLAIN[:1], tokenizers["two"], "chatml", thinking=True)
    with pytest.raises(TemplateError, match="'chatml' knows no thoughts"):
        build_inputs_labels(THOUGHT, tokenizers["two"], "chatml")


def test_one_pair_is_not_given_for_several_rows(tokenizers):
    with pytest.raises(LabelsError, match="needs 2 rows"):
        build_inputs_labels(PLAIN, tokenizers["returns"])
    ids, labels = build_inputs_labels(PLAIN, tokenizers["returns"], multi_rounds=False)
    assert {"input_ids": ids, "labels": labels}.items() <= encode_example(PLAIN, tokenizers["returns"])[1].items()


def test_a_system_text_is_merged_where_a_family_knows_none():
    tokenizer = build(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + KINDS["two"]
    )
    asked = build_messages("Hi", system="S")
    with pytest.raises(
        TemplateError, match='no place for it .*no system.; .* into the first question, or pass system="m'
    ):
        encode_prompt(asked, tokenizer)
    merged = encode_prompt(asked, tokenizer, system="merge")
    assert merged == encode_prompt(build_messages("S\n\nHi"), tokenizer)
    answered = [*asked, {"role": "assistant", "content": "Ho"}]
    assert encode_example(answered, tokenizer, system="merge")[0]["input_ids"][: len(merged)] == merged


@pytest.mark.parametrize(
    "fault, said",
    [
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ messages.nothing.at.all }}", "has no attribute"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "not done after 0.5 s"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_what_goes_wrong_in_a_template_is_said(fault, said, monkeypatch):
    monkeypatch.setattr(jinja, "SECONDS", 0.5)
    with pytest.raises(TemplateError, match=f"refuses the conversation: .*{said}"):
        encode_prompt(PLAIN[:1], build(KINDS["two"] + fault))


def test_a_date_is_todays(monkeypatch):
    import transformers.utils.chat_template_utils as templates

    tokenizer = build("{{ strftime_now('%d') }}" + KINDS["two"])
    days = []

    class Clock:
        @staticmethod
        def now():
            class Day:
                @staticmethod
                def strftime(form):
                    return days[-1]

            return Day

    monkeypatch.setattr(templates, "datetime", Clock)
    for day in "01", "02":
        days.append(day)
        assert tokenizer.decode(encode_prompt(PLAIN[:1], tokenizer)).startswith(day)
        assert tokenizer.decode(encode_example(PLAIN, tokenizer)[0]["input_ids"]).startswith(day)


@pytest.mark.parametrize("kind", first(3, KINDS))
@QUICKLY
@given(CONVERSATIONS, st.booleans())
def test_what_one_rendering_tells_is_what_each_answers_own_would(tokenizers, kind, messages, thoughts):
    template = get_template(tokenizer=tokenizers[kind])
    if thoughts and template.knows_thoughts:
        messages = [
            {**message, "reasoning_content": f"Hm {at}."} if message["role"] == "assistant" else message
            for at, message in enumerate(messages)
        ]

    def rows():
        try:
            return encode_example(messages, tokenizers[kind])
        except ChatmagicError as error:
            return str(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OwnTemplate, "_recall", lambda *_: None)
        each_by_itself = rows()
    assert rows() == each_by_itself


@pytest.mark.parametrize("kind", ["free", "opened", "dropped", "closed", "returns"])
@pytest.mark.parametrize("thoughts", [False, True])
def test_the_rows_of_a_conversation_take_one_rendering(tokenizers, kind, thoughts, monkeypatch):
    messages = THOUGHT if thoughts and kind != "returns" else PLAIN
    encode_example(messages, tokenizers[kind])  # learns
    rendered, render = [], jinja.Renderer.__call__
    monkeypatch.setattr(
        jinja.Renderer, "__call__", lambda *args, **switches: rendered.append(args) or render(*args, **switches)
    )
    assert len(encode_example([*messages, *messages], tokenizers[kind])) == 4
    assert len(rendered) == 1


def test_a_question_that_tells_a_template_to_think_or_not():
    """Its prompt is another than that of the question behind it."""
    template = KINDS["free"].replace(
        "enable_thinking is defined and not enable_thinking", "'/no_think' in messages[-1].content"
    )
    talk = build_messages(None, [("Hi /no_think", "Ho"), ("Hey", "Hm")])
    tokenizer = build(template)
    rows = encode_example(talk, tokenizer)
    for index, row in zip((1, 3), rows, strict=True):
        prompt = encode_prompt(talk[:index], tokenizer)
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"][len(prompt)] != -100
    assert "</think>" in tokenizer.decode(rows[0]["input_ids"])


def test_an_encoder_is_gone_with_its_last_name():
    """Without a garbage collection: a tokenizer is large, and Python does not see how large."""
    encoder = Encoder(build(KINDS["free"]), get_template("chatml"))
    encoder.encode(encoder.template.render(PLAIN[:1]))
    gone = weakref.ref(encoder)
    gc.disable()
    try:
        del encoder
        assert gone() is None
    finally:
        gc.enable()


def test_an_ending_whose_name_ends_as_that_of_another_token():
    """The first question stands behind <|sys_end|>, the next behind <|bot_end|>; and the last answer is not ended."""
    tokenizer = build(
        "<|sys|>Be.<|sys_end|>{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>"
        "{% else %}<|bot|>{{ m.content }}{% if not loop.last %}<|bot_end|>{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|bot|>{% endif %}",
        more=["<|sys|>", "<|sys_end|>", "<|bot|>", "<|bot_end|>"],
    )
    (row,) = encode_example(PLAIN, tokenizer)
    assert trained(tokenizer, row) == "Ho<|bot_end|>|Hm<|bot_end|>"
    assert get_template(tokenizer=tokenizer).stop_token_ids(tokenizer)[0] == tokenizer.convert_tokens_to_ids(
        "<|bot_end|>"
    )


OPENS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"


@pytest.mark.parametrize(
    "says",
    [
        # As GLM-5.3: of "none" and "no_think" it has never heard, and takes them for its default.
        "{{ reasoning_effort if reasoning_effort is defined and reasoning_effort in ['low', 'high'] else 'max' }}",
        # It only says so.
        "{{ 'Be quick.' if enable_thinking is defined and not enable_thinking else '' }}",
    ],
)
def test_a_switch_that_does_not_stop_the_thinking_is_no_switch(says):
    tokenizer = build(says + EACH.replace("BODY", "{{ m.content.split('</think>')[-1].strip() }}") + OPENS)
    rows = encode_example(PLAIN, tokenizer)
    assert [trained(tokenizer, row) for row in rows] == ["\n</think>\n\nHo<|im_end|>", "\n</think>\n\nHm<|im_end|>"]
    prompt = encode_prompt(PLAIN[:1], tokenizer)
    assert rows[0]["input_ids"][: len(prompt)] == prompt
    with pytest.raises(TemplateError, match="thinking=False: .* opens a thought in every prompt"):
        encode_prompt(PLAIN[:1], tokenizer, thinking=False)


@pytest.mark.parametrize(
    "history, prompt",
    [
        ("<|im_start|>assistant\n", "<|im_start|>assistant\n<judge>\n"),  # as KAT-V1: what it begins is no thought
        ("\n<|im_start|>assistant\n\n", "<|im_start|> assistant\n"),  # the publisher's spaces go astray
    ],
)
def test_words_follow_a_prompt_that_the_history_has_otherwise(history, prompt):
    tokenizer = build(
        "{% for m in messages %}{{ HISTORY if m.role == 'assistant' else '<|im_start|>user\n' }}{{ m.content + "
        "'<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ PROMPT }}{% endif %}".replace(
            "HISTORY", repr(history)
        ).replace("PROMPT", repr(prompt))
    )
    rows = encode_example(PLAIN, tokenizer)
    assert [trained(tokenizer, row) for row in rows] == ["Ho<|im_end|>", "Hm<|im_end|>"]
    for index, row in zip((1, 3), rows, strict=True):
        sent = encode_prompt(PLAIN[:index], tokenizer)
        assert tokenizer.decode(sent).endswith(prompt)
        assert row["input_ids"][: len(sent)] == sent and row["labels"][len(sent) - 1 : len(sent) + 1][0] == -100


@pytest.mark.parametrize("space", ["\n\n", " ", "\t", " \n"])
@pytest.mark.parametrize("strip", [str.strip, str.lstrip, lambda text: text.lstrip("\n"), str], ids=range(4))
def test_whitespace_of_the_prompt_is_not_taken_for_the_answers(strip, space):
    """A prompt that ends with an empty line, and answers that begin with one, which the template may strip."""
    stripped = {str.strip: "m.content.strip()", str.lstrip: "m.content.lstrip()", str: "m.content"}
    tokenizer = build(
        EACH.replace("BODY", "{{ '</think>\n\n' if m.role == 'assistant' }}{{ WORDS }}").replace(
            "WORDS", stripped.get(strip, "m.content.lstrip('\n')")
        )
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n</think>\n\n' }}{% endif %}"
    )
    talk = build_messages(None, [("Hi", f"{space}Ho"), ("Hey", "Hm"), ("Hi", f"{space}Ha")])
    rows = encode_example(talk, tokenizer)
    said = [strip(f"{space}Ho"), "Hm", strip(f"{space}Ha")]
    assert "|".join(trained(tokenizer, row) for row in rows) == "|".join(f"{words}<|im_end|>" for words in said)
    for index in (1, 3, 5):
        prompt = encode_prompt(talk[:index], tokenizer)
        assert any(
            row["input_ids"][: len(prompt)] == prompt and row["labels"][len(prompt) - 1 :][:1] == [-100] for row in rows
        )


def test_a_thought_that_a_template_shows_only_beside_a_call():
    """As Gemma 4 of the first months: it drops every other thought, but the model thinks in those very marks."""
    tokenizer = build(
        "{{ '<|im_start|>system\nThink.<|im_end|>\n' if enable_thinking else '' }}"
        + EACH.replace(
            "BODY",
            "{% if m.tool_calls and m.reasoning_content %}{{ '<|open|>thought\n' + m.reasoning_content + '\n<|close|>' "
            "+ m.tool_calls[0].function.name }}{% endif %}{{ m.content }}",
        )
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        more=["<|open|>", "<|close|>"],
    )
    rows = encode_example(THOUGHT, tokenizer)
    assert [trained(tokenizer, row) for row in rows] == [
        "<|open|>thought\nOne.\n<|close|>Ho<|im_end|>",
        "<|open|>thought\nTwo.\n<|close|>Hm<|im_end|>",
    ]
    sent = encode_prompt(PLAIN[:1], tokenizer, thinking=True)
    assert tokenizer.decode(sent).startswith("<|im_start|>system\nThink.") and rows[0]["input_ids"][: len(sent)] == sent
    assert [trained(tokenizer, row) for row in encode_example(PLAIN, tokenizer)] == ["Ho<|im_end|>|Hm<|im_end|>"]


def test_a_template_that_can_be_told_but_shows_no_thought():
    """As Apertus: whoever asks may say it, and rows without thoughts are trained under the prompt for none."""
    tokenizer = build(
        "{{ 'Deliberation: ' + ('disabled' if enable_thinking is defined and not enable_thinking else 'enabled') }}"
        + KINDS["two"],
        more=["<|open|>", "<|close|>"],
    )
    for thinking, says in (True, "enabled"), (False, "disabled"), (None, "enabled"):
        assert f"Deliberation: {says}" in tokenizer.decode(encode_prompt(PLAIN[:1], tokenizer, thinking=thinking))
    (row,) = encode_example(PLAIN, tokenizer)
    assert "Deliberation: disabled" in tokenizer.decode(row["input_ids"])
    with pytest.raises(TemplateError, match=r"Message 1 \(assistant\) has a thought, and .* knows none"):
        encode_example(THOUGHT, tokenizer)


@pytest.mark.parametrize("text", ["part.text", "part['text']"])
def test_a_template_that_reads_words_only_in_parts(text):
    """As SmolVLM and LLaVA: of a text that is no list of parts it shows nothing, or breaks."""
    tokenizer = build(
        EACH.replace(
            "BODY",
            "{% for part in m.content %}{{ TEXT if part.type == 'text' }}{% endfor %}".replace("TEXT", text),
        )
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )

    def in_parts(messages):
        return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]

    sent = encode_prompt(PLAIN[:3], tokenizer)
    assert sent == tokenizer.apply_chat_template(in_parts(PLAIN[:3]), add_generation_prompt=True, return_dict=False)
    (row,) = encode_example(PLAIN, tokenizer)
    assert trained(tokenizer, row) == "Ho<|im_end|>|Hm<|im_end|>" and row["input_ids"][: len(sent)] == sent
