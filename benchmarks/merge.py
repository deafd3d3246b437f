"""Merging an AdaLoRA adapter: ours beside load + `merge_and_unload` + `save_pretrained`, time and peak memory.

    python benchmarks/merge.py --size small|embedded|baichuan2-7b [--folder FOLDER]

A Llama checkpoint of the size's shape with random bfloat16 weights, and an adapter of ranks 0 to 12 on every linear
layer, are written to FOLDER. Each merge runs in a process of its own, with the base in the page cache: time without
imports, until what was merged is safe on the disk, the best of three (at 7B the only one), and that process's peak of
resident memory. Prints a table, compares
the merged weights bit by bit and writes benchmarks/results/merge-SIZE.json.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from peft import AdaLoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from chatmagic import merge_adapter

SIZES = {  # vocabulary, hidden, intermediate, layers, heads, key-value heads, tied embeddings
    "small": (32000, 2048, 5504, 12, 16, 16, False),
    "embedded": (49152, 576, 1536, 30, 9, 3, True),
    "baichuan2-7b": (125696, 4096, 11008, 32, 32, 32, False),
}
SHARD = 5e9  # bytes, as most publishers cut


def write_base(folder: Path, size: str) -> None:
    vocab, hidden, intermediate, layers, heads, kv_heads, tied = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    GenerationConfig().save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shards = [{}]
    for name, weight in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if sum(w.numel() * 2 for w in (*shards[-1].values(), weight)) > SHARD:
            shards.append({})
        shards[-1][name] = weight
    pool, weight_map = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16(), {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {k: pool.repeat(w.numel() // 2**24 + 1)[: w.numel()].view(w.shape).clone() for k, w in shard.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_adapter(folder: Path, base: Path) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(base))
    draw, tensors, pattern = torch.Generator().manual_seed(1), {}, {}
    for i, (name, module) in enumerate(model.model.named_modules(prefix="model")):
        if isinstance(module, torch.nn.Linear):
            rank = i % 13
            pattern[f"{name}.lora_E"] = [j < rank for j in range(12)]
            shapes = {"A": (rank, module.in_features), "B": (module.out_features, rank), "E": (rank, 1)}
            for letter, shape in shapes.items():
                tensors[f"base_model.model.{name}.lora_{letter}"] = torch.randn(shape, generator=draw) * 0.1
    modules = sorted({name.split(".")[-2] for name in pattern})
    AdaLoraConfig(
        task_type="CAUSAL_LM", total_step=100, lora_alpha=16, target_modules=modules, rank_pattern=pattern
    ).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def measure(way: str, base: Path, adapter: Path, output: Path) -> None:
    """In a process of its own: print seconds and the peak of resident memory in GiB."""
    start = time.perf_counter()
    if way == "chatmagic":
        merge_adapter(base, adapter, output)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
        os.sync()  # as ours does, which is not done before it is safe on the disk
    seconds = time.perf_counter() - start
    # VmHWM and not ru_maxrss, which a process inherits from the one that started it.
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    print(json.dumps({"seconds": seconds, "peak_gib": peak / 2**20}))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, mapped from disk."""
    return {name: w for file in folder.glob("*.safetensors") for name, w in load_file(file).items()}


def main(size: str, folder: Path) -> None:
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(), adapter.mkdir()
    write_base(base, size)
    write_adapter(adapter, base)
    largest = max(file.stat().st_size for file in base.glob("*.safetensors")) / 2**30
    rows, outputs = {}, {}
    for way in ["peft", "chatmagic"]:
        outputs[way] = folder / way
        command = [sys.executable, __file__, "--measure", way, base, adapter, outputs[way]]
        runs = []
        for _ in range(1 if size == "baichuan2-7b" else 3):
            shutil.rmtree(outputs[way], ignore_errors=True)
            os.sync()
            runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        rows[way] = min(runs, key=lambda run: run["seconds"])
        print(f"{way:9} {rows[way]['seconds']:7.2f} s {rows[way]['peak_gib']:7.2f} GiB", flush=True)
    ratio = rows["chatmagic"]["seconds"] / rows["peft"]["seconds"]
    ours, theirs = (tensors_of(outputs[way]) for way in ("chatmagic", "peft"))
    equal = ours.keys() == theirs.keys() and all(torch.equal(w, theirs[name]) for name, w in ours.items())
    print(f"ratio {ratio:.2f}, largest shard {largest:.2f} GiB, equal to the last bit: {equal}")
    report = {
        "size": size, "rows": rows, "ratio": ratio, "largest_shard_gib": largest, "equal_bits": equal,
        "date": str(date.today()), "cores": os.cpu_count(),
        "device": re.search(r"model name\s+: (.+)", Path("/proc/cpuinfo").read_text())[1],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")},
    }  # fmt: skip
    out = Path(__file__).parent / "results" / f"merge-{size}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go (default: a temporary folder)")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure[0], *map(Path, arguments.measure[1:]))
    else:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
            main(arguments.size, Path(scratch))
