"""Loading Baichuan2-7B as published, in 4 bit, beside the same weights as a plain Llama: time, peak memory.

    python benchmarks/load.py [--tiny] [--folder FOLDER]

Random bfloat16 weights of the published size are written three times: in the publisher's layout (two `.bin`
shards, q, k and v in one matrix, a head that is normalised while loading), and as the plain Llama that this
becomes, in safetensors and in `.bin`. The first is loaded by `load_model(folder, "nf4")`, the others by
transformers' own from_pretrained with the same quantisation; the tokenizer is in the time, and given apart.
Each load runs in a process of its own, files in the page cache: time without imports, the better of two. Host
memory is the peak of what the process owns, and of what is resident, the pages of mapped files included.
Needs 46 GB of disk and 10 GB of GPU memory; `--tiny` needs neither, and its time is all tokenizer. Prints a
table, compares logits bit by bit and writes benchmarks/results/load-SIZE.json.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize

WAYS = {
    "published": "load_model, published .bin",
    "safetensors": "transformers, Llama safetensors",
    "bin": "transformers, Llama .bin",
}
SIZES = {  # hidden size, intermediate size, layers, heads
    "baichuan2-7b": (4096, 11008, 32, 32),
    "tiny": (64, 128, 2, 2),
}
VOCABULARY = 125696
PACKAGES = ("torch", "transformers", "bitsandbytes", "safetensors", "tokenizers")


def tensors(size: str):
    """Published names and random weights."""
    hidden, intermediate, layers, _ = SIZES[size]
    pool = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()

    def draw(*shape):
        count = torch.Size(shape).numel()
        return pool.repeat(count // 2**24 + 1)[:count].view(shape).clone()

    yield "model.embed_tokens.weight", draw(VOCABULARY, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "self_attn.W_pack.weight", draw(3 * hidden, hidden)
        yield prefix + "self_attn.o_proj.weight", draw(hidden, hidden)
        yield prefix + "mlp.gate_proj.weight", draw(intermediate, hidden)
        yield prefix + "mlp.up_proj.weight", draw(intermediate, hidden)
        yield prefix + "mlp.down_proj.weight", draw(hidden, intermediate)
        yield prefix + "input_layernorm.weight", 1 + draw(hidden)
        yield prefix + "post_attention_layernorm.weight", 1 + draw(hidden)
    yield "model.norm.weight", 1 + draw(hidden)
    yield "lm_head.weight", draw(VOCABULARY, hidden)


def as_llama(published: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights = {}
    for name, tensor in published.items():
        if "W_pack" in name:
            for part, rows in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                weights[name.replace("W_pack", part)] = rows.clone()
        else:
            weights[name] = normalize(tensor) if name == "lm_head.weight" else tensor
    return weights


def write_checkpoints(folder: Path, size: str) -> None:
    hidden, intermediate, layers, heads = SIZES[size]
    shape = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16",
    }
    shards, middle = [{}, {}], f"layers.{layers // 2}."
    for name, tensor in tensors(size):
        shards[bool(shards[1]) or middle in name][name] = tensor
    for way in WAYS:
        (folder / way).mkdir()
        kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        if way == "published":
            kind = {"model_type": "baichuan", "model_max_length": 4096}
        (folder / way / "config.json").write_text(json.dumps(shape | kind))
        stem, suffix = ("model", "safetensors") if way == "safetensors" else ("pytorch_model", "bin")
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            file = f"{stem}-{number:05d}-of-00002.{suffix}"
            weights = shard if way == "published" else as_llama(shard)
            if way == "safetensors":
                save_file(weights, folder / way / file, metadata={"format": "pt"})
            else:
                torch.save(weights, folder / way / file)
            weight_map |= dict.fromkeys(weights, file)
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / way / f"{stem}.{suffix}.index.json").write_text(index)


def write_tokenizers(folder: Path) -> None:
    """A SentencePiece file with about the pieces and merges of Baichuan2's, and a tokenizer.json of it."""
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<reserved_{n}>", 4) for n in range(1000))]
    pieces += [(f"<0x{byte:02X}>", 6) for byte in range(256)]
    letters = [chr(0x4E00 + n) for n in range(20000)]
    pieces += [(letter, 1) for letter in letters]
    pieces += [(letters[n % 19997] + letters[n // 7], 1) for n in range(VOCABULARY - len(pieces))]
    message = bytearray()
    for text, kind in pieces:
        piece = b"\x0a" + bytes([len(text.encode())]) + text.encode() + b"\x18" + bytes([kind])
        message += b"\x0a" + bytes([len(piece)]) + piece
    (folder / "published" / "tokenizer.model").write_bytes(message + b"\x1a\x02\x18\x00")
    tokenizer = load_tokenizer("published", folder / "published")
    for way in "safetensors", "bin":
        tokenizer.save_pretrained(folder / way)


def load_tokenizer(way: str, folder: Path):
    from transformers import AutoTokenizer

    from chatmagic.models.families import baichuan

    if way == "published":
        return baichuan.tokenizer(folder, {"model_max_length": 4096})
    return AutoTokenizer.from_pretrained(folder)


def load(way: str, folder: Path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from chatmagic import load_model

    if way == "published":
        return load_model(folder, "nf4")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, device_map="auto")
    return model, load_tokenizer(way, folder)


def measure(way: str, folder: Path) -> None:
    """In a process of its own: print seconds, peaks of memory in GiB, and some logits."""
    import bitsandbytes  # noqa: F401, so that no load pays for it
    from transformers import AutoModelForCausalLM, AutoTokenizer, utils  # noqa: F401

    import chatmagic.models.families
    import chatmagic.models.load  # noqa: F401

    utils.logging.disable_progress_bar()
    gpu = torch.cuda.is_available()
    if gpu:
        torch.empty(1, device="cuda")  # its context is no part of loading
    owned, done = [0.0], threading.Event()

    def watch():
        while not done.wait(0.05):
            owned.append(status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model, _ = load(way, folder)
    if gpu:
        torch.cuda.synchronize()
    row = {"seconds": time.perf_counter() - start, "gpu_gib": 0.0}
    done.set()
    watcher.join()
    row |= {"host_owned_gib": max(owned), "host_resident_gib": status("VmHWM")}
    if gpu:
        row["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
    start = time.perf_counter()
    load_tokenizer(way, folder)
    row["tokenizer_seconds"] = time.perf_counter() - start
    with torch.no_grad():
        logits = model(torch.tensor([[195, 16829, 196]], device=model.device)).logits[0, -1, :64]
    print(json.dumps([row, logits.float().tolist()]))


def status(key: str) -> float:
    """A line of /proc/self/status in GiB."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


def main(size: str, folder: Path) -> None:
    start = time.perf_counter()
    write_checkpoints(folder, size)
    write_tokenizers(folder)
    print(f"three checkpoints written in {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{'':32}{'seconds':>9}{'tokenizer':>11}{'GPU':>8}{'host, owned':>13}{'resident':>10}  (GiB)")
    columns = "{seconds:9.2f}{tokenizer_seconds:11.2f}{gpu_gib:8.2f}{host_owned_gib:13.2f}{host_resident_gib:10.2f}"
    rows, answers = {}, {}
    for way, label in WAYS.items():
        command, runs = [sys.executable, __file__, "--measure", way, folder / way], []
        for _ in range(2):
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            row, answers[way] = json.loads(done.stdout.splitlines()[-1])
            runs.append(row)
        rows[way] = min(runs, key=lambda run: run["seconds"])
        print(f"{label:32}" + columns.format(**rows[way]), flush=True)
    ratios = {way: rows["published"]["seconds"] / rows[way]["seconds"] for way in ("safetensors", "bin")}
    equal = all(answer == answers["published"] for answer in answers.values())
    print(f"published / plain: {ratios['safetensors']:.2f} (safetensors), {ratios['bin']:.2f} (.bin)")
    print(f"logits equal to the last bit: {equal}")
    cpu = re.search(r"model name\s+: (.+)", Path("/proc/cpuinfo").read_text())[1]
    report = {
        "size": size,
        "rows": rows,
        "ratios": ratios,
        "equal_bits": equal,
        "date": str(date.today()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    out = Path(__file__).parent / "results" / f"load-{size}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a smoke test, on any machine")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go (default: a temporary folder)")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure[0], Path(arguments.measure[1]))
    else:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
            main("tiny" if arguments.tiny else "baichuan2-7b", Path(scratch))
