"""A local model as a stream of text, with the keys and values of the conversation kept between turns."""

import copy
import sys
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from itertools import takewhile
from pathlib import Path
from threading import Lock, get_ident
from typing import Any
from weakref import WeakValueDictionary

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from ..accel.attention import without_cudnn_attention
from ..accel.decode import NOT_ON_A_GPU, GraphedForward, NoGraph, can_be_cut, capture, cut
from ..conversation.llm import ContextOverflow
from ..conversation.messages import merge_system
from ..conversation.pieces import Parting
from ..conversation.reply import Stats
from ..errors import ChatmagicError, let_go
from ..models.load import context_limit
from ..prompts.labels import encode_prompt
from ..prompts.templates import NoSystemError, get_template, name_family
from ..text import did_you_mean
from .budget import ThinkingBudget
from .streaming import StopStrings, TextStream
from .weights import fingerprint

OPTIONS = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "suppress_tokens"),
    *("begin_suppress_tokens", "min_new_tokens", "exponential_decay_length_penalty", "guidance_scale"),
    *("remove_invalid_values", "renormalize_logits", "watermarking_config", "eos_token_id"),
)
"""The fields of transformers' GenerationConfig that say how the next token is chosen, or which ends a reply."""
PREFILL_CHUNK = 512
"""Prompt tokens run at once: bounds the memory of a long prompt, and how long Stop waits for the device."""


class LocalModel:
    """The chat model protocol of `llm.py` over a causal language model of transformers, or its PEFT wrapper.

    Generation goes through the model's own `generate`, which prepares the logits processors of its
    `generation_config`; only the loop over tokens is ours (`custom_generate`), run lazily in the caller's
    thread. So tokens are those of plain `generate`, and a KeyboardInterrupt stops it at once. With `fast=False` the
    loop is theirs too: nothing is captured, patched or kept, and a reply comes when all of it is there; so it is for
    a class that keeps what it ran in a way of its own, as Mamba and MiniMax do.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        model_type: str | None = None,
        fast: bool = True,
    ) -> None:
        self.fast = fast and _takes_a_cache(model)
        self.model, self.tokenizer, self.model_type = model, tokenizer, model_type
        name_family(tokenizer, getattr(model.config, "name_or_path", ""))
        self.template = get_template(model_type, tokenizer)
        self.name = Path(getattr(model.config, "name_or_path", "") or model.config.model_type).name
        self.context, self._context_reason = context_limit(model)
        self._busy = _BUSY.setdefault(id(model.config), Busy(self.name))  # an adapter's wrapper has the same config
        self._free()

    def forget(self) -> None:
        """Free the kept keys and values, and the captured forward, once nobody is being answered."""
        with self._busy:
            self._free()

    def _free(self) -> None:
        self._counted: tuple[tuple, list[int]] | None = None  # what was counted last, and its ids
        self._kept_ids: list[int] = []  # the ids whose keys and values are complete in every layer
        self._whole = True  # and no layer has more than those
        self._cache = None
        self._weights = None
        self._graphed = None
        self.no_graph: str | None = None  # why decoding is not graphed, once that was tried
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def render(self, messages: list[dict], add_generation_prompt: bool = True, thinking: bool | None = None) -> str:
        """The prompt as a string, of what `count` counts."""
        try:
            spans = self.template.render(messages, add_generation_prompt, thinking)
        except NoSystemError:
            spans = self.template.render(merge_system(messages), add_generation_prompt, thinking)
        return "".join(span.text for span in spans)

    def count(self, messages: list[dict], thinking: bool | None = None) -> int:
        """How many tokens the model is sent for these messages."""
        ids = self._encode(messages, thinking)
        self._counted = (messages, thinking), ids
        return len(ids)

    def _encode(self, messages: list[dict], thinking: bool | None) -> list[int]:
        """Their ids, a system text in the first question where the family knows none."""
        options = {"max_length": sys.maxsize, "thinking": thinking}
        try:
            return encode_prompt(messages, self.tokenizer, self.model_type, **options)
        except NoSystemError:
            return encode_prompt(merge_system(messages), self.tokenizer, self.model_type, **options)

    def _counted_ids(self, messages: list[dict], thinking: bool | None) -> list[int]:
        """Their ids, those that were counted just now if these were: `ChatLLM` counts before it asks. Used once, for
        a prompt that has a date in it is another tomorrow."""
        counted, self._counted = self._counted, None  # at once: another thread may count
        return counted[1] if counted and counted[0] == (messages, thinking) else self._encode(messages, thinking)

    def stream(
        self,
        messages: list[dict],
        stats: Stats,
        max_new_tokens: int,
        seed: int | None = None,
        thinking: bool | None = None,
        thinking_budget: int | None = None,
        stop: Sequence[str] = (),
        **options: Any,
    ) -> Generator[str, None, None]:
        """The reply, a piece of text for every token ("" while a character, a stop string or the mark of a thought is
        incomplete); a thought is apart.

        `options` are `greedy=True` or OPTIONS; the rest is as the model's own `generation_config` has it. After
        `thinking_budget` tokens of thought the model is made to speak; words, not a thought, end before the first of
        `stop`. Fills `stats` as it goes. A thread waits for another that asks the same model. Raises ContextOverflow if
        the messages do not fit the context, ChatmagicError if an option is unknown, or memory runs out (the kept keys
        and values are then freed).
        """
        with self._busy:
            yield from self._reply(messages, stats, max_new_tokens, seed, thinking, thinking_budget, stop, **options)

    def _reply(
        self,
        messages: list[dict],
        stats: Stats,
        max_new_tokens: int,
        seed: int | None,
        thinking: bool | None,
        thinking_budget: int | None,
        stop: Sequence[str],
        **options: Any,
    ) -> Generator[str, None, None]:
        ids = self._counted_ids(messages, thinking)
        stats.tokens_in, stats.tokens_out = len(ids), 0
        room = max_new_tokens if self.context is None else min(max_new_tokens, self.context - len(ids))
        if room < 1:
            raise ContextOverflow(
                f"the messages are {len(ids)} tokens and leave no room for a reply: {self.name}'s context "
                f"ends at {self.context}, since {self._context_reason}. Send less, or forget with %chat_reset"
            )
        config = self._generation_config(**options)
        config.max_new_tokens, config.max_length = room, None
        stop_ids = config.eos_token_id or ()
        thinking = vars(self.tokenizer).get("chat_thinking") if thinking is None else thinking
        parting = self.template.parting(thinking)
        text = TextStream(self.tokenizer, self.template.stop_strings, parting.marks if parting else ())
        words = StopStrings(stop)
        processors = LogitsProcessorList()
        if thinking_budget is not None:
            processors.append(self._budget(thinking_budget, parting))
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            for token in self._tokens(ids, config, seed, stats, processors):
                stats.tokens_out += 1
                if token in stop_ids:
                    stats.stop_reason = "stop"
                    break
                pieces = [text.push(token)] if parting is None else parting.push(text.push(token)) or [""]
                yield from map(words.push, pieces)
                if parting and parting.thinking:
                    stats.tokens_thought = stats.tokens_out
                stopped = text.stop.found or words.found
                if stopped or stats.tokens_out == room:
                    stats.stop_reason = "stop" if stopped else "length"
                    break
            rest = text.flush()
            yield from map(words.push, [rest] if parting is None else parting.push(rest) + parting.flush())
            yield words.flush()
        except torch.OutOfMemoryError as error:
            let_go(error)  # of what the forward had made
            self._free()
            raise ChatmagicError(
                f"{self.model.device} ran out of memory after {stats.tokens_in} tokens in and "
                f"{stats.tokens_out} out; the kept keys and values were freed. Forget the conversation with "
                "%chat_reset, ask for fewer tokens with --max-new-tokens, or load the model in 4 bits: "
                'load_model(path, quantize="nf4")'
            ) from None
        finally:
            for module in training:  # as it was, part by part: an adapter may train in a model that does not
                module.training = True

    def _budget(self, tokens: int, parting: Parting | None) -> ThinkingBudget:
        if parting is None:
            raise ChatmagicError(f"{self.name} knows no thoughts: leave thinking_budget (--thinking-budget) out")

        def ids(text: str) -> list[int]:
            return self.tokenizer.encode(text, add_special_tokens=False)

        opening = [] if parting.thinking else ids(parting.openings[0])
        return ThinkingBudget(tokens, opening, ids(parting.closing), ids(parting.ending))

    def _generation_config(self, greedy: bool = False, **options: Any) -> GenerationConfig:
        """A copy of the model's `generation_config`, `options` over it and the template's stop ids in it."""
        config = copy.deepcopy(self.model.generation_config)
        if unknown := [name for name in options if name not in OPTIONS]:
            if hasattr(config, unknown[0]):
                raise ChatmagicError(
                    f"{unknown[0]!r} has no place here: a reply is one stream of tokens, and its options are those "
                    f"that say how a token is chosen: {', '.join(OPTIONS)}"
                )
            raise ChatmagicError(f"unknown generation option {unknown[0]!r}{did_you_mean(unknown[0], OPTIONS)}")
        if greedy or options.get("temperature") == 0:
            options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        elif {"temperature", "top_p", "top_k"} & options.keys():
            options.setdefault("do_sample", True)
        with _refused_in_words():
            config.update(num_beams=1, num_return_sequences=1, **options)
            config.validate()
            eos = config.eos_token_id
            own = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
            config.eos_token_id = sorted({*own, *self.template.stop_token_ids(self.tokenizer)}) or None
        if config.pad_token_id is None and config.eos_token_id:
            config.pad_token_id = config.eos_token_id[0]  # unused at batch 1; generate warns without one
        return config

    def _tokens(
        self,
        ids: list[int],
        config: GenerationConfig,
        seed: int | None,
        stats: Stats,
        processors: LogitsProcessorList,
    ) -> Iterable[int]:
        """The new token ids: without end, for `generate` prepares and `_decode` runs as they are asked for; with
        `fast=False` all that `generate` makes of it."""
        input_ids = torch.tensor([ids], device=self.model.device)
        generate = partial(
            self.model.generate,
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            logits_processor=processors,
        )
        if self.fast:
            stats.tokens_reused = self._reuse(ids)
            with _refused_in_words():
                generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
                return generate(generator=generator, custom_generate=self._decode)
        with torch.random.fork_rng(enabled=seed is not None), _refused_in_words():
            if seed is not None:
                torch.manual_seed(seed)
            output = generate()
        stats.tokens_at_once = output.shape[1] - len(ids)
        return output[0, len(ids) :].tolist()

    @torch.no_grad()  # on a generator function torch enters and leaves this around every yield
    def _decode(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        generation_config: GenerationConfig,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Iterator[int]:
        """Prefill what is not kept, then one forward a token. `input_ids`: int64, (1, length)."""
        for chunk in input_ids[:, len(self._kept_ids) :].split(PREFILL_CHUNK, dim=1):
            ids = chunk[0].tolist()  # waits for the chunk before: Stop finds the device not far behind
            logits = self._forward(model, chunk)
            self._kept_ids += ids
            self._whole = True
        while True:
            scores = logits_processor(input_ids, logits)
            if generation_config.do_sample:
                token = torch.multinomial(scores.softmax(-1), 1, generator=generator)
            else:
                token = scores.argmax(-1, keepdim=True)
            yield (token_id := token.item())
            input_ids = torch.cat([input_ids, token], dim=1)
            logits = self._forward(model, token)
            self._kept_ids.append(token_id)
            self._whole = True

    @without_cudnn_attention()
    def _forward(self, model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
        """Run `input_ids`, (1, n), after what the cache holds: the last position's logits, float32."""
        self._whole = False
        if input_ids.shape[1] == 1 and self._kept_ids and not self.no_graph:
            self._graphed = self._graphed or self._capture(model, input_ids)
            if self._graphed:
                return self._graphed(input_ids, self._cache).float()
        output = model(input_ids=input_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].float()

    def _capture(self, model: PreTrainedModel, token: torch.Tensor) -> GraphedForward | None:
        try:
            return capture(model, token, self._cache)
        except NoGraph as reason:
            self.no_graph = f"{self.name} {reason}"
            if str(reason) != NOT_ON_A_GPU:
                warnings.warn(f"replies come slower, without CUDA graphs: {self.no_graph}", stacklevel=2)

    def _reuse(self, ids: list[int]) -> int:
        """Cut the kept keys and values to the longest common prefix with `ids`; how many tokens that spares.

        An interrupted forward leaves layers of unequal length: each is cut by itself, to what all have. A sliding
        window and the state of a scan cannot be cut: they are kept where `ids` go on from all that was run, else anew.
        """
        if (weights := fingerprint(self.model)) != self._weights:
            self._free()
            self._weights = weights
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids[:-1], self._kept_ids)))
        if common and can_be_cut(self._cache):
            self._kept_ids = ids[:common]  # first: whoever interrupts the cut leaves layers with more than this says
            cut(self._cache, common)
        elif not common or common < len(self._kept_ids) or not self._whole:
            common, self._kept_ids = 0, []
            self._cache = DynamicCache(config=self.model.config)
        return common


def _takes_a_cache(model: PreTrainedModel) -> bool:
    """Whether what it ran can be kept: there are classes that ignore it, and would answer without the prompt."""
    kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model)
    return "past_key_values" in signature(kind.forward).parameters and kind._supports_default_dynamic_cache()


class Busy:
    """Whether a model answers somebody: another thread waits, the same one would wait for ever and raises."""

    def __init__(self, name: str) -> None:
        self._name, self._lock, self._thread = name, Lock(), 0

    def __enter__(self) -> None:
        if self._thread == get_ident():
            raise ChatmagicError(f"{self._name} is still answering: ask it again when that reply has ended")
        self._lock.acquire()
        self._thread = get_ident()

    def __exit__(self, *error: object) -> None:
        self._thread = 0
        self._lock.release()


_BUSY: WeakValueDictionary[int, Busy] = WeakValueDictionary()
"""By the id of the model's config: two ChatLLM may have one model."""


@contextmanager
def _refused_in_words() -> Iterator[None]:
    """What `generate` says of options that cannot be, as ChatmagicError."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "unpacking long" not in str(error):  # PyTorch 2.6 says so of a seed
            raise
        raise ChatmagicError(f"the model cannot generate so: {' '.join(str(error).split())}") from None
