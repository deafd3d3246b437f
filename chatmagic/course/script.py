"""The notebooks' run as a script, in one process or many: what `chatmagic train` does."""

import math
import os
import random
import signal
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

# First, for what is done there before the others are imported.
from ..training import KerasModel, adapter_config, find_all_linear_names, prepare

# isort: split

import bitsandbytes as bnb
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from peft import get_peft_model
from torch.utils.data import DataLoader, RandomSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_cosine_with_min_lr_schedule_with_warmup

from ..conversation.messages import Message
from ..data.dataset import ConversationFile, DataCollator, Examples, read_jsonl, write_jsonl
from ..errors import ChatmagicError
from ..models.checkpoint import is_whole, weight_files
from ..models.load import load_model
from ..prompts.labels import note_thinking
from ..training.plots import pictures
from ..training.runtime import lost_peer
from ..training.states import newest_state
from .own import make_own_data, used
from .persona import make_conversations
from .profile import check_machine
from .replies import own_replies
from .thread import Course, fetch
from .thread import resume as resume_course


def run(
    course: Course, resume: bool | None = None, save_every: int | None = None, method: str = "adalora"
) -> pd.DataFrame:
    """Go through 00-setup to 04-train-adalora, as one process or as one of those that a launcher started; returns
    fit's history. SIGTERM is taken as Ctrl-C is. Raises ChatmagicError where another process has ended, ProfileError
    where this machine has not the memory or the disk for it."""
    signal.signal(signal.SIGTERM, interrupted)
    if resume and newest_state(course.adapter, read=False) is None:  # before anything is downloaded or made
        raise ChatmagicError(
            f"Nothing to resume in {course.adapter}: no run was broken off there. Start one: chatmagic train, without "
            "--resume. Another model or persona has a folder of its own: name them as then."
        )
    if is_whole(course.model):  # which a download has measured for where it is to go, and not for here
        there = sum(file.stat().st_size for file in weight_files(course.model))
        check_machine(replace(course.profile, bytes=there), course.model)
    try:
        state = PartialState(
            # Without it accelerate looks for the other processes on GPUs alone.
            cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available(),
            timeout=timedelta(hours=4),  # the others wait while the first downloads
        )
        with state.main_process_first():
            course = fetch(course) if state.is_main_process else resume_course()  # which the first has written by then
            make_data(course)
        state.print(f"{course.profile.name}, processes: {state.num_processes}. If broken off: the same with --resume.")
        history = train(course, method, resume=resume, save_every=save_every)
        state.destroy_process_group()  # NCCL warns of one that is left
    except RuntimeError as error:
        if not lost_peer(error, int(os.environ.get("WORLD_SIZE", 1))):  # perhaps while they still join
            raise
        raise ChatmagicError("Another process of this run has ended. Its own message says why.") from None
    state.print(f"The adapter is in {course.adapter}. What changed: chatmagic evaluate. To merge it: 05-merge.ipynb.")
    return history


def interrupted(signum: int, frame: FrameType | None) -> None:
    """Do what Ctrl-C does, also in a background job, which starts with that ignored."""
    ctrl_c = signal.getsignal(signal.SIGINT)
    (ctrl_c if callable(ctrl_c) else signal.default_int_handler)(signum, frame)


def load(course: Course) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer), on the GPU of this process if it has one, else on the CPU."""
    quantize = None if course.profile.quantize == "no" else course.profile.quantize
    return load_model(course.model, quantize=quantize, device_map={"": PartialState().device})


def make_data(course: Course) -> None:
    """What 03-dataset leaves: conversations to train on and to validate with."""
    if course.own:
        make_own_data(course, lambda: own_replies(*load(course)))
        return
    if course.train.is_file():  # perhaps the reader's own: never written over
        if not course.val.is_file():
            write_jsonl(hold_out([*read_jsonl(course.train, progress=False)], course.train), course.val)
        return
    replies = own_replies(*load(course))  # of a model of its own: bitsandbytes repacks one that answers on the CPU
    course.save_json("replies.json", replies)
    count, general = course.profile.conversations, course.profile.general
    train = make_conversations(course.persona, replies, count, seed=0, general=general)
    made = {"train": train}
    if not course.val.is_file():
        made["val"] = make_conversations(course.persona, replies, 12, seed=1, general=general, without=train)
    course.save_data(**made)


def hold_out(conversations: list[list[Message]], path: Path) -> list[list[Message]]:
    """A tenth of the conversations that were read from `path`, the same each time, to validate with. Raises
    ChatmagicError for fewer than two."""
    if len(conversations) < 2:
        raise ChatmagicError(f"{path} has {len(conversations)} conversations: two are the least, one to validate with.")
    held = random.Random(0).sample(conversations, max(1, len(conversations) // 10))
    print(f"{len(held)} of the {len(conversations)} conversations of {path.name} are kept for validation: val.jsonl.")
    return held


def train(course: Course, method: str = "adalora", **settings: Any) -> pd.DataFrame:
    """What 04-train-adalora does. Each process takes batches of the profile's size; `settings` go to fit. method: as
    for `adapter_config`."""
    state, profile = PartialState(), course.profile
    torch.manual_seed(0)
    model, tokenizer = load(course)

    held_out = ConversationFile(course.val)
    learnt, own = ConversationFile(course.train, without=held_out), course.own
    thinking = course.thinking(tokenizer, learnt)
    note_thinking(model, tokenizer, thinking)
    cut = {"max_length": own.max_length, "drop_oldest": True} if own and own.max_length else {}
    train_data, val_data = (Examples(part, tokenizer, **cut) for part in (learnt, held_out))
    samples = (own.samples or len(train_data)) if own else profile.samples
    if own and state.is_main_process:
        print(f"{used(course, samples)}; {train_data.summary()}.", flush=True)
    collator = DataCollator(tokenizer)
    drawn = RandomSampler(train_data, num_samples=samples)
    train_loader = DataLoader(train_data, profile.batch_size, sampler=drawn, collate_fn=collator)
    val_loader = DataLoader(val_data, profile.batch_size, collate_fn=collator)
    lean = any(gather_object([prepare(model)]))  # one for all: by different optimizers the processes would drift apart
    total_steps = profile.epochs * math.ceil(len(train_loader) / state.num_processes)
    adapter = {name: getattr(profile, name) for name in ("init_r", "target_r", "lora_alpha", "lora_dropout")}
    config = adapter_config(method, total_steps, find_all_linear_names(model), **adapter)
    peft_model = get_peft_model(model, config)
    params = [param for param in peft_model.parameters() if param.requires_grad]
    optimizer = (bnb.optim.PagedAdamW if lean else torch.optim.AdamW)(params, lr=profile.rate(method))
    lr_scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, total_steps // 10, total_steps, min_lr_rate=0.1
    )
    recital = Examples(course.recital(), tokenizer)
    return KerasModel(peft_model, optimizer=optimizer, lr_scheduler=lr_scheduler).fit(
        train_loader,
        val_loader,
        epochs=profile.epochs,
        patience=15,
        learnt=DataLoader(recital, profile.batch_size, collate_fn=collator) if recital else None,
        ckpt_path=course.adapter,
        callbacks=pictures(),
        plot=False,
        cpu=state.device.type == "cpu",
        about=course.about(tokenizer, thinking),
        **settings,
    )
