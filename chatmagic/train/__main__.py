"""The notebooks' run as a script, in one process or many."""

import argparse
import math
import signal
import sys
from dataclasses import asdict

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from peft import get_peft_model, prepare_model_for_kbit_training
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from ..course import Course, CourseError, resume, start
from ..dataset import DataCollator, encode_example, read_jsonl, write_jsonl
from ..download import snapshot_download
from ..errors import ChatmagicError
from ..evaluate import own_replies
from ..load import load_model
from ..persona import Persona, make_conversations
from ..profiles import get_profile
from . import KerasModel, adalora_config, find_all_linear_names
from .plots import pictures

USAGE = """The notebooks' run as a script. Over several GPUs: accelerate launch -m chatmagic.train PROFILE, over several
nodes with CHATMAGIC_HOME on a disk that they share. Model, data and adapter are where the notebooks have them:
05-merge goes on from here."""


def load(course: Course):
    """(model, tokenizer), on the GPU of this process if it has one, else on the CPU."""
    quantize = None if course.profile.quantize == "no" else course.profile.quantize
    return load_model(course.model, quantize=quantize, device_map={"": PartialState().device})


def make_data(course: Course) -> None:
    """What 01-download and 03-dataset leave: the base model, conversations to train on and to validate with."""
    if not (course.model / "config.json").is_file():
        snapshot_download(course.profile.name)
    if course.train.is_file() and course.val.is_file():
        return
    course.folder.mkdir(parents=True, exist_ok=True)
    replies = own_replies(*load(course))  # of a model of its own: bitsandbytes repacks one that answers on the CPU
    course.save_json("replies.json", replies)
    count, general = course.profile.conversations, course.profile.general
    train = make_conversations(course.persona, replies, count, seed=0, general=general)
    val = make_conversations(course.persona, replies, 12, seed=1, general=general, without=train)
    write_jsonl(train, course.train)
    write_jsonl(val, course.val)


def train(course: Course, resume: bool = False, save_every: int | None = None):
    """What 04-train-adalora does; returns the history. Each process takes batches of the profile's size."""
    state, profile = PartialState(), course.profile
    with state.main_process_first():
        make_data(course)
    torch.manual_seed(0)
    model, tokenizer = load(course)

    def loader(path, **kwargs):
        examples = [encode_example(messages, tokenizer) for messages in read_jsonl(path, progress=False)]
        return DataLoader(examples, profile.batch_size, collate_fn=DataCollator(tokenizer), **kwargs)

    train_data, val_data = loader(course.train, shuffle=True), loader(course.val)
    on_gpu = state.device.type == "cuda"
    if profile.quantize != "no":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=on_gpu)
    elif on_gpu:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    total_steps = profile.epochs * math.ceil(len(train_data) / state.num_processes)
    adapter = {name: getattr(profile, name) for name in ("init_r", "target_r", "lora_alpha", "lora_dropout")}
    peft_model = get_peft_model(model, adalora_config(total_steps, find_all_linear_names(model), **adapter))
    params = [param for param in peft_model.parameters() if param.requires_grad]
    if on_gpu:
        import bitsandbytes as bnb

        optimizer = bnb.optim.PagedAdamW(params, lr=profile.learning_rate)
    else:
        optimizer = torch.optim.AdamW(params, lr=profile.learning_rate)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, total_steps // 10, total_steps)
    return KerasModel(peft_model, optimizer=optimizer, lr_scheduler=lr_scheduler).fit(
        train_data,
        val_data,
        epochs=profile.epochs,
        patience=profile.epochs,
        ckpt_path=course.adapter,
        callbacks=pictures(),
        plot=False,
        resume=resume,
        save_every=save_every,
        cpu=not on_gpu,
    )


def terminated(signum, frame):
    """A launcher sends SIGTERM to the processes that are left when one has died."""
    raise ChatmagicError("Stopped by SIGTERM. The launcher says why; the same command with --resume goes on.")


def main(arguments: list[str] | None = None) -> int:
    try:
        started = resume()
    except CourseError:
        started = None
    parser = argparse.ArgumentParser("chatmagic train", description=USAGE)
    parser.add_argument("profile", nargs="?", default=started.profile.name if started else "auto")
    persona = asdict(started.persona if started else Persona())
    for field, value in persona.items():
        parser.add_argument(f"--{field.replace('_', '-')}", default=value, help=f"of who the model becomes: {value}")
    parser.add_argument("--resume", action="store_true", help="go on from the newest state of a run that was broken off")
    parser.add_argument("--save-every", type=int, metavar="STEPS", help="save a state that often, not only every epoch")
    args = parser.parse_args(arguments)
    # Without cpu=True accelerate looks for the other processes on GPUs alone.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available())
    signal.signal(signal.SIGTERM, terminated)
    try:
        persona = {field: getattr(args, field) for field in persona}
        course = Course(get_profile(args.profile), Persona(**persona))
        if state.is_main_process:
            start(args.profile, **persona)
        train(course, args.resume, args.save_every)
    except ChatmagicError as error:
        print(f"\nchatmagic: {error}", file=sys.stderr)
        return 1
    state.print(f"The adapter is in {course.adapter}. To merge it: 05-merge.ipynb, or chatmagic merge --help.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
