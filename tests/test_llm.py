"""ChatLLM over a fake model, over tiny models with real weights, and over a server."""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from fake_model import FakeModel

from chatmagic import ChatLLM, ChatmagicError, build_messages, connect, encode_prompt, load_model
from chatmagic.generate import TextStream
from chatmagic.llm import Interrupted, models

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# The conversation, over a fake model


@pytest.fixture
def fake():
    return FakeModel()


def test_a_reply_is_a_string_that_knows_what_it_cost(fake, capsys):
    reply = ChatLLM(fake, stream=False)("你好")
    assert reply == "1: 你好" and capsys.readouterr().out == ""
    assert (reply.query, reply.model, reply.stats.stop_reason) == ("你好", "fake", "stop")
    assert (reply.stats.tokens_in, reply.stats.tokens_out) == (2, 5)
    assert 0 < reply.stats.seconds_to_first_token < reply.stats.seconds
    assert reply.stats.tokens_per_second > 0


def test_an_empty_reply(fake):
    fake.reply = lambda turn, question: ""
    reply = ChatLLM(fake)("hi")
    assert reply == "" and reply.stats.tokens_per_second is None
    assert str(reply.stats) == "2 tokens in (0 kept), 0 out, first after ? s, ? tokens/s, stop"


def test_streaming_prints_pieces_as_they_come(fake, monkeypatch):
    calls = []
    monkeypatch.setattr("builtins.print", lambda *text, **keywords: calls.append((*text, keywords)))
    ChatLLM(fake)("hi")
    assert calls == [(c, {"end": "", "flush": True}) for c in "1: hi"] + [({},)]


def test_chat_leaves_history_alone(fake):
    llm = ChatLLM(fake, history=[("a", "b")], system="s")
    assert llm.chat(messages=llm.build_messages(query="x")) == "1: x"
    assert fake.asked[0][0] == [{"role": "user", "content": "x"}]
    assert llm.history == [("a", "b")]


def test_history_keeps_the_last_whole_rounds(fake):
    llm = ChatLLM(fake, max_chat_rounds=2, stream=False, system="be brief")
    for query in "abcd":
        llm(query)
    assert llm.history == [("c", "3: c"), ("d", "3: d")]
    assert fake.asked[-1][0] == build_messages("d", [("b", "2: b"), ("c", "3: c")], "be brief")


def test_no_rounds_means_no_history(fake):
    llm = ChatLLM(fake, max_chat_rounds=0, stream=False)
    assert [llm("a"), llm("b"), llm.history] == ["1: a", "1: b", []]


def test_the_oldest_rounds_give_way_to_the_context():
    llm = ChatLLM(FakeModel(context=30), max_new_tokens=10, stream=False)
    for query in ("aaaa", "bbbb", "cccc"):
        llm(query)
    # 4 + 7 + 4 + 7 + 4 = 26 characters do not fit 30 - 10: the first round is left out, of the prompt alone
    assert llm.backend.asked[2][0] == build_messages("cccc", [("bbbb", "2: bbbb")])
    assert [query for query, _ in llm.history] == ["aaaa", "bbbb", "cccc"]


@pytest.mark.parametrize(
    "failure", [ChatmagicError("broken"), RuntimeError("CUDA error"), KeyboardInterrupt()]
)
def test_a_turn_that_failed_leaves_the_history(fake, failure):
    llm = ChatLLM(fake, stream=False)
    llm("a")
    fake.failure = failure
    with pytest.raises(Interrupted if isinstance(failure, KeyboardInterrupt) else type(failure)):
        llm("b")
    assert llm.history == [("a", "1: a")]
    assert llm("c") == "2: c"


def test_an_interrupted_reply_is_kept_with_the_exception(fake):
    fake.failure = KeyboardInterrupt()
    with pytest.raises(Interrupted, match="after 3 tokens") as caught:
        ChatLLM(fake, stream=False)("abc")
    assert caught.value.reply == "1: " and caught.value.reply.stats.stop_reason == "interrupted"
    assert isinstance(caught.value, KeyboardInterrupt)  # `except Exception` in a loop must not swallow Stop


def test_outside_the_conversation(fake):
    llm = ChatLLM(fake, history=[("a", "b")], stream=False)
    assert llm("x", remember=False, system="s") == "1: x"
    assert llm.history == [("a", "b")] and fake.asked[0][0] == build_messages("x", system="s")


@pytest.mark.parametrize(
    "option",
    [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"max_new_tokens": 0}, {"max_new_tokens": "9"}],
)
def test_impossible_options(fake, option):
    with pytest.raises(ChatmagicError, match=f"{next(iter(option))} must be"):
        ChatLLM(fake)("x", **option)
    assert fake.asked == []


def test_json_reply(fake):
    llm = ChatLLM(fake, stream=False)
    fake.reply = lambda turn, question: question
    assert llm('```json\n{"a": [1]}\n```').json() == {"a": [1]}
    with pytest.raises(ChatmagicError, match="begins 'Sure"):
        llm("Sure! {}").json()


def test_save_and_load(fake, tmp_path):
    llm = ChatLLM(fake, stream=False, system="系统")
    llm("一"), llm("two\nlines\u2028")
    path = tmp_path / "chat.jsonl"
    llm.save(path)
    assert path.read_text("utf-8") == (
        '{"messages": [{"role": "system", "content": "系统"}, {"role": "user", "content": "一"}, '
        '{"role": "assistant", "content": "1: 一"}, {"role": "user", "content": "two\\nlines\u2028"}, '
        '{"role": "assistant", "content": "2: two\\nlines\u2028"}]}\n'
    )
    other = ChatLLM(fake)
    other.load(path)
    assert (other.history, other.system) == (llm.history, "系统")


def test_a_save_that_fails_leaves_the_file(fake, tmp_path):
    llm, path = ChatLLM(fake, history=[("a", "b")]), tmp_path / "chat.jsonl"
    llm.save(path)
    before = path.read_bytes()
    llm.history = [("\ud800", "a lone surrogate cannot be written")]
    with pytest.raises(ChatmagicError, match="cannot be saved.*surrogates"):
        llm.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_save_that_is_cut_short_leaves_the_file(fake, tmp_path, monkeypatch):
    llm, path = ChatLLM(fake, history=[("a", "b")]), tmp_path / "chat.jsonl"
    llm.save(path)
    before = path.read_bytes()
    llm.history *= 2

    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ChatmagicError, match="cannot be saved.*No space left"):
        llm.save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "not one line"),
        ("{}\n", "not one line"),
        ("[1]\n", "not one line"),
        ('{"messages": []}\n', "empty"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "not answered"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', "Message 0"),
    ],
)
def test_a_file_that_is_no_conversation(fake, tmp_path, text, reason):
    llm = ChatLLM(fake, history=[("a", "b")])
    (tmp_path / "chat.jsonl").write_text(text)
    with pytest.raises(ChatmagicError, match=reason):
        llm.load(tmp_path / "chat.jsonl")
    assert llm.history == [("a", "b")]


def test_models_are_registered_by_name_and_not_kept_alive(fake):
    models.clear()
    first, second = ChatLLM(fake), ChatLLM(fake, name="second")
    assert list(models) == ["fake", "second"] and fake.asked == []  # no hidden prompt
    first = ChatLLM(fake)
    assert list(models) == ["second", "fake"] and models["fake"] is first
    del first, second
    assert not models


def test_reset_forgets_and_frees(fake):
    llm = ChatLLM(fake, history=[("a", "b")])
    llm.reset()
    assert llm.history == [] and fake.forgotten == 1


def test_chatting_with_a_server_needs_no_torch():
    code = (
        "import sys, chatmagic; chatmagic.connect('http://localhost:1/v1', 'm')\n"
        "assert not {'torch', 'transformers', 'IPython'} & set(sys.modules), set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# A local model


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, one token each, and ChatML's marks: any random model with it speaks broken UTF-8."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({character: index for index, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )


@pytest.fixture
def model(tokenizer):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def plain(model, ids, **options):
    """What transformers' own generate says to these ids, the new ones only."""
    import torch

    ids = torch.tensor([ids])
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()


def new_ids(llm, reply):
    """The ids of a reply, of which the kept keys and values lack the last."""
    return llm.backend._kept_ids[reply.stats.tokens_in :]


def twelve_turns(model, tokenizer, tokens):
    """Ask twelve greedy questions; each reply's text and the ids of plain generate for the same messages."""
    llm = ChatLLM(model, tokenizer, stream=False, max_new_tokens=tokens)
    for turn in range(12):
        query = f"Question {turn}: 你好, what is {turn} + {turn}?"
        messages = build_messages(query, llm.history)
        reply = llm(query, greedy=True)
        ids = plain(model, encode_prompt(messages, tokenizer), do_sample=False, max_new_tokens=tokens)
        yield llm, reply, ids


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


def test_twelve_turns_of_a_real_model(embedded):
    model, tokenizer = load_model(embedded, dtype="float32")
    for llm, reply, ids in twelve_turns(model, tokenizer, 4):
        assert new_ids(llm, reply) == ids[:-1]
    assert reply.stats.tokens_in > 400 and reply.stats.tokens_in - reply.stats.tokens_reused < 50


FAMILIES = ["baichuan2-13b-chat", "chatglm2-6b", "internlm-chat-7b", "qwen-7b-chat"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, shared, tiny_models):
    """A published family, tiny: model, tokenizer, and cases of what its publisher's code says."""
    model, tokenizer = load_model(tiny_models / request.param, dtype="float32")
    if tokenizer is None:  # the 13B folder leaves it to the 7B's
        tokenizer = load_model(tiny_models / "baichuan2-7b-chat")[1]
    golden = shared / "models" / request.param / "golden.json"
    return model, tokenizer, json.loads(golden.read_text("utf-8"))["cases"]


def test_the_published_greedy_tokens(family, monkeypatch):
    """Whatever was said before: the keys and values kept of it are cut to what the next has in common."""
    monkeypatch.setattr("chatmagic.generate.PREFILL_CHUNK", 3)
    model, tokenizer, cases = family
    llm = ChatLLM(model, tokenizer, max_new_tokens=24)
    for case in [*cases, *reversed(cases)]:
        reply = llm.chat(case["messages"], greedy=True, repetition_penalty=1.0)
        assert reply.stats.tokens_in == len(case["prompt_ids"])
        assert new_ids(llm, reply) == case["greedy"][:-1]


def test_pieces_join_to_the_text_of_every_family(family):
    _, tokenizer, _ = family
    text = "你好，世界！ Two  spaces,\n\n　１２３ 🙂🏳️‍🌈 café ꧁ def f(x):\n\treturn x"
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer, [])
    pieces = [stream.push(token) for token in ids] + [stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert "\ufffd" not in "".join(pieces)


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


def adapter(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))


def trained(model):
    import torch

    weight = next(model.parameters())
    optimizer = torch.optim.SGD([weight], 0.5)
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("change", [adapter, trained])
def test_kept_keys_and_values_are_dropped_when_the_weights_change(model, tokenizer, change):
    """A reader chats, trains, and chats on: the second reply must come from the new weights alone."""
    llm = ChatLLM(model, tokenizer, stream=False, max_new_tokens=10)
    llm("hi", greedy=True, remember=False)
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
    llm.backend.template = SimpleNamespace(stop_token_ids=lambda tokenizer: [], stop_strings=[])
    whole = llm("hi", greedy=True, remember=False)
    assert whole.stats.tokens_out == 30 and whole.stats.stop_reason == "length"
    llm.backend.template.stop_strings = ["never said", whole[12:15]]
    reply = llm("hi", greedy=True, remember=False)
    assert reply == whole[: whole.index(whole[12:15])] and reply.stats.stop_reason == "stop"


def test_characters_and_stop_strings_arrive_whole(tokenizer):
    ids = tokenizer.encode("你好🙂 a#b ##c\n##END and more", add_special_tokens=False)
    stream = TextStream(tokenizer, ["##END", "</s>"])
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    assert stream.flush() == "" and stream.stopped
    assert [piece for piece in pieces if piece] == [*"你好🙂", " ", "a", "#b", " ", "##c", "\n"]


def test_an_unfinished_character_or_stop_string_is_shown_in_the_end(tokenizer):
    stream = TextStream(tokenizer, ["##END"])
    ids = tokenizer.encode("a##E你", add_special_tokens=False)
    pieces = [stream.push(token) for token in ids[:-1]]
    assert "".join(pieces) == "a" and stream.flush() == "##E\ufffd"


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


def interrupt_after(seconds):
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, seconds)


def test_stop_ends_a_reply_at_once_and_the_next_is_as_ever(model, tokenizer):
    llm = ChatLLM(model, tokenizer, stream=False, max_new_tokens=1000)
    expected = llm("hi", greedy=True, remember=False, max_new_tokens=20)
    for delay in (0.01, 0.02, 0.05, 0.1, 0.2):
        interrupt_after(delay)
        start = time.perf_counter()
        with pytest.raises(Interrupted) as caught:
            llm("hello", greedy=True)
        assert time.perf_counter() - start < delay + 0.2
        assert llm.history == [] and caught.value.reply.stats.stop_reason == "interrupted"
        assert llm("hi", greedy=True, remember=False, max_new_tokens=20) == expected


# A server

BREAKING_OFF = ["ends early", "dies", "sends half an event"]


class Handler(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that knows the model "parrot" and the key "sesame"."""

    def do_GET(self):
        if self.path != "/v1/models":
            return self.answer(404, {"detail": "Not Found"})
        self.answer(200, {"object": "list", "data": [{"id": "parrot", "object": "model"}]})

    def do_POST(self):
        if self.path != "/v1/chat/completions":
            return self.answer(404, {"detail": "Not Found"})
        self.server.request = request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != "Bearer sesame":
            return self.answer(401, {"error": {"message": "wrong key"}})
        if request["model"] != "parrot":
            return self.answer(404, {"error": {"message": "no such model"}})
        if len(request["messages"][-1]["content"]) > 100:
            return self.answer(400, {"error": {"message": "maximum context length is 100"}})
        how = request["messages"][-1]["content"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        if how == "dies":
            self.send_header("Content-Length", "9999")
        self.end_headers()
        for word in ["你", "好", "!"]:
            self.event({"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]})
            time.sleep(self.server.delay)
        if how == "sends half an event":
            self.wfile.write(b'data: {"choices": [{"ind\n\n')
        if how in BREAKING_OFF:
            return
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        self.event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, data):
        self.wfile.write(
            b"data: " + json.dumps({"object": "chat.completion.chunk", **data}).encode() + b"\n\n"
        )

    def answer(self, status, data):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(data).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.delay, server.handle_error = 0.0, lambda *_: None  # who interrupts hangs up
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def url(server):
    return f"http://127.0.0.1:{server.server_port}/v1"


def test_a_server_streams_and_counts(server, capsys):
    llm = connect(url(server), "parrot", system="s", max_chat_rounds=5)
    reply = llm("hi", temperature=0.5, top_p=0.9, seed=3, max_new_tokens=20)
    assert reply == "你好!" and capsys.readouterr().out == "你好!\n"
    assert (reply.stats.tokens_in, reply.stats.tokens_out, reply.stats.stop_reason) == (9, 3, "length")
    assert llm.history == [("hi", "你好!")]
    asked = server.request
    assert asked["messages"] == build_messages("hi", system="s")
    assert (asked["temperature"], asked["top_p"], asked["seed"], asked["max_tokens"]) == (0.5, 0.9, 3, 20)
    llm("again", greedy=True, stream=False)
    assert server.request["messages"] == build_messages("again", [("hi", "你好!")], "s")
    assert server.request["temperature"] == 0 and server.request["max_tokens"] == 512


def test_the_key_is_nowhere_to_be_seen(server, tmp_path, monkeypatch, capsys):
    llm = connect(url(server), "parrot")
    llm("hi")
    llm.save(tmp_path / "chat.jsonl")
    seen = (tmp_path / "chat.jsonl").read_text() + repr(llm) + repr(vars(llm)) + repr(vars(llm.backend))
    monkeypatch.setenv("OPENAI_API_KEY", "sesame seed")
    for model, query in [("parrot", "hi"), ("gpt", "hi"), ("parrot", "dies"), ("parrot", "x" * 101)]:
        with pytest.raises(ChatmagicError) as caught:
            connect(url(server), model)(query)
        seen += "".join(traceback.format_exception(caught.value))
    assert "sesame" not in seen + "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "model, key, query, reason",
    [
        ("parrot", "open", "hi", "refused the key.*OPENAI_API_KEY"),
        ("gpt", "sesame", "hi", "no model 'gpt': it has parrot"),
        ("parrot", "sesame", "x" * 101, "maximum context length is 100"),
    ],
)
def test_what_a_server_refuses(server, monkeypatch, model, key, query, reason):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    llm = connect(url(server), model)
    with pytest.raises(ChatmagicError, match=reason):
        llm(query)
    assert llm.history == []


@pytest.mark.parametrize("how", BREAKING_OFF)
def test_a_server_that_breaks_off(server, capsys, how):
    llm = connect(url(server), "parrot")
    with pytest.raises(ChatmagicError, match=f"{url(server)} broke off in the middle of a reply; ask again"):
        llm(how)
    assert capsys.readouterr().out == "你好!\n" and llm.history == []
    assert llm("hi") == "你好!"


def test_a_dead_server():
    with pytest.raises(ChatmagicError, match="server at http://127.0.0.1:9/v1 does not answer: start it"):
        connect("http://127.0.0.1:9/v1", "parrot")("hi")


def test_an_address_without_its_v1(server):
    with pytest.raises(ChatmagicError, match="no model 'parrot'.* may lack its /v1"):
        connect(url(server).removesuffix("/v1"), "parrot")("hi")


@pytest.mark.parametrize("key", [None, ""])
def test_a_server_that_wants_no_key(server, monkeypatch, key):
    monkeypatch.delenv("OPENAI_API_KEY") if key is None else monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ChatmagicError, match="refused the key"):  # it was asked: no key is needed to ask
        connect(url(server), "parrot")("hi")


def test_an_option_no_server_has(server):
    with pytest.raises(ChatmagicError, match="no option 'top_k'"):
        connect(url(server), "parrot")("hi", top_k=5)


def test_stop_ends_a_servers_reply(server):
    server.delay = 1.0
    llm = connect(url(server), "parrot")
    interrupt_after(0.5)
    start = time.perf_counter()
    with pytest.raises(Interrupted) as caught:
        llm("hi")
    assert time.perf_counter() - start < 0.7 and caught.value.reply == "你"
    server.delay = 0.0
    assert llm("hi") == "你好!"
