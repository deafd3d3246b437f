"""A notebook keeps the last exception it showed; a model, and what a failed forward made, must not hang on it."""

import copy
import gc
import sys
import traceback
import weakref

import pytest

from chatmagic import ChatmagicError
from quick import first

CELLS = {
    "cell": "%%chat --greedy\nhi",
    "whole": "%%chat --no-stream --format json\nhi",
    "line": "answer = %chat --greedy hi",
    "call": "llm('hi', stream=False)",
    "chat": "llm.chat(llm.build_messages(query='hi'))",
    "loop": "for question in 'ab':\n    try:\n        1 / 0\n    except ZeroDivisionError:\n        llm(question)",
}


def failure(kind):
    if kind == "memory":
        import torch

        return torch.OutOfMemoryError("CUDA out of memory")
    return {"stop": KeyboardInterrupt(), "device": RuntimeError("CUDA error"), "words": ChatmagicError("no")}[kind]


@pytest.mark.parametrize("kind", first(1, ["stop", "device", "memory", "words"]))
@pytest.mark.parametrize("cell", CELLS)
def test_deleting_a_model_frees_it_after_a_failed_cell(run, model, tokenizer, cell, kind):
    run.ip.push({"model": copy.deepcopy(model), "tokenizer": tokenizer})
    run("from chatmagic import ChatLLM\nllm = ChatLLM(model, tokenizer, max_new_tokens=8)")
    run("%%chat --no-history\nhello")
    held = [weakref.ref(run.ip.user_ns["model"]), weakref.ref(run.ip.user_ns["llm"])]
    forwards = []

    def fail(module, inputs):
        forwards.append(weakref.ref(inputs[0]))
        if len(forwards) == 3:
            raise failure(kind)

    run.ip.user_ns["model"].model.layers[1].register_forward_pre_hook(fail)
    assert not run.ip.run_cell(CELLS[cell]).success and len(forwards) == 3
    gc.collect()
    assert [tensor() for tensor in forwards] == [None] * 3  # at once: the next try needs that memory
    held.append(weakref.ref(run.ip.user_ns["llm"].backend._cache.layers[0].keys) if kind == "device" else held[0])
    run("del llm, model")
    gc.collect()
    assert [thing() for thing in held] == [None] * 3


def test_the_callers_own_frames_stay(run, llm, fake):
    """For %debug and %tb: a function of the reader's, and its variables."""
    fake.failure = RuntimeError("CUDA error")
    run.ip.push({"llm": llm})
    run.ip.run_cell("def ask(kept):\n    return llm('long enough', stream=False)\nask('kept')")
    frames = [frame for frame, _ in traceback.walk_tb(sys.last_traceback)]
    assert frames[-1].f_code.co_name == "ask" and frames[-1].f_locals == {"kept": "kept"}
