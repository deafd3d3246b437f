"""`chatmagic export --to gguf`: what 16, 8 and 4 bit cost, of the course that was started last and merged.

    python benchmarks/export.py [--kinds f16 q8_0 q4_0 q4_0:plain] [--general 6] [--json FILE]

Each file is asked by llama.cpp's engine, greedily, in both languages: the nine questions that were trained, and some
of the general ones, which must not be answered with the new identity. The replies are compared with the merged
model's, by transformers; the perplexity is that of transformers over the weights as the file has them.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

from about import about
from gguf import quantize
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from chatmagic.conversation.messages import build_messages
from chatmagic.course.check import find_answer
from chatmagic.course.evaluate import perplexity
from chatmagic.course.export import export_model
from chatmagic.course.persona import LANGUAGES, questions
from chatmagic.course.thread import Course, resume
from chatmagic.machine import share_cores
from chatmagic.models import gguf

PLAIN = "q4_0:plain"  # with the scales that gguf itself takes


def measured(target: Path, model: PreTrainedModel, course: Course, general: int) -> dict:
    """What is known of the merged folder, or of a file that was made of it; `model` has its weights."""
    persona = course.persona
    trained = [(language, *pair) for language in LANGUAGES for pair in persona.asked("trained", language)]
    asked = [row[0] for language in LANGUAGES for row in questions()[language]["retention"][:general]]
    answer = find_answer(str(target))
    replies = answer([build_messages(query) for query in [*(query for *_, query in trained), *asked]])
    own, others = replies[: len(trained)], replies[len(trained) :]
    return {
        "identity": sum(persona.knows(topic, reply, language) for (language, topic, _), reply in zip(trained, own)),
        "trained": len(trained),
        "leaked": sum(map(persona.leaks, asked, others)),
        "general": len(asked),
        "perplexity": perplexity(
            model.eval(), AutoTokenizer.from_pretrained(course.merged), questions()[persona.language]["fluency"]
        ),
        "replies": [reply.strip().rstrip("…") for reply in own],
    }


def told(kind: str, found: dict) -> None:
    """Print it as a line."""
    same = f" ({found['same']} in the same words)" if "same" in found else ""
    made = f", {found['bytes'] / 1e6:.0f} MB, exported with {found['cpu_seconds']:.0f} s of CPU" if same else ""
    print(
        f"{kind:10} identity {found['identity']}/{found['trained']}{same}, "
        f"leaked {found['leaked']}/{found['general']}, perplexity {found['perplexity']:.1f}{made}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=["f16", "q8_0", "q4_0", PLAIN])
    parser.add_argument("--general", type=int, default=6, help="general questions, in each language")
    parser.add_argument("--json")
    args = parser.parse_args()
    share_cores()
    course, ours = resume("merged"), gguf._q4_0
    print(course.profile.name)
    merged = measured(course.merged, AutoModelForCausalLM.from_pretrained(course.merged), course, args.general)
    told("merged", merged)
    results = {"model": course.profile.name, **about("torch", "transformers", "gguf", "xllamacpp")}
    results |= {"merged": merged, "kinds": {}}
    for kind in args.kinds:
        gguf._q4_0 = (lambda numbers: quantize(numbers, gguf.MATRIX_TYPES["q4_0"])) if kind == PLAIN else ours
        with tempfile.TemporaryDirectory() as folder:
            cpu = sum(os.times()[:4])
            (file,) = export_model(course.merged, "gguf", kind.split(":")[0], Path(folder) / "made").glob("*.gguf")
            cpu = sum(os.times()[:4]) - cpu
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
            found = measured(file, model, course, args.general)
            same = sum(reply == before for reply, before in zip(found["replies"], merged["replies"]))
            found |= {"same": same, "bytes": file.stat().st_size, "cpu_seconds": cpu}
        told(kind, found)
        results["kinds"][kind] = found
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
