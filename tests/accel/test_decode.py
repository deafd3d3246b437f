"""The captured forward, over CUDA graphs that `fake_cuda` imitates, and what keeps a model from it."""

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import fake_cuda
from chatmagic import ChatLLM, build_messages, encode_prompt
from chatmagic.conversation.llm import Interrupted
from generation import adapter, new_ids, plain, trained, twelve_turns
from golden import PUBLISHED
from quick import first


@pytest.fixture
def cuda(monkeypatch):
    fake_cuda.install(monkeypatch)


def chat(model, tokenizer):
    return ChatLLM(model, tokenizer, stream=False, max_new_tokens=10)


def expected(model, tokenizer, query="hi"):
    return plain(model, encode_prompt(build_messages(query), tokenizer), do_sample=False, max_new_tokens=10)[:-1]


def test_twelve_turns_are_those_of_plain_generate(cuda, model, tokenizer):
    tokens = 0
    for llm, reply, ids in twelve_turns(model, tokenizer, 20):
        assert new_ids(llm, reply) == ids[:-1]
        tokens += reply.stats.tokens_out
    assert llm.backend.no_graph is None
    assert fake_cuda.Graph.replays == 3 * (tokens - 12 + 1)  # two layers make three graphs; one token was a trial


@pytest.fixture(params=[1.0, 1.001])
def kernels(request, monkeypatch):
    """In place of Triton's: functions that launch one operator more, and one that is off by a factor."""
    norm, rotary = modeling_llama.LlamaRMSNorm.forward, modeling_llama.apply_rotary_pos_emb

    def rotate(q, k, cos, sin, unsqueeze_dim=1):
        return [each.mul_(1) for each in rotary(q, k, cos, sin, unsqueeze_dim)]

    def normalise(layer, x):
        return norm(layer, x).mul_(request.param)

    monkeypatch.setitem(sys.modules, "chatmagic.accel.kernels", SimpleNamespace(normalise=normalise, rotate=rotate))
    return request.param == 1.0


def test_kernels_are_used_where_they_compute_the_same(cuda, model, tokenizer, kernels):
    before, llm = modeling_llama.apply_rotary_pos_emb, chat(model, tokenizer)
    assert new_ids(llm, llm("hi", greedy=True)) == expected(model, tokenizer)
    graphed = llm.backend._graphed
    operators = [step[0] for segment in graphed.segments for step in segment.graph.launched]
    operators += [step[0] for step in graphed._last.launched]
    layers = len(graphed.segments)
    assert operators.count(torch.ops.aten.mul_.Tensor) == ((2 * layers + 2 * layers + 1) * kernels)
    assert modeling_llama.apply_rotary_pos_emb is before
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", first(1, PUBLISHED, of=lambda each: "baichuan2-13b" in each), indirect=True)
def test_the_published_greedy_tokens(cuda, family):
    model, tokenizer, cases = family
    llm = ChatLLM(model, tokenizer, max_new_tokens=24)
    with warnings.catch_warnings(record=True) as said:
        for case in [*cases, *reversed(cases)]:
            reply = llm.chat(case["messages"], greedy=True, repetition_penalty=1.0)
            assert new_ids(llm, reply) == case["greedy"][:-1]
    reasons = [str(warning.message) for warning in said if "CUDA graphs" in str(warning.message)]
    if model.config.model_type == "baichuan_alibi":
        assert len(reasons) == 1 and reasons[0].endswith("biases its attention by distance")
    else:
        assert reasons == [] and fake_cuda.Graph.replays > 100


def test_on_the_cpu_it_is_off_without_a_word(model, tokenizer, recwarn):
    llm = chat(model, tokenizer)
    llm("hi")
    assert llm.backend.no_graph.endswith("is not on a CUDA GPU")
    assert not [warning for warning in recwarn if "graph" in str(warning.message)]


def test_attention_is_not_cudnns(model, tokenizer, monkeypatch):
    seen, forward = [], model.model.layers[0].mlp.forward

    def noted(hidden):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return forward(hidden)

    monkeypatch.setattr(model.model.layers[0].mlp, "forward", noted)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    chat(model, tokenizer)("hi")
    assert len(seen) > 1 and not any(seen) and torch.backends.cuda.cudnn_sdp_enabled()


def test_sampling_over_a_captured_forward(cuda, model, tokenizer):
    options = {"seed": 7, "temperature": 0.9, "remember": False}
    first, second = (chat(model, tokenizer)("hi", **options) for _ in range(2))
    assert first == second and fake_cuda.Graph.replays


@pytest.mark.parametrize("call", first(1, [2, 1, 3, 4]))
def test_an_interrupt_between_two_graphs(cuda, model, tokenizer, monkeypatch, call):
    llm = chat(model, tokenizer)
    llm("hi", greedy=True, remember=False)
    graphed, attention, calls = llm.backend._graphed, llm.backend._graphed.attention, []

    def stopped(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return attention(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(graphed, "attention", stopped)
        with pytest.raises(Interrupted):
            llm("hi there", greedy=True)
    assert new_ids(llm, llm("hi there", greedy=True)) == expected(model, tokenizer, "hi there")
    assert llm.backend._graphed is graphed


def test_an_interrupt_of_the_capture(cuda, model, tokenizer, monkeypatch):
    llm, mlp = chat(model, tokenizer), model.model.layers[1].mlp
    forward = mlp.forward

    def stopped(hidden):
        if hidden.shape[1] == 1:
            raise KeyboardInterrupt
        return forward(hidden)

    with monkeypatch.context() as patch:
        patch.setattr(mlp, "forward", stopped)
        with pytest.raises(Interrupted):
            llm("hi", greedy=True)
    assert new_ids(llm, llm("hi", greedy=True)) == expected(model, tokenizer) and fake_cuda.Graph.replays


@pytest.mark.parametrize("change", first(1, [adapter, trained, lambda model: model.double()]))
def test_new_weights_are_captured_anew(cuda, model, tokenizer, change):
    llm = chat(model, tokenizer)
    llm("hi", greedy=True, remember=False)
    before = llm.backend._graphed
    change(model)
    reply = llm("hi", greedy=True, remember=False)
    assert new_ids(llm, reply) == expected(model, tokenizer)
    assert llm.backend._graphed not in (None, before)


def test_reset_frees_the_graphs(cuda, model, tokenizer):
    llm = chat(model, tokenizer)
    llm("hi")
    assert llm.backend._graphed
    llm.reset()
    assert not llm.backend._graphed


def hooked(model):
    model.model.norm.register_forward_hook(lambda module, args, output: output * 0.5)


def without_sdpa(model):
    model.set_attn_implementation("eager")


def offloaded(model):
    model.model.norm._hf_hook = object()  # accelerate's


def counting_by_itself(model):
    """Numbers positions in Python, whatever it is told: a graph would repeat the number."""
    forward, calls = model.model.rotary_emb.forward, []

    def rotary(hidden, position_ids):
        calls.append(hidden)
        return forward(hidden, torch.full_like(position_ids, len(calls)))

    model.model.rotary_emb.forward = rotary


def reading_a_number(model):
    forward = model.model.norm.forward
    model.model.norm.forward = lambda hidden: forward(hidden) * (1 if hidden.sum().item() else 0)


@pytest.mark.parametrize(
    "make, reason",
    [
        (hooked, "has forward hooks, which a graph would not call"),
        (without_sdpa, "has eager attention, not sdpa"),
        (offloaded, "is spread over devices, or offloaded"),
        (counting_by_itself, "computes other logits when captured"),
        (reading_a_number, "cannot be captured: operation not permitted when stream is capturing"),
    ],
)
def test_what_keeps_a_model_from_it(cuda, model, tokenizer, make, reason):
    make(model)
    llm = chat(model, tokenizer)
    with pytest.warns(UserWarning, match=f"replies come slower, without CUDA graphs: .*{reason}"):
        first = llm("hi", greedy=True, remember=False)
    assert llm.backend._graphed is None
    assert first == llm("hi", greedy=True, remember=False) or make is counting_by_itself


def test_other_keys_than_those_kept(cuda, model, tokenizer, monkeypatch):
    class ScalingKeys:
        def get_interface(self, name, default):
            attention = ALL_ATTENTION_FUNCTIONS[name]
            return lambda module, query, key, *others, **options: attention(module, query, key * 2, *others, **options)

    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", ScalingKeys())
    with pytest.warns(UserWarning, match="attends to other keys than those it keeps"):
        llm = chat(model, tokenizer)
        assert new_ids(llm, llm("hi", greedy=True)) == expected(model, tokenizer)


def test_a_window_of_the_past(cuda, tokenizer):
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    with pytest.warns(UserWarning, match="keeps more, or less, of the past"):
        llm = chat(model, tokenizer)
        assert new_ids(llm, llm("hi", greedy=True)) == expected(model, tokenizer)


@pytest.mark.parametrize("options", [{"greedy": True}, {"temperature": 0.9, "seed": 7}])
def test_fast_false_is_plain_generate(cuda, model, tokenizer, monkeypatch, options):
    """Not our loop, no graph, no attention of ours, and the same tokens."""
    llm = ChatLLM(model, tokenizer, stream=False, max_new_tokens=10, fast=False)
    monkeypatch.setattr(llm.backend, "_decode", None)
    registered, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], []
    model.model.norm.register_forward_hook(
        lambda *_: seen.append((model.config._attn_implementation, torch.backends.cuda.cudnn_sdp_enabled()))
    )
    reply = llm("hi", remember=False, **options)
    assert set(seen) == {("sdpa", True)} and ALL_ATTENTION_FUNCTIONS["sdpa"] is registered
    assert fake_cuda.Graph.replays == 0 and reply.stats.tokens_out > 0
    if "greedy" in options:
        ids = plain(model, encode_prompt(build_messages("hi"), tokenizer), do_sample=False, max_new_tokens=10)
        assert reply == tokenizer.decode(ids, skip_special_tokens=True)
    before = torch.random.get_rng_state()
    assert llm("hi", remember=False, **options) == reply
    assert torch.equal(torch.random.get_rng_state(), before)
