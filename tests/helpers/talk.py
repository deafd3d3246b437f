"""Random conversations, what must hold for each of them, and a tokenizer that needs no file."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from chatmagic import build_inputs_labels, build_messages, encode_prompt, get_template

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def build(chat_template, rstrip=False, more=(), **kwargs):
    """A byte-level tokenizer with this chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: index for index, char in enumerate([*alphabet, "Ċ" * 2, "Ċ" * 3])}
    backend = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ"), ("ĊĊ", "Ċ")]))  # newlines merge, as elsewhere
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, rstrip=rstrip, normalized=False) for token in (*SPECIAL, *more)])
    backend.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} | kwargs
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **named)


WORDS = [
    "你好",
    "，",
    "。",
    "《",
    "(",
    "“",
    "😀",
    "👨‍👩‍👧",
    "\n",
    "\n\n",
    " ",
    "  ",
    "a",
    "Hello",
    "}{",
    "问：",
    "[Round 2]",
    "０",
    "\t",
]
CONTROL = [
    "<|im_end|>",
    "<|im_start|>",
    "</s>",
    "<s>",
    "<reserved_106>",
    "<reserved_107>",
    "<eoa>",
    "[gMASK]",
    "sop",
]
TEXT = st.one_of(st.lists(st.sampled_from(WORDS + CONTROL), max_size=6).map("".join), st.text(max_size=12))
CONVERSATIONS = st.builds(
    lambda history, system: build_messages(None, history, system),
    st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4),
    st.none() | TEXT,
)
QUICKLY = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def check(messages, tokenizer, model_type, control):
    """All that must hold for one conversation."""
    ids, labels = build_inputs_labels(messages, tokenizer, model_type)
    ending = get_template(model_type, tokenizer).stop_token_ids(tokenizer)[0]
    assert all(label in (-100, token, ending) for token, label in zip(ids, labels, strict=True))

    starts = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = encode_prompt(messages[:index], tokenizer, model_type)
            assert ids[: len(prompt)] == prompt
            starts.append(len(prompt))
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        trained = [position for position in range(start, stop) if labels[position] != -100]
        assert trained == list(range(start, start + len(trained)))  # the answer at once, without a gap
        assert labels[trained[-1]] == ending
    assert labels[1 : starts[0]] == [-100] * (starts[0] - 1)

    last = build_inputs_labels(messages, tokenizer, model_type, multi_rounds=False)
    once = len(starts) == 1
    assert last == (ids, labels if once else [-100] * starts[-1] + labels[starts[-1] :])

    plain = [{**message, "content": "x"} for message in messages]
    own = build_inputs_labels(plain, tokenizer, model_type)[0]
    assert sum(token in control for token in ids) == sum(token in control for token in own)
