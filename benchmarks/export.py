"""`chatmagic export --to gguf`: what 16, 8 and 4 bit cost, of the course that was started last, evaluated and merged.

    python benchmarks/export.py [--kinds f16 q8_0 q4_0 q4_0:plain] [--general 15] [--json FILE]

Each file is asked by llama.cpp's engine, greedily: the nine questions that were trained, and some of the general ones,
which must not be answered with the new identity. The replies are compared with the merged model's in evaluation.json,
by transformers; the perplexity is that of transformers over the weights as the file has them.
"""

import argparse
import gc
import json
import os
import tempfile
import time
from pathlib import Path

from about import about
from gguf import quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatmagic.backends.gguf import open_gguf
from chatmagic.conversation.messages import build_messages
from chatmagic.course.evaluate import perplexity
from chatmagic.course.export import export_model
from chatmagic.course.persona import questions
from chatmagic.course.thread import resume
from chatmagic.machine import share_cores
from chatmagic.models import gguf

PLAIN = "q4_0:plain"  # with the scales that gguf itself takes


def measured(file: Path, course, general: int) -> dict:
    persona, said = course.persona, json.loads((course.folder / "evaluation.json").read_text("utf-8"))["after"]
    said, own = said[persona.language], questions()[persona.language]
    trained, told = persona.asked("trained"), dict(map(tuple, reversed(said["replies"])))
    asked = [query for query, *_ in own["retention"]][:general]
    llm = open_gguf(file, context=1024, stream=False)
    replies, tokens, began = {}, 0, time.perf_counter()
    for query in [*(query for _, query in trained), *asked]:
        reply = llm.chat(build_messages(query), greedy=True, max_new_tokens=48)
        replies[query], tokens = str(reply).strip(), tokens + reply.stats.tokens_out
    seconds = time.perf_counter() - began
    del llm
    gc.collect()
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer = AutoTokenizer.from_pretrained(course.merged)
    return {
        "bytes": file.stat().st_size,
        "identity": sum(persona.knows(topic, replies[query]) for topic, query in trained),
        "same": sum(replies[query] == told[query] for _, query in trained),
        "leaked": sum(persona.leaks(query, replies[query]) for query in asked),
        "general": len(asked),
        "tokens_per_second": tokens / seconds,
        "perplexity": perplexity(model.eval(), tokenizer, own["fluency"]),
        "perplexity_merged": said["perplexity"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=["f16", "q8_0", "q4_0", PLAIN])
    parser.add_argument("--general", type=int, default=15)
    parser.add_argument("--json")
    args = parser.parse_args()
    share_cores()
    course, results, ours = resume("merged"), {}, gguf._q4_0
    print(f"{course.profile.name}: size, identity (the same words), leaked, tokens/s, perplexity (merged)")
    for kind in args.kinds:
        gguf._q4_0 = (lambda numbers: quantize(numbers, gguf.KINDS["q4_0"])) if kind == PLAIN else ours
        with tempfile.TemporaryDirectory() as folder:
            began, cpu = time.perf_counter(), sum(os.times()[:4])
            (file,) = export_model(course.merged, "gguf", kind.split(":")[0], Path(folder) / "made").glob("*.gguf")
            took, cpu = time.perf_counter() - began, sum(os.times()[:4]) - cpu
            found = results[kind] = measured(file, course, args.general) | {"seconds": took, "cpu_seconds": cpu}
        print(
            f"{kind:10} {found['bytes'] / 1e6:.0f} MB, {found['identity']}/9 ({found['same']}/9), "
            f"{found['leaked']}/{found['general']}, {found['tokens_per_second']:.1f}, {found['perplexity']:.1f} "
            f"({found['perplexity_merged']:.1f}); exported in {took:.0f} s, {cpu:.0f} s of CPU",
            flush=True,
        )
    if args.json:
        result = {"model": course.profile.name, **about("torch", "transformers", "gguf", "xllamacpp"), "kinds": results}
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
