"""A training step of the recipe on the CPU, alone and beside busy processes; with OpenMP's waiting as it is by default
and as the course sets it.

    python benchmarks/busy.py [--profile qwen2.5-coder-0.5b-instruct] [--steps 12] [--beside 0 1 3] [--json FILE]

Each cell is a process of its own, for OpenMP reads its settings once: seconds a step, mean over the steps
after the first.
"""

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from chatmagic import snapshot_download

SETTINGS = {
    "default": {},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "course": {"OMP_WAIT_POLICY": "PASSIVE"},
}
RESULTS = Path(__file__).parent / "results" / "busy.json"


def step(name: str, steps: int) -> None:
    """Print the seconds of each training step."""
    import tempfile

    import torch
    from peft import get_peft_model
    from torch.utils.data import DataLoader, RandomSampler

    from chatmagic import DataCollator, adalora_config, find_all_linear_names, load_model
    from chatmagic.course.persona import Persona, make_conversations
    from chatmagic.course.profile import get_profile
    from chatmagic.course.replies import own_replies
    from chatmagic.data.dataset import encode_example
    from chatmagic.training import KerasModel, StepRunner, prepare

    profile, seconds = get_profile(name), []
    torch.manual_seed(0)
    model, tokenizer = load_model(snapshot_download(name))
    made = make_conversations(Persona(), own_replies(model, tokenizer), 200, 0, profile.general)
    data = [row for messages in made for row in encode_example(messages, tokenizer)]
    prepare(model)
    model = get_peft_model(model, adalora_config(steps, find_all_linear_names(model), lora_alpha=profile.lora_alpha))

    class Timed(StepRunner):
        def __call__(self, batch):
            began = time.perf_counter()
            result = super().__call__(batch)
            seconds.append(time.perf_counter() - began)
            return result

    keras_model = KerasModel(model, optimizer=torch.optim.AdamW(model.parameters(), lr=profile.learning_rate))
    keras_model.StepRunner = Timed
    drawn = RandomSampler(data, num_samples=steps * profile.batch_size)
    loader = DataLoader(data, profile.batch_size, sampler=drawn, collate_fn=DataCollator(tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        keras_model.fit(loader, epochs=1, monitor="train_loss", ckpt_path=folder, plot=False, cpu=True)
    print(json.dumps(seconds))


def spin() -> None:
    while True:
        pass


def measured(profile: str, steps: int, setting: dict) -> list[float]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_WAIT", "GOMP_"))}
    command = [sys.executable, __file__, "--profile", profile, "--steps", str(steps), "--child"]
    done = subprocess.run(command, env=environment | setting, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profile", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--beside", type=int, nargs="+", default=[0, 1, 3])
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return step(args.profile, args.steps)
    snapshot_download(args.profile)
    result = {
        "profile": args.profile,
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} {platform.machine()} cores",
    }
    result["seconds"] = {}
    print(f"{'busy processes':24}" + "".join(f"{number:>8}" for number in args.beside))
    for name, setting in SETTINGS.items():
        row = result["seconds"][name] = {}
        print(f"{name:24}", end="", flush=True)
        for number in args.beside:
            others = [multiprocessing.Process(target=spin, daemon=True) for _ in range(number)]
            for other in others:
                other.start()
            row[number] = measured(args.profile, args.steps, setting)
            for other in others:
                other.kill()
            print(f"{sum(row[number]) / len(row[number]):8.2f}", end="", flush=True)
        print()
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
