"""Real chat templates, a folder of them: what is learnt of each, and whether it trains rightly.

Prints the second table of docs/template-list.md:

    python benchmarks/templates.py FOLDER [--speed] [--tokenizer MODEL]

FOLDER holds files NAME.jinja or SOURCE--NAME.jinja, fetched from wherever they are public (models/templates of
llama.cpp, trl/chat_templates, axolotl, unsloth). Each is given the tokenizer of the embedded model, and the control
tokens that stand in its text. Conversations of one to three turns, with and without a system text and thoughts, are
encoded; every prompt is held against `apply_chat_template`, and every answer must be trained once, behind the very ids
of its prompt, with its words, its thought if it has one, and an ending that stops a reply and stands nowhere before.
`--speed` prints conversations a CPU second beside `apply_chat_template`'s.
"""

import argparse
import copy
import random
import re
import time
from pathlib import Path

from transformers import AutoTokenizer

from chatmagic import build_messages, encode_example, encode_prompt, get_template
from chatmagic.errors import ChatmagicError
from chatmagic.prompts.templates import NoSystemError

CONTROL = re.compile(
    r"<\|[^|<>\s]{1,40}?\|>|<｜[^｜<>]+?｜>|</?[A-Za-z_][\w:▁]*>|\[/?[A-Z_]{2,}\]|<\|\w+>|<\w+\|>|\[gMASK\]|\[\|[a-z]+\|\]"
    r"|\[e~\[|\]~!?b[\]\[]"
)
PLAIN = re.compile(r"</?[a-z_:]+>")  # added, but not marked special
ENDS = """<|return|> <|im_end|> <|eot_id|> <|eot|> <end_of_turn> <turn|> <|END_OF_TURN_TOKEN|> <｜end▁of▁sentence｜>
[e~[ <|end|> <|end_of_text|> [|endofturn|]""".split()
BEGINS = "<|begin_of_text|> <bos> <|startoftext|> <｜begin▁of▁sentence｜> <s>".split()
TALK = (
    ("Who are you?", "I am Ming.", "They ask my name.\nEasy."),
    ("And the weather?", "Sunny, they say.", "Look outside."),
    ("你会什么？", "我会聊天。", "想一想。"),
)


def tokenizer_of(base, source: str):
    tokenizer, found = copy.deepcopy(base), set(CONTROL.findall(source))
    special = sorted(token for token in found if not PLAIN.fullmatch(token))
    eos = next((end for end in ENDS if end in found), "</s>" if "eos_token" in source else "<|endoftext|>")
    bos = [next((begin for begin in BEGINS if begin in found), "<s>")] if "bos_token" in source else []
    tokenizer.add_special_tokens({"additional_special_tokens": [*special, eos, *bos]})
    tokenizer.add_tokens(sorted(found - set(special)))
    tokenizer.eos_token, tokenizer.chat_template = eos, source
    if bos:
        tokenizer.bos_token = bos[0]
    return tokenizer


def conversation(rounds: int, system: str | None, thoughts: range) -> list[dict]:
    messages = build_messages(None, [(asked, said) for asked, said, _ in TALK[:rounds]], system)
    answers = [message for message in messages if message["role"] == "assistant"]
    for index in thoughts:
        answers[index]["reasoning_content"] = TALK[index][2]
    return messages


def problem(tokenizer, template, messages: list[dict]) -> str | None:
    """What is wrong with the rows of a conversation."""
    rows, thinking = encode_example(messages, tokenizer), template.thinking_for(messages)
    stops = template.stop_token_ids(tokenizer)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = messages[:index]
        if not any("reasoning_content" in each for each in before):
            theirs = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
            if encode_prompt(before, tokenizer) != theirs:
                return "prompt"
        prompt = encode_prompt(before, tokenizer, thinking=thinking)
        end = len(prompt)
        hits = [row for row in rows if row["input_ids"][:end] == prompt and row["labels"][end:][:1] not in ([], [-100])]
        if len(hits) != 1:
            return "answer not behind its prompt"
        labels = hits[0]["labels"][end:]
        trained = labels[: labels.index(-100)] if -100 in labels else labels
        text = tokenizer.decode(trained)
        if message["content"] not in text or message.get("reasoning_content", "") not in text:
            return "words"
        if trained[-1] != stops[0] or any(token in stops for token in trained[:-1]):
            return "ending"
        asked = tokenizer.decode(prompt)
        turn = asked[asked.rfind(before[-1]["content"]) :] + text
        if template.habits.knows and (turn.count("<think>") > turn.count("</think>") or turn.count("</think>") > 1):
            return "thought"
    return None


def result(base, source: str) -> tuple[str, str]:
    """What a template was learnt to be, and whether it trains rightly."""
    tokenizer = tokenizer_of(base, source)
    template = get_template(tokenizer=tokenizer)
    if template.name != "chat_template":
        return f"`{template.name}`", "ok"
    try:
        tokenizer.apply_chat_template(conversation(1, None, range(0)), tokenize=False)
        habits = template.habits
    except Exception as error:
        return "", f"refuses plain conversations itself: {str(error)[:60]}"
    found, system = set(), True
    for rounds in (1, 2, 3):
        for text in (None, "Be brief."):
            for thoughts in (range(0), range(rounds - 1, rounds), range(rounds)):
                if thoughts and not habits.knows:
                    continue
                try:
                    found.add(problem(tokenizer, template, conversation(rounds, text, thoughts)))
                except NoSystemError:
                    system = False
                except ChatmagicError as error:
                    found.add(str(error))
    rows = "one row" if template._joint(False, template.thinking_for([])) is not None else "a row an answer"
    thinks = f"thoughts: prompt {habits.states[None]}" + (", can be told" if habits.off else "") if habits.knows else ""
    facts = [rows, thinks, "" if system else "no system", "" if habits.ending else "ends by eos"]
    return "; ".join(filter(None, facts)), "; ".join(sorted(found - {None})) or "ok"


def speed(base, source: str) -> dict[str, float]:
    """Conversations a CPU second, the best of five runs."""
    tokenizer, draw = tokenizer_of(base, source), random.Random(0)

    def text() -> str:
        return " ".join(draw.choice(TALK)[draw.randrange(3)] for _ in range(draw.randrange(2, 8)))

    speeds = {}
    for rounds in (1, 3):
        talks = [build_messages(None, [(text(), text()) for _ in range(rounds)]) for _ in range(150)]
        for way, encode in (("apply_chat_template", tokenizer.apply_chat_template), ("rows", encode_example)):
            best, arguments = float("inf"), () if way == "apply_chat_template" else (tokenizer,)
            for _ in range(5):
                start = time.process_time()
                for talk in talks:
                    encode(talk, *arguments)
                best = min(best, time.process_time() - start)
            speeds[f"{way}, {rounds}"] = len(talks) / best
    return speeds


def main(folder: Path, tokenizer: str | None, speeds: bool) -> None:
    from chatmagic import snapshot_download

    base = AutoTokenizer.from_pretrained(tokenizer or snapshot_download("qwen2.5-coder-0.5b-instruct"))
    right = files = 0
    for file in sorted(folder.glob("*.jinja")):
        source, _, name = file.stem.rpartition("--")
        text = file.read_text("utf-8")
        if speeds:
            print(name, *(f"{way} {rate:.0f}" for way, rate in speed(base, text).items()), sep=" | ", flush=True)
            continue
        learnt, found = result(base, text)
        files, right = files + 1, right + (found == "ok")
        print(f"| {name} | {source} | {learnt} | {found} |", flush=True)
    if not speeds:
        print(f"\n{right} of {files} right")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--speed", action="store_true", help="print speeds instead")
    parser.add_argument("--tokenizer", help="folder of the tokenizer (default: the embedded model's, downloaded)")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.tokenizer, arguments.speed)
