"""Training over several GPUs of one host: speed, the loss beside one GPU's, ranks, memory, a killed worker.

    python benchmarks/train_ddp.py [--gpus 1 2 4] [--size 7b] [--json FILE]
    python benchmarks/train_ddp.py --cpu --size tiny --gpus 1 2          two gloo processes, to try the script itself

A Llama of Baichuan2-7B's shape with random weights, its base in NF4 on each GPU, AdaLoRA on every linear layer,
and conversations of random tokens, half of whose replies are replayed. Each row is a run of its own, started as
`accelerate launch` starts `chatmagic train`:

    N GPU            --batch rows each: tokens per second, against the fewest GPUs, and peak memory
    1 GPU, as N      as many rows a step as the most GPUs have together: the losses of both runs beside one another,
                     and beside what rounding alone does, which is the same run without CUDA graphs
    killed           the most GPUs; a worker is killed in the middle, and a second run goes on from the last state
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from about import about
from accelerate import PartialState
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from chatmagic import adalora_config, find_all_linear_names
from chatmagic.models.quantize import quantization_config
from chatmagic.training import KerasModel, StepRunner
from chatmagic.training.adalora import rank_table
from chatmagic.training.runtime import prepare

SIZES = {  # hidden, intermediate, layers, heads, vocabulary
    "7b": (4096, 11008, 32, 32, 125_696),
    "tiny": (128, 256, 2, 4, 1000),
}
EPOCHS, RATE = 5, 1e-3


def base(size: str, device: torch.device):
    """The frozen model in NF4, the same in every process."""
    hidden, intermediate, layers, heads, vocabulary = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        vocab_size=vocabulary, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    torch.manual_seed(0)
    weights = {name: torch.ones(shape, device=device, dtype=torch.bfloat16) for name, shape in shapes.items()}
    for name, tensor in weights.items():
        if "norm" not in name:
            tensor.normal_(std=0.02)
    settings = {"quantization_config": quantization_config("nf4", torch.bfloat16), "device_map": {"": device}}
    return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=torch.bfloat16, **settings)


def conversations(count: int, length: int) -> list[dict]:
    """Rows of a hundred words, so that there is something to learn, which differ in how many of their tokens are
    trained; half of them replayed."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for row in range(count):
        input_ids = torch.randint(100, (length,), generator=generator)
        labels = input_ids.clone()
        labels[: length // 2 + row % 7] = -100
        rows.append({"input_ids": input_ids, "labels": labels, "replayed": (labels != -100) & bool(row % 2)})
    return rows


class Noted(StepRunner):
    """Notes when each training step ends and its loss, and kills the last process before the step `die`."""

    ends, losses, die, graphs = [], [], None, 0

    def __call__(self, batch):
        if self.stage == "val":
            return super().__call__(batch)
        if len(Noted.ends) == Noted.die and self.accelerator.is_last_process:
            os.kill(os.getpid(), signal.SIGKILL)
        loss, taught = self.sums
        result = super().__call__(batch)  # reads the loss back: the GPU has finished
        Noted.losses.append((self.sums[0] - loss) / (self.sums[1] - taught))
        Noted.ends.append(time.perf_counter())
        Noted.graphs = sum(map(bool, self.captured.graphs.values())) if self.captured else 0
        return result


def worker(args) -> None:
    """One process of a run; leaves FOLDER/RANK.json."""
    state = PartialState(cpu=args.cpu)
    model = base(args.size, state.device)
    if state.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    prepare(model)
    rows = conversations(args.rows, args.length)
    steps = EPOCHS * args.rows // (args.batch * state.num_processes)
    torch.manual_seed(0)
    model = get_peft_model(model, adalora_config(steps, find_all_linear_names(model), lora_alpha=16))
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=RATE)
    keras_model = KerasModel(model, optimizer=optimizer)
    keras_model.StepRunner, Noted.die = Noted, args.die
    if args.eager:
        keras_model._capture = lambda: None
    history = keras_model.fit(
        DataLoader(rows, args.batch, shuffle=True),
        DataLoader(rows[: 2 * args.batch * state.num_processes], args.batch),
        epochs=EPOCHS, patience=EPOCHS, ckpt_path=args.folder / "adapter", plot=False, cpu=args.cpu, resume=args.resume,
    )  # fmt: skip
    steps = [end - start for start, end in pairwise(Noted.ends)]
    result = {
        "losses": Noted.losses,
        "history": history.to_dict("list"),
        "ranks": rank_table(model.peft_config["default"]).to_numpy().tolist(),
        "step_s": statistics.median(steps[len(steps) // 5 :]),
        "graphs": Noted.graphs,
        "device": torch.cuda.get_device_name() if state.device.type == "cuda" else "cpu",
    }
    (args.folder / f"{state.process_index}.json").write_text(json.dumps(result))


def launch(args, folder: Path, gpus: int, batch: int, rows: int, *more: str) -> list[dict]:
    """What each process of a run leaves; nothing if the run failed, which is told."""
    folder.mkdir(exist_ok=True)
    several = ["--multi_gpu"] if gpus > 1 else []
    command = [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(gpus)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", __file__]
    command += ["--worker", "--folder", str(folder), "--size", args.size, "--length", str(args.length)]
    command += ["--batch", str(batch), "--rows", str(rows), *(["--cpu"] if args.cpu else []), *more]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "chatmagic.errors" in line or "Signal 9" in line]
        last = (said or done.stderr.splitlines())[-1].strip()[:200]
        print(f"{folder.name}: exit {done.returncode} after {time.perf_counter() - began:.0f} s. {last}", flush=True)
        return []
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(gpus)]


def apart(ours: list[dict], theirs: list[dict]) -> float:
    """How far the losses of two runs are apart, at most, over their steps."""
    return max(abs(a - b) for a, b in zip(ours[0]["losses"], theirs[0]["losses"], strict=True))


def measure(args, folder: Path) -> dict:
    most = max(args.gpus)
    rows = args.steps * args.batch // EPOCHS  # an epoch of one GPU
    result, fewest, several = {"runs": {}}, None, []
    print(
        f"{'':10}{'step, ms':>10}{'tokens/s':>10}{'ratio':>7}{'GiB a GPU':>11}{'graphs':>8}{'ranks equal':>13}",
        flush=True,
    )
    for gpus in sorted(args.gpus):
        name = f"{gpus} GPU"
        if not (several := launch(args, folder / name, gpus, args.batch, rows * gpus)):
            continue
        step_s = max(worker["step_s"] for worker in several)
        speed = gpus * args.batch * args.length / step_s
        fewest = fewest or speed
        memory = max(max(worker["history"]["peak_memory"]) for worker in several)
        equal = all(worker["ranks"] == several[0]["ranks"] for worker in several)
        graphs = min(worker["graphs"] for worker in several)
        print(
            f"{name:10}{1e3 * step_s:>10.1f}{speed:>10.0f}{speed / fewest:>7.2f}{memory:>11.2f}{graphs:>8}"
            f"{equal!s:>13}",
            flush=True,
        )
        result["runs"][name] = {"tokens_per_s": speed, "step_s": step_s, "peak_GiB": memory, "ranks_equal": equal}
        result["runs"][name] |= {name: several[0][name] for name in ("losses", "history", "graphs", "device")}
    alone = [f"1 GPU, as {most}", 1, args.batch * most, rows * most]
    one = launch(args, folder / alone[0], *alone[1:])
    eager = launch(args, folder / "without graphs", *alone[1:], "--eager")
    if several and one and eager:
        result["as_one"] = {"apart": apart(several, one), "rounding": apart(one, eager), "losses": one[0]["losses"]}
        result["as_one"]["history"] = one[0]["history"]
        epochs = one[0]["history"]["train_loss"]
        print(
            f"{alone[0]}: train_loss from {epochs[0]:.2f} to {epochs[-1]:.2f}; the losses of its steps are at most "
            f"{apart(several, one):.1e} from those of {most} GPUs, {apart(one, eager):.1e} from its own without graphs",
            flush=True,
        )
    half = args.steps // 2 + 1
    launch(args, folder / "killed", most, args.batch, rows * most, "--die", str(half))
    resumed = launch(args, folder / "killed", most, args.batch, rows * most, "--resume")
    if resumed and several:
        again = [{"losses": several[0]["losses"][-len(resumed[0]["losses"]) :]}]
        result["resumed"] = {"killed_at": half, "steps": len(resumed[0]["losses"]), "apart": apart(resumed, again)}
        print(f"killed at step {half}, resumed for the last {len(resumed[0]['losses'])}: losses at most "
              f"{apart(resumed, again):.1e} from those of the unbroken run", flush=True)  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes to compare")
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--batch", type=int, default=2, help="rows a GPU")
    parser.add_argument("--length", type=int, default=192, help="tokens a row")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", type=Path)
    for internal in ("--worker", "--eager", "--resume"):
        parser.add_argument(internal, action="store_true", help=argparse.SUPPRESS)
    for internal, kind in {"--folder": Path, "--rows": int, "--die": int}.items():
        parser.add_argument(internal, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    result |= {"arguments": {name: getattr(args, name) for name in ("gpus", "size", "batch", "length", "steps", "cpu")}}
    result |= about("torch", "transformers", "peft", "accelerate", "bitsandbytes")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
