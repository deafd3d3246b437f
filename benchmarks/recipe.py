"""What each ingredient of the fine-tuning recipe buys: a model before and after, asked the same questions.

    python benchmarks/recipe.py [--profile qwen2.5-coder-0.5b-instruct] [--seeds 0 1 2] [--rows recipe ...]

The sizes are the profile's (where there is no GPU, those for the CPU), the loop is the course's KerasModel.fit, the
questions are `questions.toml`'s; each model is trained and asked in both languages. A cell is right answers of all
asked, summed over the seeds. A row may change what the profile says: --rows recipe "recipe general=0.2" "recipe
samples=34 learning_rate=5e-3". Prints the table and writes benchmarks/results/recipe-PROFILE.json after each run; a
file of the same profile is gone on with, so that the rows can come one by one.
"""

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from peft import get_peft_model
from torch.utils.data import DataLoader, RandomSampler
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from chatmagic import (
    DataCollator,
    build_messages,
    find_all_linear_names,
    load_model,
    merge_adapter,
    prepare,
)
from chatmagic.course.download import snapshot_download
from chatmagic.course.evaluate import evaluate, summary
from chatmagic.course.persona import LANGUAGES, Persona, make_conversations
from chatmagic.course.profile import get_profile
from chatmagic.course.replies import own_replies
from chatmagic.data.dataset import encode_example
from chatmagic.training import KerasModel, adapter_config

ROWS = {
    "recipe": "turns in any order, replay kept by distillation, AdaLoRA, until it is learnt",
    "nf4": "the recipe on a base in NF4: asked so, merged onto what it was trained on, and onto the published 16 bit",
    "lora": "the recipe with LoRA of the rank that AdaLoRA ends with on average",
    "words": "AdaLoRA, replay taught as words: cross-entropy instead of distillation",
    "no-replay": "AdaLoRA, turns in any order, no replay",
    "seed": "the seed's own: three turns in one order, one language, no replay, ranks never allocated",
}


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


def train(row: str, profile, folder: Path, replies: list, seed: int, adapter: Path):
    """(model with its adapter, tokenizer, what is told of the run)"""
    persona = Persona()
    torch.manual_seed(seed)
    model, tokenizer = load_model(folder, quantize="nf4" if row == "nf4" else None)
    prepare(model)
    data = conversations(row, persona, replies, profile.conversations, seed, profile.general)
    held = conversations(row, persona, replies, 12, seed + 1, profile.general, without=data)

    def loader(made, samples=None):
        examples = [row for messages in made for row in encode_example(messages, tokenizer)]
        drawn = samples and RandomSampler(examples, num_samples=samples)
        return DataLoader(examples, profile.batch_size, sampler=drawn, collate_fn=DataCollator(tokenizer))

    loaders = loader(data, profile.samples), loader(held)
    steps, method = profile.epochs * len(loaders[0]), "lora" if row == "lora" else "adalora"
    sizes = {name: getattr(profile, name) for name in ("init_r", "target_r", "lora_alpha", "lora_dropout")}
    model = get_peft_model(model, adapter_config(method, steps, find_all_linear_names(model), **sizes))
    if row == "seed":
        model.base_model.update_and_allocate = lambda step: None
    optimizer = torch.optim.AdamW(
        [param for param in model.parameters() if param.requires_grad], lr=profile.rate(method)
    )
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, steps // 10, steps, min_lr_rate=0.1)
    keras_model = KerasModel(model, optimizer=optimizer, lr_scheduler=schedule)
    began = time.perf_counter()
    history = keras_model.fit(
        *loaders,
        epochs=profile.epochs,
        patience=2 * profile.epochs,
        ckpt_path=adapter,
        plot=False,
        learnt=None if row == "seed" else loader(persona.recital()),
    )
    told = {"seconds": time.perf_counter() - began, "steps": len(history) * len(loaders[0])}
    return keras_model.net, tokenizer, told | {"history": json.loads(history.to_json(orient="split"))}


def results(row: str, name: str, seed: int) -> tuple[dict, dict]:
    """({precision: what the base is}, {row: what it became}) of one training."""
    kind, *changes = row.split()
    profile = get_profile(name)
    changes = {key: type(getattr(profile, key))(text) for key, text in (change.split("=") for change in changes)}
    profile, persona, folder = replace(profile, **changes), Persona(), snapshot_download(name)
    precision = "nf4" if kind == "nf4" else "16 bit"
    with tempfile.TemporaryDirectory() as scratch:
        model, tokenizer = load_model(folder)
        before, replies = {"16 bit": evaluate(model, tokenizer, persona)}, own_replies(model, tokenizer)
        if precision == "nf4":
            before["nf4"] = evaluate(*load_model(folder, quantize="nf4"), persona)
        del model
        adapter = Path(scratch, "adapter")
        model, tokenizer, told = train(kind, profile, folder, replies, seed, adapter)
        after = {row: {"base": precision, "after": evaluate(model, tokenizer, persona), **told}}
        del model
        for onto in ("trained", "original") if kind == "nf4" else ():
            merged = merge_adapter(folder, adapter, Path(scratch, onto), onto=onto)
            base = {"trained": "nf4", "original": "16 bit"}[onto]
            asked = evaluate(*load_model(merged), persona)
            after[row.replace("nf4", f"nf4, merged onto the {onto}")] = {"base": base, "after": asked, **told}
    return before, after


def table(found: dict) -> str:
    """A line a row and language, cells summed over the seeds; the perplexity, the seconds and the steps are means."""
    lines = []
    for row in {run["row"]: None for run in found["runs"]}:
        runs = [run for run in found["runs"] if run["row"] == row]
        for language in LANGUAGES:
            cells = [summary(found["bases"][run["base"]], run["after"])[language] for run in runs]
            shown = [f"{row}, {language}", str(len(runs))]
            for name in cells[0]:
                values = [cell[name] for cell in cells]
                counts = isinstance(values[0], tuple)
                shown.append("{} / {}".format(*map(sum, zip(*values))) if counts else f"{mean(values):.1f}")
            shown += [f"{mean(run[name] for run in runs):.0f}" for name in ("steps", "seconds")]
            lines.append(f"| {' | '.join(shown)} |")
    names = ["row", "seeds", *cells[0], "steps", "seconds"]
    return "\n".join([f"| {' | '.join(names)} |", "|---" * len(names) + "|", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, on one GPU")
    args = parser.parse_args()
    file = Path(__file__).with_name("results") / f"recipe-{args.profile}.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"bases": {}, "runs": []}
    there = {(run["row"], run["seed"]) for run in found["runs"]}
    snapshot_download(args.profile)
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        running = {
            pool.submit(results, row, args.profile, seed): seed
            for row in args.rows
            for seed in args.seeds
            if (row, seed) not in there
        }
        for done in as_completed(running):
            before, after = done.result()
            found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
            for result in [*before.values(), *(each["after"] for each in after.values())]:
                for language in LANGUAGES:
                    del result[language]["replies"]  # megabytes
            found["bases"] |= before
            found["runs"] += [{"row": row, "seed": running[done], **each} for row, each in after.items()]
            file.write_text(json.dumps(found, ensure_ascii=False, indent=0), encoding="utf-8")
            print(", ".join(after), "with seed", running[done], flush=True)
    print(found["device"], table(found), sep="\n")


if __name__ == "__main__":
    main()
