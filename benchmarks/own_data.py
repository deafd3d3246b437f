"""Data of one's own: what reading a file costs, and what the base's own replies beside it buy.

    python benchmarks/own_data.py [--read] [--mix] [--profile NAME] [--epochs N]

--read: files of 300 MB are made (JSON lines of two sizes of row, a JSON array, Parquet, CSV), each read by
`read_conversations` in a process of its own: MB/s, rows, how much that process's resident memory grew. --mix: the
course's role-play set in Chinese is trained on the profile's model by `chatmagic train`'s own function, without and
with a quarter as many of the base's own replies beside it, in as many steps as the notebook's: loss on what was held
out, how many of the retention list's questions that the base knew are still answered, and how many of those answers
speak in the part's voice. Prints tables and writes benchmarks/results/own_data.json.
"""

import argparse
import csv
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from about import about

RESULTS = Path(__file__).with_name("results") / "own_data.json"
TEXT = (
    "训练一个语言模型需要数据，也需要耐心。我们希望它知道自己是谁。The quick brown fox trains a model, patiently. " * 8
)
KINDS = ("lines", "short lines", "array", "parquet", "csv")


def rows(kind: str, size: int):
    """Rows of texts of up to 200 characters, until they have about `size` bytes."""
    draw, made = random.Random(0), 0

    def text() -> str:
        start = draw.randrange(200)
        return TEXT[start : start + draw.randrange(8, 200)]

    while made < size:
        if kind in ("lines", "array"):
            row = {"messages": [{"role": role, "content": text()} for role in ("user", "assistant") * 2]}
        else:
            row = {"instruction": text(), "input": "", "output": text()}
        made += len(json.dumps(row, ensure_ascii=False).encode())
        yield row


def write(kind: str, size: int, path: Path) -> None:
    if kind == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        table = pa.Table.from_pylist([*rows(kind, size)])
        parquet.write_table(table, path, compression="none", use_dictionary=False, row_group_size=10_000)
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        if kind == "csv":
            table = csv.DictWriter(file, ["instruction", "input", "output"])
            table.writeheader()
            table.writerows(rows(kind, size))
        elif kind == "array":
            for index, row in enumerate(rows(kind, size)):
                file.write((",\n" if index else "[\n") + json.dumps(row, ensure_ascii=False, indent=1))
            file.write("\n]\n")
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(kind, size))


def read(path: str) -> None:
    """What one process prints of reading a file."""
    from chatmagic import read_conversations

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    small = Path(path).with_suffix(".small")
    small.write_text('{"query": "a", "response": "b"}\n')
    if path.endswith("parquet"):
        import pyarrow.parquet  # noqa: F401  # what the library itself takes is not the file's
    list(read_conversations(small))
    before, start, used = peak(), time.perf_counter(), time.process_time()
    count = sum(1 for _ in read_conversations(path))
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    print(json.dumps({"rows": count, "seconds": seconds, "cpu": cpu, "grew_mib": peak() - before}))


def reading(size: int) -> dict[str, dict]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            path = Path(folder) / (kind.replace(" ", "-") + {"parquet": ".parquet", "csv": ".csv"}.get(kind, ".json"))
            write(kind, size, path)
            done = subprocess.run(
                [sys.executable, __file__, "--file", path], check=True, capture_output=True, text=True
            ).stdout
            found[kind] = {"mb": path.stat().st_size / 1e6} | json.loads(done.splitlines()[-1])
            path.unlink()
            one = found[kind]
            print(
                f"{kind:12} {one['mb']:4.0f} MB {one['rows']:8,} rows {one['mb'] / one['seconds']:6.1f} MB/s "
                f"({one['mb'] / one['cpu']:.1f} of CPU time), memory +{one['grew_mib']:.0f} MiB",
                flush=True,
            )
    return found


def mixing(profile: str, epochs: int) -> dict[str, dict]:
    from chatmagic.course import share_cores

    share_cores()  # before torch is imported

    from peft import PeftModel
    from torch.utils.data import DataLoader

    from chatmagic import DataCollator, load_model
    from chatmagic.course import own, script, start
    from chatmagic.course.evaluate import ask
    from chatmagic.course.own import held_out_loss, role_play
    from chatmagic.course.persona import holds, questions
    from chatmagic.course.thread import OwnData
    from chatmagic.data.dataset import ConversationFile, Examples

    asked = [row for table in questions().values() for row in table["retention"]]

    def asked_of(model, tokenizer, course) -> dict:
        replies = ask(model, tokenizer, [[{"role": "user", "content": query}] for query, *_ in asked])
        data = DataLoader(Examples(ConversationFile(course.val), tokenizer), 2, collate_fn=DataCollator(tokenizer))
        return {
            "loss": held_out_loss(model, data),
            "known": [query for (query, *facts), reply in zip(asked, replies) if holds(reply, facts)],
            "in the voice": sum("小船" in reply for reply in replies),
            "replies": replies,
        }

    found, base = {}, None
    for share in (0, own.REPLAYED):
        own.REPLAYED = share
        mix = "replay" if share else "nothing"
        course = start(profile)
        course = replace(
            course,
            own=OwnData(str(role_play("zh")), mix=mix, samples=48),
            profile=replace(course.profile, epochs=epochs),
        )
        script.make_data(course)
        start_time = time.perf_counter()
        history = script.train(course, resume=False)
        seconds = time.perf_counter() - start_time
        model, tokenizer = load_model(course.model)
        if base is None:
            base = asked_of(model, tokenizer, course)
        after = asked_of(PeftModel.from_pretrained(model, course.adapter), tokenizer, course)
        kept = len({*base["known"]} & {*after["known"]})
        found[f"{share:g}"] = {"seconds": seconds, "history": history.to_dict("list"), "kept": kept} | after
        print(
            f"{share:4g} replies a conversation: loss {base['loss']:.2f} -> {after['loss']:.2f}, {kept} of "
            f"{len(base['known'])} still known, {after['in the voice']} of {len(asked)} in the voice, {seconds:.0f} s",
            flush=True,
        )
    return {"base": base, "replayed": found}


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--read", action="store_true")
    options.add_argument("--mix", action="store_true")
    options.add_argument("--profile", default="qwen2.5-coder-0.5b-instruct")
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--megabytes", type=int, default=300)
    options.add_argument("--file", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.file:
        return read(args.file)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    if args.read:
        results["read"] = reading(args.megabytes * 10**6) | {"where": about("pyarrow")}
    if args.mix:
        with tempfile.TemporaryDirectory() as os.environ["CHATMAGIC_COURSE"]:  # the reader's own course stays as it is
            results["mix"] = mixing(args.profile, args.epochs) | {"where": about("torch")}
    RESULTS.write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
