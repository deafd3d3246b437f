"""ChatLLM over tiny models with real weights: tokens are those of plain generate, and what is kept between turns."""

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from types import SimpleNamespace

import pytest

from chatmagic import ChatLLM, ChatmagicError, build_messages, encode_prompt, load_model
from chatmagic.backends.weights import WHOLE
from chatmagic.conversation.llm import Interrupted
from generation import (
    adapter,
    column_written_through_data,
    interrupt_after,
    new_ids,
    plain,
    rows_swapped_through_data,
    trained,
    trained_by_bitsandbytes,
    twelve_turns,
    written_through_data,
    written_through_numpy,
)


def test_twelve_turns_are_those_of_plain_generate(model, tokenizer):
    stop = tokenizer.eos_token_id
    reused = []
    for llm, reply, ids in twelve_turns(model, tokenizer, 20):
        assert new_ids(llm, reply) == ids[:-1]
        assert reply == tokenizer.decode(ids, skip_special_tokens=True)
        assert reply.stats.stop_reason == ("stop" if ids[-1] == stop else "length")
        assert reply.stats.tokens_out == len(ids)
        reused.append(reply.stats.tokens_in - reply.stats.tokens_reused)
    assert max(reused[1:]) < 120 < reply.stats.tokens_in  # a turn costs its own tokens, not the history's


@pytest.mark.slow
def test_twelve_turns_of_a_real_model(small):
    model, tokenizer = load_model(small, dtype="float32")
    for llm, reply, ids in twelve_turns(model, tokenizer, 4):
        assert new_ids(llm, reply) == ids[:-1]
    assert reply.stats.tokens_in > 400 and reply.stats.tokens_in - reply.stats.tokens_reused < 50


def test_the_published_greedy_tokens(family, monkeypatch):
    """Whatever was said before: the keys and values kept of it are cut to what the next has in common."""
    monkeypatch.setattr("chatmagic.backends.generate.PREFILL_CHUNK", 3)
    model, tokenizer, cases = family
    llm = ChatLLM(model, tokenizer, max_new_tokens=24)
    for case in [*cases, *reversed(cases)]:
        reply = llm.chat(case["messages"], greedy=True, repetition_penalty=1.0)
        assert reply.stats.tokens_in == len(case["prompt_ids"])
        assert new_ids(llm, reply) == case["greedy"][:-1]


def test_an_explicit_model_type_wins(model, tokenizer):
    llm = ChatLLM(model, tokenizer, model_type="baichuan2-chat")
    messages = llm.build_messages(query="hi", history=[("a", "b")])
    assert llm.build_prompt(messages) == "<reserved_106>a<reserved_107>b<reserved_106>hi<reserved_107>"
    assert llm.chat(messages, max_new_tokens=1).stats.tokens_in == len(llm.build_prompt(messages))
    ids, labels = llm.build_inputs_labels(messages[:2], multi_rounds=True)
    assert len(ids) == len(labels)
    assert labels[-2:] == ids[-2:] == [tokenizer.encode("b")[0], tokenizer.eos_token_id]
    with pytest.raises(ChatmagicError, match="baichuan2-chat"):
        ChatLLM(model, tokenizer, model_type="baichuan2-chta")


def test_sampling_is_that_of_plain_generate(model, tokenizer):
    from transformers import set_seed

    model.generation_config.update(do_sample=True, temperature=0.7, top_k=20, repetition_penalty=1.3)
    llm = ChatLLM(model, tokenizer, stream=False, max_new_tokens=30)
    reply = llm("hello", seed=7, top_p=0.9)
    set_seed(7)
    assert (
        new_ids(llm, reply)
        == plain(model, encode_prompt(build_messages("hello"), tokenizer), top_p=0.9, max_new_tokens=30)[:-1]
    )
    assert llm("hello", seed=7, top_p=0.9, remember=False) != llm("hello", seed=8, top_p=0.9, remember=False)


def test_seeding_a_reply_leaves_the_notebooks_random_numbers(model, tokenizer):
    import torch

    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    ChatLLM(model, tokenizer, stream=False, max_new_tokens=3)("hello", seed=7, temperature=1.0)
    assert torch.rand(1) == expected


def test_greedy_and_temperature_zero_override_a_sampling_model(model, tokenizer):
    model.generation_config.update(do_sample=True, temperature=5.0)
    llm = ChatLLM(model, tokenizer, stream=False, max_new_tokens=30)
    greedy = llm("hello", greedy=True, remember=False)
    assert greedy == llm("hello", temperature=0, remember=False)
    assert greedy == llm("hello", temperature=0.0, top_p=0.5, remember=False)
    assert model.generation_config.temperature == 5.0  # the model's own is not touched


def test_unknown_option(model, tokenizer):
    with pytest.raises(ChatmagicError, match="'temprature'; did you mean 'temperature'"):
        ChatLLM(model, tokenizer)("x", temprature=0.5)


def test_a_prompt_is_encoded_once_a_turn(model, tokenizer, monkeypatch):
    encoded = []

    def noted(messages, *args, **kwargs):
        encoded.append(messages)
        return encode_prompt(messages, *args, **kwargs)

    monkeypatch.setattr("chatmagic.backends.generate.encode_prompt", noted)
    llm = ChatLLM(model, tokenizer, stream=False, max_new_tokens=2)
    for query in "abc":
        llm(query, greedy=True)
    llm.chat(encoded[-1], greedy=True)
    assert encoded == [build_messages(query, llm.history[:turn]) for turn, query in enumerate("abc")] + encoded[-1:]


@pytest.mark.parametrize("change", ["system", "undone", "trimmed", "nothing"])
def test_the_longest_common_prefix_is_reused(model, tokenizer, change):
    llm = ChatLLM(model, tokenizer, stream=False, max_new_tokens=5, system="abc")
    llm("first", greedy=True), llm("second", greedy=True)
    kept = list(llm.backend._kept_ids)
    match change:
        case "system":
            llm.system = "abd"
        case "undone":
            llm.history = llm.history[:1]
        case "trimmed":
            llm.history = llm.history[1:]
    ids = encode_prompt(build_messages("third", llm.history, llm.system), tokenizer)
    common = next(n for n in range(len(ids)) if ids[: n + 1] != kept[: n + 1])
    reply = llm("third", greedy=True)
    assert reply.stats.tokens_reused == common > 3
    assert new_ids(llm, reply) == plain(model, ids, do_sample=False, max_new_tokens=5)[:-1]


def test_the_same_question_again_runs_its_last_token_only(model, tokenizer):
    llm = ChatLLM(model, tokenizer, stream=False, max_new_tokens=5)
    first, second = (llm("hi", greedy=True, remember=False) for _ in range(2))
    assert first == second and second.stats.tokens_reused == second.stats.tokens_in - 1


ANY = [written_through_data, written_through_numpy]  # one element of a weight
WIDE = [adapter, trained, trained_by_bitsandbytes, column_written_through_data, rows_swapped_through_data]


@pytest.mark.parametrize("whole, change", [*product([WHOLE], ANY + WIDE), *product([0], WIDE)])
def test_kept_keys_and_values_are_dropped_when_the_weights_change(model, tokenizer, monkeypatch, whole, change):
    """A reader chats, trains, and chats on: the second reply must come from the new weights alone."""
    monkeypatch.setattr("chatmagic.backends.weights.WHOLE", whole)
    llm = ChatLLM(model, tokenizer, stream=False, max_new_tokens=10)
    llm("hi", greedy=True, remember=False)
    assert llm("hi", greedy=True, remember=False).stats.tokens_reused > 0
    change(model)
    reply = llm("hi", greedy=True, remember=False)
    assert reply.stats.tokens_reused == 0
    assert reply == ChatLLM(model, tokenizer, stream=False, max_new_tokens=10)("hi", greedy=True)


def test_an_adapter_switched_off(model, tokenizer):
    llm = ChatLLM(model, tokenizer, stream=False, max_new_tokens=10)
    base = llm("hi", greedy=True, remember=False)
    peft_model = adapter(model)
    tuned = ChatLLM(peft_model, tokenizer, stream=False, max_new_tokens=10)
    adapted = tuned("hi", greedy=True, remember=False)
    assert adapted != base
    with peft_model.disable_adapter():
        assert tuned("hi", greedy=True, remember=False) == base
    assert tuned("hi", greedy=True, remember=False) == adapted
    peft_model.merge_adapter()
    assert tuned("hi", greedy=True, remember=False).stats.tokens_reused == 0


def test_chatting_while_training(model, tokenizer):
    """Dropout and checkpointing are off for a reply, and on again after it, part by part."""
    reference = ChatLLM(model, tokenizer, stream=False, max_new_tokens=10)("hi", greedy=True)
    model.model.layers[0].train()
    model.config.use_cache = False  # as the seed's training cells leave it
    model.gradient_checkpointing_enable()
    model.model.layers[0].self_attn.attention_dropout = 0.9
    llm = ChatLLM(model, tokenizer, stream=False, max_new_tokens=10)
    assert llm("hi", greedy=True) == reference
    assert not model.training and model.model.layers[0].training and not model.model.layers[1].training


def test_every_stop_id_ends_a_reply_and_is_not_shown(model, tokenizer):
    llm = ChatLLM(model, tokenizer, stream=False, max_new_tokens=30)
    whole = llm("hi", greedy=True, remember=False)
    ids = new_ids(llm, whole)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, ids[4]]
    reply = llm("hi", greedy=True, remember=False)
    assert reply == tokenizer.decode(ids[: ids.index(ids[4])]) and reply.stats.stop_reason == "stop"


def test_a_stop_string_ends_a_reply_even_without_stop_ids(model, tokenizer):
    model.generation_config.eos_token_id = None
    llm = ChatLLM(model, tokenizer, stream=False, max_new_tokens=30)
    llm.backend.template = SimpleNamespace(
        stop_token_ids=lambda tokenizer: [], stop_strings=[], parting=lambda thinking: None
    )
    whole = llm("hi", greedy=True, remember=False)
    assert whole.stats.tokens_out == 30 and whole.stats.stop_reason == "length"
    llm.backend.template.stop_strings = ["never said", whole[12:15]]
    reply = llm("hi", greedy=True, remember=False)
    assert reply == whole[: whole.index(whole[12:15])] and reply.stats.stop_reason == "stop"


def test_a_reply_ends_before_a_stop_string_of_the_askers(model, tokenizer):
    llm = ChatLLM(model, tokenizer, stream=False, max_new_tokens=30)
    whole = llm("hi", greedy=True, remember=False)
    assert len(whole) > 16
    for end in (whole[9:12], whole[9]):
        reply = llm("hi", greedy=True, remember=False, stop=["never said", end])
        assert reply == whole[: whole.index(end)] and reply.stats.stop_reason == "stop"
        assert llm.history == []
    missed = llm("hi", greedy=True, remember=False, stop=[whole[-1] + "x"])  # its beginning is held, and said at last
    assert missed == whole and missed.stats.stop_reason == "length"
    for wrong in ("x", [""], [], [3]):
        with pytest.raises(ChatmagicError, match="stop must be"):
            llm("hi", stop=wrong)


def test_messages_beyond_the_context(model, tokenizer):
    model.config.max_position_embeddings = 40
    llm = ChatLLM(model, tokenizer, stream=False)
    with pytest.raises(ChatmagicError, match="51 tokens.* ends at 40.*%chat_reset"):
        llm("x" * 32)
    model.config.max_position_embeddings = 60
    assert ChatLLM(model, tokenizer, stream=False)("x" * 32, greedy=True).stats.tokens_out <= 9


def test_out_of_memory_frees_what_was_kept(model, tokenizer, monkeypatch):
    import torch

    llm = ChatLLM(model, tokenizer, stream=False, max_new_tokens=5)
    llm("hi")

    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1], "forward", no_memory)
        with pytest.raises(ChatmagicError, match="%chat_reset.*--max-new-tokens.*nf4"):
            llm("again")
    assert llm.backend._cache is None and len(llm.history) == 1
    assert llm("again").stats.tokens_reused == 0


def test_stop_ends_a_reply_at_once_and_the_next_is_as_ever(model, tokenizer):
    llm = ChatLLM(model, tokenizer, stream=False, max_new_tokens=1000)
    expected = llm("hi", greedy=True, remember=False, max_new_tokens=20)
    for delay in (0.01, 0.02, 0.05, 0.1, 0.2):
        interrupt_after(delay)
        start = time.thread_time()  # which other processes do not lengthen
        with pytest.raises(Interrupted) as caught:
            llm("hello", greedy=True)
        assert time.thread_time() - start < delay + 0.2
        assert llm.history == [] and caught.value.reply.stats.stop_reason == "interrupted"
        assert llm("hi", greedy=True, remember=False, max_new_tokens=20) == expected


def test_two_threads_on_one_model_wait_for_each_other(model, tokenizer):
    """In one ChatLLM and in two, over an adapter's wrapper too; each answer is as if it were alone."""
    llms = [ChatLLM(model, tokenizer, stream=False, max_new_tokens=10, name=name) for name in "ab"]
    queries = [f"question {n}" for n in range(8)]
    alone = [llms[0](query, greedy=True, remember=False) for query in queries]
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(llms[n % 2], query, greedy=True, remember=False) for n, query in enumerate(queries)]
    assert [reply.result() for reply in asked] == alone


def test_a_model_asked_while_it_answers_says_so(model, tokenizer):
    llm = ChatLLM(model, tokenizer, max_new_tokens=5)
    with pytest.raises(ChatmagicError, match="is still answering: ask it again when that reply has ended"):
        llm("hi", stream=lambda piece: llm("and?"))
    assert llm("hi", stream=False).stats.tokens_out == 5


def test_stop_in_the_middle_of_a_cut_leaves_no_wrong_cache(model, tokenizer, monkeypatch):
    llm = ChatLLM(model, tokenizer, stream=False, max_new_tokens=8)
    expected = [llm(query, greedy=True, remember=False) for query in ("a long first question", "a short")]

    def cut_the_first_layer(cache, length):
        layer = cache.layers[0]
        layer.keys = layer.keys[..., :length, :]
        raise KeyboardInterrupt

    llm("a long first question", greedy=True, remember=False)
    with monkeypatch.context() as patch:
        patch.setattr("chatmagic.backends.generate.cut", cut_the_first_layer)
        with pytest.raises(Interrupted):
            llm("a short", greedy=True, remember=False)
    assert llm("a long first question", greedy=True, remember=False) == expected[0]
    assert llm("a short", greedy=True, remember=False) == expected[1]


@pytest.mark.parametrize(
    "option, words",
    [
        ({"num_beams": 4}, "'num_beams' has no place here: .*temperature, top_k"),
        ({"max_time": 1.0}, "'max_time' has no place here"),
        ({"stop_strings": "x"}, "'stop_strings' has no place here"),
        ({"top_k": "many"}, "top_k|many"),
        ({"repetition_penalty": "strong"}, "repetition_penalty|strong"),
        ({"repetition_penalty": -1.0}, "penalty"),
        ({"min_p": 7.0}, "min_p"),
        ({"seed": 2**64}, "cannot generate so: Overflow"),
        ({"eos_token_id": "</s>"}, "cannot generate so: .*'str'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("fast", [True, False])
def test_options_that_cannot_be_are_refused_in_words(model, tokenizer, option, words, fast):
    llm = ChatLLM(model, tokenizer, stream=False, max_new_tokens=3, fast=fast)
    with pytest.raises(ChatmagicError, match=words):
        llm("hi", temperature=1.0, **option)
    assert llm.history == [] and llm("hi").stats.tokens_out == 3
