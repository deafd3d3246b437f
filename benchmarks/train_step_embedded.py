"""The embedded model's training step beside the plain fp32 step of PEFT's documentation: time and losses.

    python benchmarks/train_step_embedded.py [MODEL_FOLDER] [--steps N] [--json FILE]

The two take turns on the same batches of two conversations, each from the same adapter. Times are with dropout, curves
without.
"""

import argparse
import itertools
import json
import statistics
import time
from contextlib import ExitStack

import torch
from about import about
from peft import get_peft_model
from train_step import our_runner

import chatmagic
from chatmagic.accel.layers import fast_layers
from chatmagic.course.persona import Persona, make_conversations
from chatmagic.training.runtime import best_precision


def adapted(folder, dtype, dropout: float, steps: int, fused: bool = False):
    """A model with AdaLoRA on every linear layer, the adapter's parameters, and an optimizer of them."""
    model, _ = chatmagic.load_model(folder, dtype=dtype)
    names = chatmagic.find_all_linear_names(model)
    torch.manual_seed(0)
    model = get_peft_model(model, chatmagic.adalora_config(steps, names, lora_alpha=16, lora_dropout=dropout))
    params = [param for name, param in model.named_parameters() if "lora_" in name]
    return model.train(), params, torch.optim.AdamW(params, lr=1e-3, fused=fused)


def plain_step(folder, dropout: float, steps: int):
    """A function of a batch that trains on it and returns the loss, penalty included."""
    model, params, optimizer = adapted(folder, torch.float32, dropout, steps)
    count = itertools.count()

    def step(batch):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        model.base_model.update_and_allocate(next(count))
        optimizer.zero_grad()
        return loss.item()

    return step


def our_step(folder, dropout: float, steps: int, stack: ExitStack):
    """The same with chatmagic's StepRunner; the layers' forward is `fit`'s until `stack` closes."""
    model, _, optimizer = adapted(folder, "auto", dropout, steps, fused=True)
    stack.enter_context(fast_layers(model))
    runner = our_runner(model, optimizer)

    def step(batch):
        runner.sums = [0.0, 0.0]  # it reports the mean of an epoch so far: make each step one
        _, log = runner(batch)
        return log["train_loss"] + log["train_penalty"]

    return step


def race(folder, batches, dropout: float) -> list[list[list[float]]]:
    """[seconds, losses] of the plain step and of ours, for every batch."""
    results = [[[], []], [[], []]]
    with ExitStack() as stack:
        steps = plain_step(folder, dropout, len(batches)), our_step(folder, dropout, len(batches), stack)
        for batch in batches:
            for step, (seconds, losses) in zip(steps, results):
                started = time.perf_counter()
                losses.append(step(batch))
                seconds.append(time.perf_counter() - started)
    return results


def measure(folder, steps: int) -> dict:
    folder = folder or chatmagic.snapshot_download("smollm2-135m")
    _, tokenizer = chatmagic.load_model(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    collate = chatmagic.DataCollator(tokenizer)
    encoded = [
        chatmagic.build_inputs_labels(messages, tokenizer) for messages in make_conversations(Persona(), [], 2 * steps)
    ]
    rows = [{"input_ids": input_ids, "labels": labels} for input_ids, labels in encoded]
    batches = [collate(rows[i : i + 2]) for i in range(0, len(rows), 2)]
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]

    (plain, _), (ours, _) = race(folder, batches, dropout=0.08)
    ratio = statistics.median(b / a for a, b in zip(plain[1:], ours[1:]))
    (_, plain_losses), (_, our_losses) = race(folder, batches, dropout=0.0)
    apart = max(abs(b / a - 1) for a, b in zip(plain_losses, our_losses))
    print(f"{steps} steps of {sum(b['input_ids'].numel() for b in batches) / steps:.0f} tokens on average")
    print(f"{'':>14}{'median step':>14}{'first loss':>13}{'last loss':>12}")
    for name, seconds, losses in (("plain fp32", plain, plain_losses), (f"ours, {best_precision()}", ours, our_losses)):
        print(f"{name:>14}{statistics.median(seconds[1:]):>12.3f} s{losses[0]:>13.4f}{losses[-1]:>12.4f}")
    print(f"{'ratio':>14}{ratio:>12.2f}  {'losses apart by at most':>25}{apart:>8.2%}")
    return {
        "plain_s": plain,
        "ours_s": ours,
        "ratio": ratio,
        "plain_losses": plain_losses,
        "our_losses": our_losses,
        "losses_apart": apart,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json")
    args = parser.parse_args()
    result = measure(args.folder, args.steps)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result | about("torch", "transformers", "peft", "accelerate", "bitsandbytes"), file, indent=1)


if __name__ == "__main__":
    main()
