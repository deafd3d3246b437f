"""Encoding conversations for training: `build_inputs_labels` beside the tokenizer's `apply_chat_template`.

    python benchmarks/labels.py [--model FOLDER]

Both get the same conversations of 1, 3, 10 and 30 rounds, Chinese and English, one at a time in one thread:
CPU time, the best of seven runs. `apply_chat_template` gives ids only. Ours once with the family's row of data
("smollm2"), once with the tokenizer's own chat template, as for a model nobody has heard of. Then files of
growing length are read by `read_jsonl`, each in a process of its own, for that process's peak of resident
memory. Prints two tables and writes benchmarks/results/labels.json.
"""

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

TEXTS = (
    "训练一个语言模型需要数据，也需要耐心。我们希望它知道自己是谁、从哪里来、能做什么。",
    "The quick brown fox trains a small language model on a laptop, and learns patience. ",
)
ROUNDS = (1, 3, 10, 30)
LINES = (10_000, 100_000, 1_000_000)


def conversations(rounds: int, count: int) -> list[list[dict]]:
    from chatmagic import build_messages

    draw = random.Random(rounds)

    def text() -> str:
        return (draw.choice(TEXTS) * 3)[draw.randrange(20) :][: draw.randrange(10, 120)]

    return [build_messages(None, [(text(), text()) for _ in range(rounds)]) for _ in range(count)]


def per_second(encode, talks: list[list[dict]]) -> float:
    best = float("inf")
    for _ in range(7):
        start = time.process_time()
        for messages in talks:
            encode(messages)
        best = min(best, time.process_time() - start)
    return len(talks) / best


def speeds(folder: Path) -> dict[int, dict[str, float]]:
    from transformers import AutoTokenizer

    from chatmagic import build_inputs_labels

    tokenizer, stranger = (AutoTokenizer.from_pretrained(folder) for _ in range(2))
    # Another default system text is another model's template, of which nothing is known but itself.
    stranger.chat_template = stranger.chat_template.replace("named SmolLM", "named Stranger")
    ways = {
        "apply_chat_template": tokenizer.apply_chat_template,
        "family row": lambda messages: build_inputs_labels(messages, tokenizer),
        "own template": lambda messages: build_inputs_labels(messages, stranger),
    }
    table = {}
    print("rounds", *(f"{way:>20}" for way in ways), "  conversations per CPU second")
    for rounds in ROUNDS:
        talks = conversations(rounds, 600 // rounds)
        table[rounds] = {way: per_second(encode, talks) for way, encode in ways.items()}
        print(f"{rounds:6}", *(f"{rate:20.0f}" for rate in table[rounds].values()), flush=True)
    return table


def read(path: str) -> None:
    """Read a file to its end; print conversations a second and the peak of resident memory in MiB."""
    from chatmagic import read_jsonl

    start = time.perf_counter()
    count = sum(1 for _ in read_jsonl(path, progress=False))
    seconds = time.perf_counter() - start
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
    print(json.dumps([count / seconds, int(peak) / 1024]))


def memory(folder: Path) -> dict[int, dict[str, float]]:
    talks = [json.dumps({"messages": talk}, ensure_ascii=False) + "\n" for talk in conversations(3, 1000)]
    table = {}
    print(f"{'lines':>9} {'file MiB':>9} {'lines/s':>9} {'peak MiB':>9}")
    for lines in LINES:
        path = folder / f"{lines}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(talks[number % len(talks)] for number in range(lines))
        command = [sys.executable, __file__, "--read", path]
        rate, peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        size = path.stat().st_size / 2**20
        path.unlink()
        table[lines] = {"file_mib": size, "lines_per_second": rate, "peak_mib": peak}
        print(f"{lines:9} {size:9.0f} {rate:9.0f} {peak:9.1f}", flush=True)
    return table


def main(model: Path | None) -> None:
    if model is None:
        from chatmagic import snapshot_download

        model = snapshot_download("smollm2-135m")
    report = {"conversations_per_cpu_second": speeds(model)}
    with tempfile.TemporaryDirectory() as scratch:
        report["reader"] = memory(Path(scratch))
    report |= {
        "date": str(date.today()),
        "cores": os.cpu_count(),
        "device": re.search(r"model name\s+: (.+)", Path("/proc/cpuinfo").read_text())[1],
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("transformers", "tokenizers")},
    }
    out = Path(__file__).parent / "results" / "labels.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct (default: downloaded)")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    read(arguments.read) if arguments.read else main(arguments.model)
