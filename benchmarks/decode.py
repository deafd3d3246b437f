"""Decoding at batch 1, one token after another: ChatLLM beside plain `generate`, in the same process.

    python benchmarks/decode.py [--model PROFILE] [--tokens N] [--json FILE]

On a GPU a Llama of Baichuan2-7B's shape with random weights, in bfloat16 and then in NF4; with --model a real one, as
it is and then in NF4. It is asked in Chinese for a long text. Reference and ours take turns; both include the prompt.
"First" is the reference's first reply, where cuDNN plans its attention for every new length. "Ready" is the time from
the first question, to a ChatLLM just made, until its second token, before which the capture lies. "Equal" counts
tokens in a row that are those of plain `generate`, "plainly" the same with ChatLLM(fast=False), which captures
nothing: with the same kernels of attention; "to cuDNN" with cuDNN's, whose sums round otherwise in 16 bits.

Expected before it ran on one H100: the limit of memory, 14.5 GB of weights at 3.0 TB/s, is 4.9 ms a token in
bfloat16; some 35 small kernels a layer take 2 ms more whoever launches them; 32 times a few launches for attention
(about 60 us in Python) hide behind those. So 7 ms a token, 140 tokens/s, four times plain `generate`. NF4: 3.9 GB,
in kernels that reach half of the bandwidth, is 2.6 ms, and the same 2 ms: Python's 2 ms begin to show, about 180
tokens/s. Eight such layers then took 0.29 ms each where 0.22 were expected, 0.10 of them in Python. The kernels of
kernels.py, 19 fewer a layer at some 1.3 us and a gap each, were expected to spare 1.2 ms a token, and spared 1.3.
"""

import argparse
import json
import os
import signal
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from about import about
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chatmagic import ChatLLM, build_messages, encode_prompt, load_model, snapshot_download
from chatmagic.accel.attention import without_cudnn_attention
from chatmagic.conversation.llm import Interrupted

QUESTION = "请写一篇长文章，从头讲起：什么是语言模型，它怎么训练出来，可以用来做什么，有哪些做不到的事。"
SHAPES = {  # vocabulary, hidden, intermediate, layers, heads
    "Baichuan2-7B": (125696, 4096, 11008, 32, 32),
    "tiny": (2048, 128, 256, 2, 4),
}


def random_model(shape: str):
    """A model of this shape with random bfloat16 weights, made where it stays, and a tokenizer of bytes."""
    vocabulary, hidden, intermediate, layers, heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: index for index, word in enumerate([*bytes_, *map(str, range(10, vocabulary - 247)), "</s>"])}
    backend = Tokenizer(BPE(words, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}assistant:"
    return model, PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=template)


def to_nf4(model) -> None:
    """Quantise every linear layer but the head in place, as `load_model(path, quantize="nf4")` would."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is torch.nn.Linear and name != "lm_head":
                size = layer.in_features, layer.out_features
                new = Linear4bit(*size, bias=False, compute_dtype=torch.bfloat16, device="meta")
                new.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4").to(
                    layer.weight.device
                )
                setattr(parent, name, new.eval())


def measure(model, tokenizer, tokens: int, repeats: int) -> dict:
    """Seconds of plain `generate` and of ours for `tokens` tokens, and whether they are the same tokens."""
    model.generation_config.eos_token_id = None  # every reply takes all its tokens
    ids = torch.tensor([encode_prompt(build_messages(QUESTION), tokenizer)], device=model.device)

    def plain():
        with torch.no_grad():
            options = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": 0}
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()

    def timed(run):
        start = time.perf_counter()
        result = run()
        return time.perf_counter() - start, result

    first_plain_s, _ = timed(plain)
    llm = ChatLLM(model, tokenizer, max_new_tokens=tokens)
    ours, arrivals = noted(llm)
    start = time.perf_counter()
    ours()
    ready = arrivals[1][0] - start
    seconds, said = {plain: [], ours: []}, {}
    for turn in range(repeats):
        for run in (plain, ours) if turn % 2 == 0 else (ours, plain):
            took, said[run] = timed(run)
            seconds[run].append(took)
    with without_cudnn_attention():
        expected = plain()
        plainly = noted(ChatLLM(model, tokenizer, max_new_tokens=tokens, fast=False))[0]()
    return {
        "tokens": tokens,
        "first_plain_s": first_plain_s,
        "plain_s": seconds[plain],
        "ours_s": seconds[ours],
        "ratio": statistics.median(a / b for a, b in zip(seconds[plain], seconds[ours])),
        "ready_s": ready,
        "tokens_equal": equal_in_a_row(expected, said[ours]),
        "tokens_equal_plainly": equal_in_a_row(expected, plainly),
        "tokens_equal_to_cudnn": equal_in_a_row(said[plain], said[ours]),
        "without_graphs_because": llm.backend.no_graph,
        "stop_s": [stop(llm, 0.4 + 0.013 * n) for n in range(5)],
    }


def noted(llm: ChatLLM):
    """A function that returns the tokens of a greedy reply of full length, and a list of when each came."""
    backend, arrivals = llm.backend, []
    backend.template = SimpleNamespace(
        stop_token_ids=lambda tokenizer: [], stop_strings=[], parting=lambda thinking: None
    )
    in_order = backend._tokens

    def note(*args):
        for token in in_order(*args):
            arrivals.append((time.perf_counter(), token))
            yield token

    def run() -> list[int]:
        arrivals.clear()
        backend._kept_ids = []  # the prompt is run each time, as `generate` does
        llm.chat(build_messages(QUESTION), greedy=True)
        return [token for _, token in arrivals]

    backend._tokens = note
    return run, arrivals


def equal_in_a_row(expected: list[int], said: list[int]) -> int:
    return next((n for n, (a, b) in enumerate(zip(expected, said)) if a != b), len(expected))


def stop(llm: ChatLLM, delay: float) -> float:
    """How long a reply goes on after the interrupt that a notebook's Stop sends."""
    at = time.perf_counter() + delay
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, delay)
    try:
        llm.chat(build_messages(QUESTION), greedy=True, max_new_tokens=2000)
    except Interrupted:
        return time.perf_counter() - at
    raise RuntimeError("the reply ended before it was stopped")


def models(real: str | None, shape: str):
    """(name, model, tokenizer), one after another: the second is the first, quantised."""
    if real and torch.cuda.is_available():
        yield "16 bit", *load_model(snapshot_download(real))
        yield "nf4", *load_model(snapshot_download(real), "nf4")
    elif real:
        yield "float32", *load_model(snapshot_download(real), dtype="float32")
    else:
        model, tokenizer = random_model(shape)
        yield "bfloat16", model, tokenizer
        to_nf4(model)
        yield "nf4", model, tokenizer


def bandwidth() -> float:
    """Bytes a second of a large copy on the GPU, read and written counted."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target, start, end = torch.empty_like(source), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    target.copy_(source)
    start.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    return 2 * 10 * source.numel() / (start.elapsed_time(end) / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--shape", choices=SHAPES, default="Baichuan2-7B")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    result = {
        "model": args.model or f"{args.shape}, random",
        "threads": torch.get_num_threads(),
        **about("torch", "transformers", "bitsandbytes"),
        "rows": {},
    }
    print(f"{'tokens/s':>10}{'limit':>8}{'first generate':>16}{'generate':>10}{'ours':>8}{'ratio':>7}", end="")
    print(f"{'ready':>9}{'equal':>12}{'plainly':>9}{'to cuDNN':>10}{'stop':>9}")
    for name, model, tokenizer in models(args.model, args.shape):
        result["rows"][name] = row = measure(model, tokenizer, args.tokens, args.repeats)
        read = sum(p.numel() * p.element_size() for p in model.parameters())
        if not model.config.tie_word_embeddings:
            read -= model.get_input_embeddings().weight.nbytes
        limit = bandwidth() / read if gpu else None
        row["limit_tokens_per_s"] = limit
        seconds = row["first_plain_s"], statistics.median(row["plain_s"]), statistics.median(row["ours_s"])
        first, plain, ours = (args.tokens / each for each in seconds)
        print(
            f"{name:>10}{limit and round(limit) or '':>8}{first:>16.1f}{plain:>10.1f}{ours:>8.1f}{row['ratio']:>7.2f}"
            f"{row['ready_s']:>7.2f} s{row['tokens_equal']:>5} of {args.tokens}"
            f"{row['tokens_equal_plainly']:>9}{row['tokens_equal_to_cudnn']:>10}"
            f"{max(row['stop_s']):>7.3f} s",
            flush=True,
        )
        if row["without_graphs_because"]:
            print(f"{'':>10}without CUDA graphs: {row['without_graphs_because']}")
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
