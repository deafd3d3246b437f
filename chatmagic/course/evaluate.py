"""Does the model know who it is, and what did it forget? The same questions before and after, decoded greedily."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from ..accel.attention import without_cudnn_attention
from ..backends.streaming import TextStream
from ..conversation.messages import build_messages
from ..machine import short
from ..models.load import load_model
from ..models.provenance import trained_thinking
from ..progress import Bar
from ..prompts.labels import encode_prompt, note_thinking
from ..prompts.templates import get_template
from .own import evaluate_own, own_summary
from .persona import LANGUAGES, Persona, holds, questions
from .thread import Course

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POSITIONS = ("alone", "after identity", "after general")


@torch.inference_mode()
@without_cudnn_attention()
def ask(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Sequence[list[dict]],
    max_new_tokens: int = 48,
    batch_size: int = 32,
    thinking: bool | None = None,
    thoughts: bool = False,
) -> list[str]:
    """The greedy reply to each of `conversations`, in batches of `batch_size`, padded on the left; "…" ends a reply
    that was cut off after `max_new_tokens` tokens.

    thinking: as for `encode_prompt`, but off rather than the template's default. thoughts: what the model thought
    instead of what it said.
    """
    was_training = model.training
    model.eval()
    template = get_template(None, tokenizer)
    thinking = getattr(tokenizer, "chat_thinking", None) if thinking is None else thinking
    thinking = template.thinking_for([]) if thinking is None else thinking
    prompts = [encode_prompt(messages, tokenizer, thinking=thinking) for messages in conversations]
    stop = template.stop_token_ids(tokenizer)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    replies = [""] * len(prompts)
    batches = range(0, len(order), batch_size)
    for start in Bar(batches, desc="replies", unit="batch") if len(batches) > 1 else batches:
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [prompts[i] for i in chosen]}, padding_side="left", return_tensors="pt")
        # PyTorch copies a frozen head for each row of a slice, as what the prompts end in is: 5 GB for 18 of them.
        with model.get_output_embeddings().register_forward_pre_hook(lambda _, given: given[0].contiguous()):
            out = model.generate(
                **batch.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=stop,
                pad_token_id=tokenizer.pad_token_id,
                temperature=None,
                top_p=None,
                top_k=None,
            )
        for index, ids in zip(chosen, out[:, batch["input_ids"].shape[1] :].tolist()):
            end = next((at for at, token in enumerate(ids) if token in stop), None)
            parting = template.parting(thinking)
            stream = TextStream(tokenizer, template.stop_strings, parting.marks if parting else ())
            text = ("".join(map(stream.push, ids[:end])) + stream.flush()).strip()
            text = (parting.part(text) if parting else ("", text))[not thoughts]
            replies[index] = text if end is not None else text.rstrip("\ufffd") + "…"
    model.train(was_training)
    return replies


def evaluate(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", persona: Persona) -> dict[str, dict]:
    """Ask everything in both languages; returns JSON-able counts and replies, language -> a dict of

    identity: position -> right replies and their number, for the trained questions asked alone, after each other topic
        and after a general question. heldout: the same for paraphrases that were never trained.
    known: retention questions answered rightly. leaked: those answered with the new identity.
    near: questions close to identity, never trained and not about the model, answered with the new identity.
    perplexity: of a text of the repository's own, per token.
    replies: [question, reply] of everything that was asked.
    """
    plan = {
        language: [*persona.positions(language)]
        + [("heldout", topic, build_messages(query)) for topic, query in persona.asked("heldout", language)]
        + [("known", facts, build_messages(query)) for query, *facts in questions()[language]["retention"]]
        + [("near", None, build_messages(query)) for query in questions()[language]["near"]]
        for language in LANGUAGES
    }
    asked = [messages for each in plan.values() for _, _, messages in each]
    replies = iter(ask(model, tokenizer, asked, max(48, longest(persona, tokenizer))))
    return {
        language: _scores(persona, language, [(*each, next(replies)) for each in asked])
        | {"perplexity": perplexity(model, tokenizer, questions()[language]["fluency"])}
        for language, asked in plan.items()
    }


def longest(persona: Persona, tokenizer: "PreTrainedTokenizerBase") -> int:
    """The tokens of the longest answer that is trained, and of its end: one who recites it is not cut off."""
    answers = [answer for language in LANGUAGES for answer in persona.answers_in(language).values()]
    return 1 + max(map(len, tokenizer(answers, add_special_tokens=False)["input_ids"]))


def _scores(persona: Persona, language: str, asked: list[tuple]) -> dict:
    """What `evaluate` returns of one language, of (kind, topic or facts, messages, reply)."""
    found = {
        "identity": {position: [0, 0] for position in (*POSITIONS, "heldout")},
        "known": [],
        "leaked": [],
        "near": [],
    }
    for kind, what, messages, reply in asked:
        query = messages[-1]["content"]
        if kind in found["identity"]:
            found["identity"][kind][0] += persona.knows(what, reply, language)
            found["identity"][kind][1] += 1
            continue
        if kind == "known" and holds(reply, what):
            found["known"].append(query)
        if persona.leaks(query, reply):
            found["leaked" if kind == "known" else "near"].append(query)
    return found | {"replies": [[messages[-1]["content"], reply] for _, _, messages, reply in asked]}


def thinks(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[list[dict]]
) -> int | None:
    """In how many conversations the model thinks when told to; None for one that knows no thoughts."""
    if not get_template(None, tokenizer).knows_thoughts:
        return None
    thoughts = ask(model, tokenizer, conversations, thinking=True, thoughts=True)
    return sum(bool(thought.strip("…").strip()) for thought in thoughts)


@torch.inference_mode()
def perplexity(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", text: str) -> float:
    """exp of the mean cross-entropy of the text's tokens after the first."""
    input_ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
    logits = model(input_ids=input_ids, use_cache=False).logits  # to the loss PEFT would add AdaLoRA's penalty
    return math.exp(cross_entropy(logits[0, :-1].float(), input_ids[0, 1:]).item())


def summary(before: dict, after: dict) -> dict[str, dict[str, tuple[int, int] | float]]:
    """Two rows of a table, one a language, of two results of `evaluate`.

    (right, asked) of each position and of the held-out paraphrases; (still right, right before) of the general
    questions; (answered with the new identity, asked) of them, and of the near ones; the perplexity; of a model that
    thought before, (still thinks, thought before).
    """
    table = {}
    for language, result in after.items():
        known, asked = set(before[language]["known"]), questions()[language]
        table[language] = {position: tuple(counts) for position, counts in result["identity"].items()} | {
            "retained": (len(known & set(result["known"])), len(known)),
            "leaked": (len(result["leaked"]), len(asked["retention"])),
            "near": (len(result["near"]), len(asked["near"])),
            "perplexity": result["perplexity"],
        }
        if before[language].get("thinks"):
            table[language]["still thinks"] = (result["thinks"], before[language]["thinks"])
    return table


def evaluate_course(course: Course) -> dict[str, dict]:
    """Ask the base, and what became of it: the merged model or, where that is not there or older, the adapter. A course
    with data of the reader's own is asked what is in it, see `evaluate_own`, and not who it is.

    Returns the `summary` of each, or the `own_summary`, {"before": ..., "after": ...}, and writes evaluation.json in
    the course's folder: that as "table", and all that was asked. Raises CourseError where nothing is trained yet.
    """
    from peft import PeftModel  # after load.py, which spares us what bitsandbytes says on import

    newest = course.newest
    merged, quantize = newest == course.merged, course.profile.quantize

    def asked(folder: Path, model: "PreTrainedModel") -> dict:
        began = time.perf_counter()
        note_thinking(model, tokenizer, trained_thinking(course.adapter))
        if course.own:
            result = evaluate_own(course, model, tokenizer)
            print(f"{len(result['replies'])} held-out conversations to {short(folder)}: ", end="")
            print(f"{time.perf_counter() - began:.0f} s", flush=True)
            return result
        result = evaluate(model, tokenizer, course.persona)
        for language, table in result.items():
            general = [build_messages(query) for query, *_ in questions()[language]["retention"][:6]]
            table["thinks"] = thinks(model, tokenizer, general)
        count = sum(len(table["replies"]) for table in result.values())
        print(f"{count} questions to {short(folder)}: {time.perf_counter() - began:.0f} s", flush=True)
        return result

    model, tokenizer = load_model(course.model, None if merged or quantize == "no" else quantize)
    results = {"before": asked(course.model, model)}
    if merged:
        del model  # a GPU may not hold both
        model, tokenizer = load_model(newest)
    else:
        model = PeftModel.from_pretrained(model, newest)
    results["after"] = asked(newest, model)
    rows = own_summary if course.own else summary
    table = {name: rows(results["before"], result) for name, result in results.items()}
    course.save_json("evaluation.json", {"table": table, **results})
    return table
