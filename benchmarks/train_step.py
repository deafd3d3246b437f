"""A training step of a 7B model beside the seed's: time, tokens per second, memory, and losses.

    python benchmarks/train_step.py [--steps N] [--json FILE]     wants a GPU of 40 GiB

A model of Baichuan2-7B's shape, random weights in NF4, beside the seed's recipe as it is written:
`prepare_model_for_kbit_training`, checkpointing, PEFT's AdaLoRA with its penalty but without rank allocation (which the
seed never calls), paged AdamW, logits everywhere, 2 samples of 185 tokens. Then the eager step and the captured one, 50
steps each on the same batches, from the same adapter, beside how far a column of padding takes the eager one; and the
lean step, in the 8 GiB that a smaller card has. Where TRL is installed (`pip install trl`), its SFTTrainer trains LoRA
of rank 8 on the same base too.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from importlib.util import find_spec

import torch
from about import about
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import AdaLoraConfig, LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.nn.functional import pad
from transformers import LlamaConfig, LlamaForCausalLM

import chatmagic
from chatmagic.accel.captured import CapturedStep, why_not
from chatmagic.accel.layers import fast_layers
from chatmagic.models.parts import trainable
from chatmagic.training import functional, prepare
from chatmagic.training.runtime import best_precision

GIB = 2**30
BAICHUAN2_7B = {"vocab_size": 125696, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
SMOLLM2_135M = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}


def our_runner(model, optimizer, capture: bool = True) -> chatmagic.StepRunner:
    """StepRunner as `fit` makes it."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=best_precision(), cpu=not torch.cuda.is_available())
    runner = chatmagic.StepRunner(model, None, accelerator, "train", {}, accelerator.prepare(optimizer))
    if capture and not why_not(model, optimizer, accelerator):
        runner.captured = CapturedStep(functional, model, optimizer, accelerator, runner.max_grad_norm)
    return runner


def random_model(shape: dict, compute_dtype: torch.dtype | None = torch.bfloat16, heads: int = 32, kv_heads: int = 32):
    """A LlamaForCausalLM of random weights, its linear layers in NF4 with that compute dtype (None: in bfloat16)."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.manual_seed(0)
    config = LlamaConfig(**shape, num_attention_heads=heads, num_key_value_heads=kv_heads, use_cache=False)
    dtype = compute_dtype or torch.bfloat16
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    with torch.device("cuda"):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        for name, module in list(model.named_modules()):
            parent, _, last = name.rpartition(".")
            if "weight" not in module._parameters:
                continue
            weight = torch.randn(module.weight.shape, dtype=dtype) * 0.02
            if compute_dtype and isinstance(module, torch.nn.Linear) and name != "lm_head":
                layer = Linear4bit(module.in_features, module.out_features, False, compute_dtype, True, "nf4")
                layer.weight = Params4bit(weight, False, quant_type="nf4", module=layer).to("cuda")
                setattr(model.get_submodule(parent), last, layer)
            else:
                weight = torch.ones_like(weight) if weight.ndim == 1 else weight
                module.weight = torch.nn.Parameter(weight, requires_grad=False)
    model.is_loaded_in_4bit = bool(compute_dtype)
    return model


def random_batch(
    vocabulary: int, samples: int, longest: int = 185, shortest: int | None = None, seed=0, replayed=False
):
    """Rows of between `shortest` and `longest` tokens, padded to the longest; the second half of each has labels, and
    half of those are replayed if that is asked for."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest or longest, longest + 1, (samples, 1), generator=generator)
    lengths[0] = longest
    ids, place = torch.randint(vocabulary, (samples, longest), generator=generator), torch.arange(longest)
    there, taught = place < lengths, (place < lengths) & (place >= lengths // 2)
    batch = {"input_ids": ids, "labels": ids.where(taught, torch.tensor(-100)), "attention_mask": there.long()}
    if replayed:
        batch["replayed"] = taught & (place >= lengths * 3 // 4)
    return {name: tensor.cuda() for name, tensor in batch.items()}


def seed_step(model, steps: int):
    """The seed's cells, as a function of a batch."""
    from bitsandbytes.optim import AdamW

    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model = prepare_model_for_kbit_training(model)
    names = chatmagic.find_all_linear_names(model)
    config = {"r": 32, "lora_alpha": 16, "lora_dropout": 0.08, "target_modules": names, "total_step": steps}
    model = get_peft_model(model, AdaLoraConfig(task_type="CAUSAL_LM", inference_mode=False, **config)).train()
    optimizer = AdamW(model.parameters(), lr=1e-3, is_paged=True)

    def step(batch):
        loss = model(**batch)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def trl_seconds(base, batch: dict, steps: int, **config) -> list[float]:
    """Seconds of each step of a QLoRA run as TRL's documentation has it, every batch the same."""
    from datasets import Dataset
    from pyarrow import Table
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        begun, seconds = 0.0, []

        def on_step_begin(self, *args, **kwargs):
            torch.cuda.synchronize()
            self.begun = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.begun)

    clock, names = Clock(), chatmagic.find_all_linear_names(base)
    rows = [{name: batch[name][i].tolist() for name in ("input_ids", "labels")} for i in range(len(batch["labels"]))]
    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            base,
            SFTConfig(
                folder,
                max_steps=steps,
                per_device_train_batch_size=len(rows),
                learning_rate=1e-3,
                bf16=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                dataset_kwargs={"skip_prepare_dataset": True},
                **config,
            ),
            train_dataset=Dataset(Table.from_pylist(rows * steps), fingerprint="rows"),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>"),
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=names),
            callbacks=[clock],
        )
        trainer.train()
    trainer.model.unload()
    return clock.seconds


def timed(step, batch: dict, steps: int) -> dict:
    """Runs a step `steps` times, the last ten of which count."""
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        step(batch)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return figures(seconds, batch)


def figures(seconds: list[float], batch: dict) -> dict:
    """A row of the table, of the last ten steps."""
    median = statistics.median(seconds[-10:])
    return {
        "samples": len(batch["input_ids"]),
        "step_ms": 1000 * median,
        "tokens_per_s": batch["attention_mask"].sum().item() / median,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "start_s": sum(seconds[:-10]) - len(seconds[:-10]) * median,
    }


class Ours:
    """A base model with a fresh adapter, and its step as `fit` has it, for a while."""

    def __init__(self, base, steps: int = 60, capture: bool = True):
        lean = prepare(base)
        torch.manual_seed(0)
        names = chatmagic.find_all_linear_names(base)
        self.model = get_peft_model(base, chatmagic.adalora_config(steps, names, lora_alpha=16)).train()
        params = [param for _, param in trainable(self.model)]
        if lean:
            from bitsandbytes.optim import PagedAdamW

            optimizer = PagedAdamW(params, lr=1e-3)
        else:
            optimizer = torch.optim.AdamW(params, lr=1e-3, fused=True)
        self.runner = our_runner(self.model, optimizer, capture)

    def __enter__(self):
        self.layers = fast_layers(self.model)
        self.layers.__enter__()
        return self.runner

    def __exit__(self, *error):
        self.runner.captured = None
        self.layers.__exit__(*error)
        self.model.unload()
        empty()


def fifty_steps(base, batches: list, capture: bool, replay: bool = True) -> tuple[list[float], int, list[bool]]:
    """Losses, the final budget, and which triplets are kept, of a run from the same adapter. Without `replay` the
    captured step's kernels are launched one by one, as they are the first time."""
    ours, losses = Ours(base, len(batches), capture), []
    with ours as runner:
        for batch in batches:
            runner.sums = [0.0, 0.0]
            losses.append(runner(batch)[1]["train_loss"])
            if not replay:
                runner.captured.recordings.clear()
    pattern = ours.model.peft_config["default"].rank_pattern
    return losses, runner.allocator.budget, [kept for name in sorted(pattern) for kept in pattern[name]]


def curves(base, vocabulary: int) -> dict:
    """The captured step beside the eager one for 50 steps, and what rounding alone does to the eager one."""
    batches = [random_batch(vocabulary, 2, 192 - step % 3, 160, seed=step % 10) for step in range(50)]
    fills = {"labels": -100}
    padded = [
        {name: pad(each, (0, 192 - each.shape[1]), value=fills.get(name, 0)) for name, each in batch.items()}
        for batch in batches
    ]
    runs = {
        "eager": fifty_steps(base, batches, capture=False),
        "eager, one or two columns of padding more": fifty_steps(base, padded, capture=False),
        "captured": fifty_steps(base, batches, capture=True),
        "captured, without replays": fifty_steps(base, batches, capture=True, replay=False),
    }
    result = {}
    for name, other in (
        ("eager, one or two columns of padding more", "eager"),
        ("captured", "eager"),
        ("captured", "captured, without replays"),
    ):
        (losses, budget, kept), (others, same_budget, too) = runs[name], runs[other]
        apart = max(abs(a - b) for a, b in zip(losses, others))
        alike = sum(a and b for a, b in zip(kept, too)) / sum(kept)
        result[f"{name} : {other}"] = {"losses_apart": apart, "kept_alike": alike, "budgets": [budget, same_budget]}
        print(
            f"50 steps, {name} : {other}: losses {losses[0]:.3f} to {losses[-1]:.3f}, apart by at most {apart:.4f}; "
            f"budgets {budget} and {same_budget}; {alike:.2%} of the kept triplets alike",
            flush=True,
        )
    return {"curves": result, "losses": {name: losses for name, (losses, _, _) in runs.items()}}


def beside_the_seed(steps: int) -> dict:
    vocabulary, rows = BAICHUAN2_7B["vocab_size"], {}
    columns = {"step_ms": 0, "tokens_per_s": 0, "peak_gib": 2, "start_s": 1}
    print(f"{'':>36}" + "".join(f"{name:>14}" for name in columns))

    def measure(name: str, step, batch: dict, others: int = 0):
        report(name, timed(step, batch, steps), others)

    def report(name: str, row: dict, others: int = 0):
        rows[name] = row
        row["peak_gib"] -= others / GIB
        row["speedup"] = row["tokens_per_s"] / rows["seed's recipe"]["tokens_per_s"]
        numbers = "".join(f"{row[column]:>14.{digits}f}" for column, digits in columns.items())
        print(f"{name:>36}{numbers}{row['speedup']:>7.1f}x", flush=True)

    measure("seed's recipe", seed_step(random_model(BAICHUAN2_7B, torch.float16), steps), random_batch(vocabulary, 2))
    empty()
    base = random_model(BAICHUAN2_7B)
    with Ours(base, capture=False) as runner:
        measure("eager, 2 samples", runner, random_batch(vocabulary, 2))
    for samples in (2, 8, 16):
        with Ours(base) as runner:
            measure(f"captured, {samples} samples", runner, random_batch(vocabulary, samples))
    with Ours(base) as runner:
        measure("captured, 2 samples, half replayed", runner, random_batch(vocabulary, 2, replayed=True))

    found = curves(base, vocabulary)

    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    others = torch.empty(free - 8 * GIB, dtype=torch.uint8, device="cuda")  # as if the card had 8 GiB
    with Ours(base) as runner:
        measure("lean, 2 samples of 192", runner, random_batch(vocabulary, 2, 192), others.numel())
    del others
    small = random_model(SMOLLM2_135M, None, 9, 3)
    for capture in (False, True):
        with Ours(small, capture=capture) as runner:
            name = f"135M, {'captured' if capture else 'eager'}, 2 samples"
            measure(name, runner, random_batch(SMOLLM2_135M["vocab_size"], 2))
    for samples, config in ((2, {}), (8, {}), (8, {"gradient_checkpointing": False})) if find_spec("trl") else ():
        batch = random_batch(vocabulary, samples)
        torch.cuda.reset_peak_memory_stats()
        name = f"TRL{', no checkpointing' if config else ''}, {samples} samples"
        try:
            report(name, figures(trl_seconds(base, batch, steps, **config), batch))
        except Exception as error:  # another's code: what was measured so far is kept
            print(f"{name:>36}: {error}", flush=True)
        empty()
    return {"rows": rows, **found}


def empty() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json")
    args = parser.parse_args()
    result = beside_the_seed(args.steps)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result | about("torch", "transformers", "peft", "accelerate", "bitsandbytes"), file, indent=1)


if __name__ == "__main__":
    main()
