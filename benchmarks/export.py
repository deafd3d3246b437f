"""`chatmagic export`: what each way out costs, of the course that was started last and merged.

    python benchmarks/export.py [--kinds gguf:f16 gguf:q8_0 gguf:q4_0 ollama:q8_0 lora:- gguf:q4_0:plain]
        [--only trained heldout near retention] [--json FILE]

The merged folder and each export are asked, greedily and in both languages, what `chatmagic check` asks: the nine
questions that were trained, paraphrases of them, what is near to them, and general knowledge. A GGUF file is asked by
llama.cpp's engine; the one for Ollama by the same, with the system text, the template and the stops of its Modelfile;
a LoRA adapter over its base. The replies are compared with the merged model's; the perplexity is that of transformers
over the weights as they were exported. The last lines say which exports reach the goal: nothing lost and no near
question answered with the new identity at 8 bits and more, at most one question lost at 4.
"""

import argparse
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import httpx2
from about import about
from gguf import quantize
from transformers import AutoModelForCausalLM, AutoTokenizer
from xllamacpp import CommonParams, Server

from chatmagic.conversation.messages import Message, build_messages
from chatmagic.course.check import KINDS, REPLY_TOKENS, Answer, examine, find_answer
from chatmagic.course.evaluate import perplexity
from chatmagic.course.export import export_model
from chatmagic.course.persona import questions
from chatmagic.course.thread import Course, resume
from chatmagic.machine import share_cores
from chatmagic.models import gguf
from chatmagic.models.load import load_trained
from chatmagic.models.ollama import find_pieces

EVERY = ("gguf:f16", "gguf:q8_0", "gguf:q4_0", "ollama:q8_0", "lora:-", "gguf:q4_0:plain")
PLAIN = "gguf:q4_0:plain"  # with the scales that gguf itself takes
ALLOWED = {"q4_0": 1}  # questions that may be lost


def as_ollama(folder: Path, tokenizer) -> Answer:
    """Asks what Ollama would: one string, encoded as such, until one of its stops."""
    (file,), modelfile = folder.glob("*.gguf"), (folder / "Modelfile").read_text("utf-8")
    pieces = find_pieces(tokenizer)
    assert f'TEMPLATE """{pieces.go()}"""' in modelfile
    system = (re.findall(r'^SYSTEM """(.*?)"""$', modelfile, re.MULTILINE | re.DOTALL) or [None])[0]
    stops = [json.loads(each) for each in re.findall("^PARAMETER stop (.*)$", modelfile, re.MULTILINE)]
    params = CommonParams()
    params.model.path, params.n_ctx, params.port, params.verbosity, params.ui = str(file), 4096, 0, -1, False
    server = Server(params)
    fields = {"n_predict": REPLY_TOKENS, "temperature": 0, "repeat_penalty": 1.0, "stop": stops}

    def answer(conversations: Sequence[list[Message]]) -> list[str]:
        replies = []
        for messages in conversations:
            body = fields | {"prompt": pieces.render(build_messages(messages[-1]["content"], system=system))}
            said = httpx2.post(f"{server.listening_address}/completion", json=body, timeout=600)
            replies.append(said.raise_for_status().json()["content"])
        return replies

    return answer


def measured(answer: Answer, model, course: Course, only: Sequence[str]) -> dict:
    """Right replies and their number of each kind of question, the replies, and the perplexity; `model` has the weights
    that answer."""
    found = examine(answer, course.persona, only)
    counts = {kind: [each.right(each.reply) for each in found if each.kind == kind] for kind in only}
    tokenizer, text = AutoTokenizer.from_pretrained(course.merged), questions()[course.persona.language]["fluency"]
    return {kind: [sum(right), len(right)] for kind, right in counts.items()} | {
        "perplexity": perplexity(model.eval(), tokenizer, text),
        "replies": {kind: [each.reply.strip().rstrip("…") for each in found if each.kind == kind] for kind in only},
    }


def told(kind: str, found: dict, only: Sequence[str]) -> None:
    """Print it as a line."""
    counts = ", ".join("{} {}/{}".format(each, *found[each]) for each in only)
    made = ""
    if "bytes" in found:
        made = f", {found['same']} of the trained in the same words, {found['bytes'] / 1e6:.0f} MB"
        made += f", exported with {found['cpu_seconds']:.0f} s of CPU"
    print(f"{kind:16} {counts}, perplexity {found['perplexity']:.1f}{made}", flush=True)


def reaches(kind: str, found: dict) -> str:
    """Whether it reaches the goal."""
    lost, leaked = (asked - right for right, asked in (found.get("trained", (0, 0)), found.get("near", (0, 0))))
    allowed = ALLOWED.get(kind.split(":")[1], 0)
    reached = lost <= allowed and (leaked == 0 or allowed)
    return f"{kind:16} {lost} lost of {allowed} at most, {leaked} leaked: goal {'reached' if reached else 'missed'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=EVERY, help="TO:KIND")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--json")
    args = parser.parse_args()
    share_cores()
    course, ours = resume("adapter", "merged"), gguf._q4_0
    print(course.profile.name)
    merged, tokenizer = load_trained(course.merged)
    before = measured(find_answer(str(course.merged)), merged, course, args.only)
    del merged
    told("merged", before, args.only)
    results = {"model": course.profile.name, **about("torch", "transformers", "gguf", "xllamacpp")}
    results |= {"merged": before, "kinds": {}}
    for kind in args.kinds:
        to, bits = kind.split(":")[:2]
        gguf._q4_0 = (lambda numbers: quantize(numbers, gguf.MATRIX_TYPES["q4_0"])) if kind == PLAIN else ours
        with tempfile.TemporaryDirectory() as folder:
            made, cpu = Path(folder) / "made", sum(os.times()[:4])
            if to == "lora":
                export_model(course.adapter, to, output=made)
            else:
                export_model(course.merged, to, bits, made)
            cpu = sum(os.times()[:4]) - cpu
            (file,) = made.glob("*.safetensors" if to == "lora" else "*.gguf")
            if to == "lora":
                answer, model = find_answer(str(made)), load_trained(made)[0]
            else:
                answer = as_ollama(made, tokenizer) if to == "ollama" else find_answer(str(file))
                model = AutoModelForCausalLM.from_pretrained(made, gguf_file=file.name)
            found = measured(answer, model, course, args.only)
            size = file.stat().st_size
            del answer, model
        pairs = zip(found["replies"].get("trained", []), before["replies"].get("trained", []))
        found |= {"same": sum(one == other for one, other in pairs), "bytes": size, "cpu_seconds": cpu}
        told(kind, found, args.only)
        results["kinds"][kind] = found
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(*(reaches(kind, found) for kind, found in results["kinds"].items() if kind != PLAIN), sep="\n")


if __name__ == "__main__":
    main()
