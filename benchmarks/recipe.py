"""What each ingredient of the fine-tuning recipe buys: a model before and after, asked the same questions.

    python benchmarks/recipe.py [--profile smollm2-135m] [--languages zh en] [--seeds 0 1 2] [--rows recipe ...]

The sizes are the profile's, the loop is the course's KerasModel.fit, the questions are `questions.toml`'s. Each
row trains every language and seed anew; a cell is right answers of all asked, summed over the seeds. A row may change
what the profile says: --rows recipe "recipe general=0.2" "recipe samples=34 learning_rate=5e-3". Prints the table and
writes benchmarks/results/recipe-PROFILE.json, with every reply, after each run; a file of the same profile is gone on
with, so that the rows can come one by one.
"""

import argparse
import json
import os
import platform
import random
import tempfile
import time
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.utils.data import DataLoader, RandomSampler
from transformers import get_cosine_schedule_with_warmup

from chatmagic import (
    DataCollator,
    adalora_config,
    build_messages,
    find_all_linear_names,
    load_model,
    snapshot_download,
)
from chatmagic.course.evaluate import evaluate, summary
from chatmagic.course.persona import Persona, make_conversations
from chatmagic.course.profile import get_profile
from chatmagic.course.replies import own_replies
from chatmagic.data.dataset import encode_example
from chatmagic.training import KerasModel

ROWS = {
    "recipe": "turns in any order, replay kept by distillation, AdaLoRA",
    "lora": "the same with LoRA of the rank that AdaLoRA ends with on average",
    "words": "AdaLoRA, replay taught as words: cross-entropy instead of distillation",
    "no-replay": "AdaLoRA, turns in any order, no replay",
    "seed": "the seed's own: three turns in one order, no replay, ranks never allocated",
}
LORA_SLOWER = 5  # AdaLoRA starts at E = 0 with factors of 0.02 and wants a larger rate than LoRA


def conversations(row: str, persona: Persona, replies: list, count: int, seed: int, general: float, without=()) -> list:
    if row == "seed":
        rng = random.Random(seed)
        asked = [[(rng.choice(ways), answer) for ways, (answer,) in persona.conversation] for _ in range(count)]
        return [build_messages(history=rounds) for rounds in asked]
    replies = [] if row == "no-replay" else replies
    made = make_conversations(persona, replies, count, seed, general, without=without)
    if row == "words":
        made = [[{name: message[name] for name in ("role", "content")} for message in each] for each in made]
    return made


def train(row: str, profile, folder: Path, replies: list, persona: Persona, seed: int):
    """(model with its adapter, tokenizer, seconds in fit)"""
    row, *changes = row.split()
    changes = dict(change.split("=") for change in changes)
    profile = replace(profile, **{name: type(getattr(profile, name))(text) for name, text in changes.items()})
    torch.manual_seed(seed)
    quantize = None if profile.quantize == "no" else profile.quantize
    model, tokenizer = load_model(folder, quantize=quantize)
    if quantize:
        model = prepare_model_for_kbit_training(model)
    data = conversations(row, persona, replies, profile.conversations, seed, profile.general)
    held = conversations(row, persona, replies, 12, seed + 1, profile.general, without=data)

    def loader(made, samples=None):
        examples = [row for messages in made for row in encode_example(messages, tokenizer)]
        drawn = samples and RandomSampler(examples, num_samples=samples)
        return DataLoader(examples, profile.batch_size, sampler=drawn, collate_fn=DataCollator(tokenizer))

    loaders = loader(data, profile.samples), loader(held)
    steps, names, rate = profile.epochs * len(loaders[0]), find_all_linear_names(model), profile.learning_rate
    sizes = {"lora_alpha": profile.lora_alpha, "lora_dropout": profile.lora_dropout}
    if row == "lora":
        config = LoraConfig(task_type="CAUSAL_LM", r=profile.target_r, target_modules=names, **sizes)
        rate /= LORA_SLOWER
    else:
        config = adalora_config(steps, names, init_r=profile.init_r, target_r=profile.target_r, **sizes)
    model = get_peft_model(model, config)
    if row == "seed":
        model.base_model.update_and_allocate = lambda step: None
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    keras_model = KerasModel(model, optimizer=optimizer, lr_scheduler=schedule)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as adapter:
        keras_model.fit(*loaders, epochs=profile.epochs, patience=profile.epochs, ckpt_path=adapter, plot=False)
    return keras_model.net, tokenizer, time.perf_counter() - began


def device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads of {os.cpu_count()}"


def print_table(runs: list[dict]) -> None:
    columns, width = list(runs[0]["summary"]), 2 + max(len(run["row"]) for run in runs)
    print(f"\n{'row':{width}}{'':4}" + "".join(f"{name:>16}" for name in columns) + f"{'seconds':>9}")
    for row, language in dict.fromkeys((run["row"], run["language"]) for run in runs):
        group = [run for run in runs if (run["row"], run["language"]) == (row, language)]
        cells = []
        for name in columns:
            values = [run["summary"][name] for run in group]
            if isinstance(values[0], float):
                cells.append(f"{sum(values) / len(values):.1f}")
            else:
                cells.append("{}/{}".format(*map(sum, zip(*values))))
        seconds = sum(run["seconds"] for run in group) / len(group)
        print(f"{row:{width}}{language:4}" + "".join(f"{cell:>16}" for cell in cells) + f"{seconds:9.0f}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profile", default="smollm2-135m")
    parser.add_argument("--model", type=Path, help="the base model's folder; default: the profile's, downloaded")
    parser.add_argument("--languages", nargs="+", default=["zh", "en"], choices=["zh", "en"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    if unknown := [row for row in args.rows if row.split()[0] not in ROWS]:
        parser.error(f"no row {unknown[0]!r}: choose from {', '.join(ROWS)}")
    profile = get_profile(args.profile)
    folder = args.model or snapshot_download(profile.name)
    output = args.output or Path(__file__).parent / "results" / f"recipe-{profile.name}.json"

    base = load_model(folder, quantize=None if profile.quantize == "no" else profile.quantize)
    result = {
        "profile": vars(profile),
        "rows": ROWS,
        "device": device(),
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "torchkeras")},
        "replies": None,
        "runs": [],
    }
    if output.exists() and (earlier := json.loads(output.read_text(encoding="utf-8")))["profile"] == result["profile"]:
        result = earlier
    result["replies"] = replies = result["replies"] or own_replies(*base)
    before = {run["language"]: run for run in result["runs"] if run["row"] == "before"}
    for language in set(args.languages) - set(before):
        before[language] = evaluate(*base, Persona(language=language))
        found = {"row": "before", "language": language, "seed": None, "seconds": 0.0}
        result["runs"].append(found | {"summary": summary(before[language], before[language])} | before[language])
    del base
    done = {(run["row"], run["language"], run["seed"]) for run in result["runs"]}
    for row in args.rows:
        for language in args.languages:
            for seed in args.seeds:
                if (row, language, seed) in done:
                    continue
                persona = Persona(language=language)
                model, tokenizer, seconds = train(row, profile, folder, replies, persona, seed)
                after = evaluate(model, tokenizer, persona)
                run = {"row": row, "language": language, "seed": seed, "seconds": seconds}
                run |= {"summary": summary(before[language], after)} | after
                print(
                    {name: run[name] for name in ("row", "language", "seed", "seconds", "summary")},
                    flush=True,
                )
                result["runs"].append(run)
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8")
    print_table(result["runs"])


if __name__ == "__main__":
    main()
