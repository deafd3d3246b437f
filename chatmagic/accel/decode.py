"""Decoding on a GPU with CUDA graphs: a token costs a few launches a layer, instead of a few dozen.

At batch 1 a plain forward leaves the GPU waiting for Python. Here it is captured in pieces: one ends where a
layer hands its new keys and values to the cache, the next begins behind its attention, which grows and so is
launched as ever (piecewise graphs, as in vLLM, https://docs.vllm.ai/en/latest/design/cuda_graphs.html). Norms and
rotary positions take the kernels of kernels.py, the rest stays as in the plain forward, and so do the logits, to the
last bit. `benchmarks/decode.py` measures it.
"""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from .attention import CAPTURED, attending_by, register_attention
from .patched import patched, same_code

DEVICE = "cuda"
NOT_ON_A_GPU = "is not on a CUDA GPU"


class NoGraph(Exception):
    """Why a model's forward cannot be captured: the rest of the sentence that begins with it."""


def capture(model: PreTrainedModel, token: torch.Tensor, cache: DynamicCache) -> "GraphedForward":
    """A GraphedForward of `model`. Raises NoGraph where there can be none.

    It is tried on `token`, int64 (1, 1), after a `cache` that is not empty, which is left as it was. The logits
    must be those of the plain forward: so a model that numbers positions by itself, say, is found out.
    """
    if reason := obstacle(model, cache):
        raise NoGraph(reason)
    length = cache.get_seq_length()

    def tried(forward: Callable[[torch.Tensor, DynamicCache], torch.Tensor]) -> torch.Tensor:
        try:
            return forward(token, cache).clone()
        finally:
            cut(cache, length)

    def plain(token: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        return model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]

    expected, layers = tried(plain), nullcontext
    with suppress(Exception):  # where Triton, or the C compiler it wants, is missing, or this GPU rounds otherwise
        with fused_layers(model):  # compiles the kernels, too, which a capture must not
            if torch.equal(tried(plain), expected):
                layers = fused_layers
    try:
        with layers(model):
            graphed = GraphedForward(model)
        logits = tried(graphed)
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise NoGraph(f"cannot be captured: {str(error).strip().splitlines()[0]}") from None
    if not torch.equal(logits, expected):
        raise NoGraph("computes other logits when captured")
    return graphed


def obstacle(model: PreTrainedModel, cache: DynamicCache) -> str | None:
    """What is known beforehand to keep `model` from being captured."""
    if model.device.type != DEVICE:
        return NOT_ON_A_GPU
    modules = list(model.modules())
    hooks = [hook for m in modules for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    if any(hasattr(module, "_hf_hook") for module in modules):
        return "is spread over devices, or offloaded"
    if not all(getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks):
        return "has forward hooks, which a graph would not call"  # those of transformers do nothing here
    if model.config._attn_implementation != "sdpa":
        return f"has {model.config._attn_implementation} attention, not sdpa"
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return "keeps more, or less, of the past than keys and values"
    return None


def can_be_cut(cache: DynamicCache) -> bool:
    """Whether what follows the first n tokens can be taken out: not of a window that was full, or the state of a
    scan."""
    windows = [layer for layer in cache.layers if type(layer) is DynamicSlidingWindowLayer]
    others = [layer for layer in cache.layers if layer not in windows]
    whole = all(layer.cumulative_length < layer.sliding_window for layer in windows)
    return whole and all(type(layer) is DynamicLayer for layer in others)


def cut(cache: DynamicCache, length: int) -> None:
    """Keep the keys and values of the first `length` tokens, in layers of whatever lengths."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]
        layer.cumulative_length = length  # of a window


@contextmanager
def fused_layers(model: PreTrainedModel) -> Iterator[None]:
    """Give the layers of `model` that normalise, or rotate query and key, by Llama's very code the kernels of
    kernels.py, for forwards of one token. Raises ImportError without Triton."""
    from .kernels import normalise, rotate

    modules = list(model.modules())
    norms = [module for module in modules if same_code(module.forward, modeling_llama.LlamaRMSNorm.forward)]
    files = [sys.modules.get(name) for name in {type(module).__module__ for module in modules}]
    rotary = "apply_rotary_pos_emb"
    rotating = [file for file in files if same_code(getattr(file, rotary, None), modeling_llama.apply_rotary_pos_emb)]
    changes = [(module, "forward", partial(normalise, module)) for module in norms]
    with patched([*changes, *((file, rotary, rotate) for file in rotating)]):
        yield


@dataclass
class Segment:
    """The graph up to the attention of one layer, and what that is called with."""

    graph: torch.cuda.CUDAGraph
    layer: int
    module: torch.nn.Module
    query: torch.Tensor
    new: list[torch.Tensor]  # key and value of the token
    options: dict
    output: torch.Tensor  # where the next graph reads what the layer has attended to


class GraphedForward:
    """A captured forward of one token; valid while the model's weights stay where they are."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        self.position = torch.zeros_like(self.token)
        self.attention: Callable = ALL_ATTENTION_FUNCTIONS["sdpa"]
        self.segments: list[Segment] = []
        self._pool, self._open = torch.cuda.graph_pool_handle(), None
        gc.collect()  # what it frees must not be freed during the capture
        stream = torch.cuda.Stream(model.device)
        stream.wait_stream(torch.cuda.current_stream(model.device))
        before = _CAPTURING.set(self)
        try:
            with attending_by(CAPTURED, model), torch.cuda.stream(stream):
                try:
                    self._begin()
                    self.logits = model(
                        input_ids=self.token,
                        position_ids=self.position,
                        past_key_values=_NewOnly(self, config=model.config),
                        use_cache=True,
                    ).logits[:, -1]
                    self._last = self._end()
                finally:
                    if self._open:
                        with suppress(RuntimeError):
                            self._end()
        finally:
            _CAPTURING.reset(before)
        torch.cuda.current_stream(model.device).wait_stream(stream)

    def __call__(self, token: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """The logits after `token`, int64 (1, 1), (1, vocabulary), which the next call overwrites."""
        self.token.copy_(token)
        self.position.fill_(cache.get_seq_length())
        for each in self.segments:
            each.graph.replay()
            keys, values = cache.update(*each.new, each.layer)
            each.output.copy_(self.attention(each.module, each.query, keys, values, None, **each.options)[0])
        self._last.replay()
        return self.logits

    def _begin(self) -> None:
        self._open = torch.cuda.CUDAGraph()
        self._open.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _end(self) -> torch.cuda.CUDAGraph:
        graph, self._open = self._open, None
        graph.capture_end()
        return graph

    def _pause(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """In place of attention while capturing: one query and its own key, so a boolean mask says nothing."""
        graph = self._end()
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            raise NoGraph("biases its attention by distance")
        layer, *new = self._new
        if key is not new[0] or value is not new[1]:
            raise NoGraph("attends to other keys than those it keeps")
        output = query.new_empty(1, 1, query.shape[1], value.shape[-1])
        self.segments.append(Segment(graph, layer, module, query, new, options, output))
        self._begin()
        return output, None


class _NewOnly(DynamicCache):
    """The cache while capturing: empty, and what a layer gives it is all that it gives back."""

    def __init__(self, forward: GraphedForward, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self._forward = forward

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Note the new key and value of a layer, and give them back alone."""
        self._forward._new = layer, key, value
        return key, value


_CAPTURING: ContextVar[GraphedForward] = ContextVar("the forward that is being captured")


def _pause(*args: Any, **options: Any) -> tuple[torch.Tensor, None]:
    return _CAPTURING.get()._pause(*args, **options)


register_attention(CAPTURED, _pause)
