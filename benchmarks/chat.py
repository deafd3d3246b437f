"""Time to first token as a conversation grows, the cost of `%%chat` over `generate`, how fast Stop stops.

    python benchmarks/chat.py [MODEL_FOLDER] [--json FILE]

Runs in a Jupyter kernel, where printing a token is not free. The default is the embedded model.
"""

import argparse
import json
import statistics
import sys

from about import about
from jupyter_client.manager import start_new_kernel

SETUP = """
import time, torch
from types import SimpleNamespace
import chatmagic
from chatmagic import ChatLLM, encode_prompt, load_model
model, tokenizer = load_model({folder!r} or chatmagic.snapshot_download("smollm2-135m"), dtype={dtype!r})
llm = ChatLLM(model, tokenizer, max_new_tokens={tokens})
model.generation_config.eos_token_id = None  # every reply takes all its tokens
llm.backend.template = SimpleNamespace(
    stop_token_ids=lambda tokenizer: [], stop_strings=(), parting=lambda thinking: None
)
question = "Please explain to me in a few words, question number {{}}: what is a conversation?"
shell = get_ipython()

def clock():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()

def timed(run):
    start = clock()
    run()
    return [end - begin for begin, end in zip(start, clock())]

def bare():
    ids = encode_prompt(llm.build_messages(question.format(0)), tokenizer)
    ids = torch.tensor([ids], device=model.device)
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens={tokens})

def magic():
    llm.reset()
    shell.run_cell_magic("chat", "--greedy", question.format(0))
"""

COST = """
bare(), magic()
pairs = [(timed(bare), timed(magic)) for _ in range({repeats})]
print("RESULT", [[pair[who][what] for pair in pairs] for what in (0, 1) for who in (0, 1)])
"""

TURNS = """
llm.reset()
forgetful = ChatLLM(model, tokenizer)
forgetful.backend.template = llm.backend.template
kept, fresh, tokens = [], [], []
for turn in range(10):
    messages = llm.build_messages(question.format(turn), llm.history)
    forgetful.backend.forget()
    fresh.append(forgetful.chat(messages, greedy=True, max_new_tokens=1).stats.seconds_to_first_token)
    reply = llm(question.format(turn), stream=False, greedy=True)
    kept.append(reply.stats.seconds_to_first_token)
    tokens.append(reply.stats.tokens_in)
print("RESULT", [tokens, kept, fresh])
"""

STOP = """
import os, signal
def stop(query, delay):
    at = time.perf_counter() + delay
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, delay)
    try:
        llm(query, stream=False, greedy=True, max_new_tokens=2000, remember=False)
    except KeyboardInterrupt:
        return time.perf_counter() - at
long = "a long prompt " * (llm.backend.context // 8)
print("RESULT", [[stop("hello", 1 + n / 7) for n in range(7)], [stop(long, 0.2 + n / 7) for n in range(7)]])
"""


def run(client, code: str):
    """Execute `code` in the kernel; what it prints after RESULT."""
    printed = []

    def hook(message):
        if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
            printed.append(message["content"]["text"])

    reply = client.execute_interactive(code, output_hook=hook, timeout=600)["content"]
    if reply["status"] != "ok":
        sys.exit("\n".join(reply["traceback"]))
    text = "".join(printed)
    return json.loads(text.partition("RESULT ")[2]) if "RESULT " in text else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json")
    args = parser.parse_args()
    manager, client = start_new_kernel()
    try:
        run(client, SETUP.format(folder=args.folder, dtype=args.dtype, tokens=args.tokens))
        wall_bare, wall_magic, cpu_bare, cpu_magic = run(client, COST.format(repeats=args.repeats))
        tokens, kept, fresh = run(client, TURNS)
        stop_decode, stop_prefill = run(client, STOP)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    print(f"{'turn':>5}{'prompt tokens':>15}{'first token, kept':>20}{'first token, not kept':>24}")
    for turn in (1, 5, 10):
        print(f"{turn:>5}{tokens[turn - 1]:>15}{kept[turn - 1]:>18.3f} s{fresh[turn - 1]:>22.3f} s")
    print(f"\n{args.tokens} tokens, median of {args.repeats}{'wall':>12}{'CPU time':>12}")
    rows = {"bare generate": (wall_bare, cpu_bare), "%%chat": (wall_magic, cpu_magic)}
    for name, times in rows.items():
        print(f"{name:>26}" + "".join(f"{statistics.median(each):>10.3f} s" for each in times))
    costs = [
        statistics.median(b / a for a, b in zip(*pair)) - 1 for pair in ((wall_bare, wall_magic), (cpu_bare, cpu_magic))
    ]
    print(f"{'own cost':>26}" + "".join(f"{cost:>11.1%} " for cost in costs))
    print(f"\nstopped within {max(stop_decode):.3f} s while decoding, {max(stop_prefill):.3f} s in a prompt")
    if args.json:
        result = {
            "prompt_tokens": tokens,
            "first_token_kept_s": kept,
            "first_token_not_kept_s": fresh,
            "bare_generate_s": wall_bare,
            "chat_s": wall_magic,
            "own_cost": dict(zip(("wall", "cpu"), costs)),
            "stop_while_decoding_s": stop_decode,
            "stop_in_a_prompt_s": stop_prefill,
            **about("torch", "transformers", "ipykernel"),
        }
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
