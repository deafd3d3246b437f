"""`chatmagic serve`: tokens a second for one asker beside `llm()`, and 500 askers of whom many leave.

    python benchmarks/serve.py [MODEL_FOLDER] [--askers 500] [--json FILE]

The server is a process of its own. Replies are greedy, and each must be what `llm.chat` says to the same messages. The
default is the embedded model of the tests.
"""

import argparse
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx2
import psutil
from about import about

import chatmagic
from chatmagic import ChatLLM, build_messages, connect, load_model
from chatmagic.machine import share_cores

QUESTION = "Please explain to me in a few words, question number {}: what is a conversation?"
TOKENS, SHORT = 48, 4


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def speed(llm, served, server, repeats):
    """Pairs, of `llm()` and served: tokens a second from question to the end of the reply, and the CPU seconds that it
    took, of the server too, which do not depend on what else this machine has to do."""
    rates, costs, here = [], [], psutil.Process()
    for number in range(-1, repeats):
        rate, cost = [], []
        for asked in (llm, served):
            before = sum(sum(each.cpu_times()[:2]) for each in (here, server))
            reply = asked(QUESTION.format(number), remember=False, greedy=True, max_new_tokens=TOKENS)
            cost.append(sum(sum(each.cpu_times()[:2]) for each in (here, server)) - before)
            rate.append(reply.stats.tokens_out / reply.stats.seconds)
        if number >= 0:  # the first warms both up
            rates.append(rate)
            costs.append(cost)
    return rates, costs


def between(pairs):
    """The medians of both, and that of their ratios."""
    return *map(statistics.median, zip(*pairs)), statistics.median(theirs / ours for ours, theirs in pairs)


def stay(url, name, messages, stream):
    """The whole reply, asked again for as long as the line is too long."""
    body = {"model": name, "messages": messages, "temperature": 0, "max_tokens": SHORT, "stream": stream}
    while (answer := httpx2.post(f"{url}/chat/completions", json=body, timeout=600)).status_code == 429:
        time.sleep(float(answer.headers["retry-after"]) * random.random())
    answer.raise_for_status()
    if not stream:
        return answer.json()["choices"][0]["message"]["content"]
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events)


def leave(url, name, messages, stream, seconds):
    """Hang up after so long."""
    body = {"model": name, "messages": messages, "temperature": 0, "max_tokens": 400, "stream": stream}
    body = json.dumps(body).encode()
    host, port = url.split("/")[2].split(":")
    with socket.create_connection((host, int(port))) as asker:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        asker.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(seconds)


def crowd(url, llm, server, askers, seed=0):
    """How each asker fared, and the server's memory in MiB after every hundred."""
    rng, fared, memory = random.Random(seed), Counter(), []
    asked = [build_messages(QUESTION.format(n), [("Hi", f"Hello {n}")] * (n % 3)) for n in range(10)]
    expected = [llm.chat(messages, greedy=True, max_new_tokens=SHORT) for messages in asked]

    def ask(number, leaves, stream, seconds):
        if leaves:
            leave(url, llm.name, asked[number], stream, seconds)
            return "left"
        return "answered" if stay(url, llm.name, asked[number], stream) == expected[number] else "answered wrongly"

    with ThreadPoolExecutor(16) as pool:
        for begun in range(0, askers, 100):
            drawn = [
                (rng.randrange(10), rng.random() < 0.5, rng.random() < 0.5, 2 * rng.random())
                for _ in range(min(100, askers - begun))
            ]
            for each in [pool.submit(ask, *one) for one in drawn]:
                try:
                    fared[each.result()] += 1
                except (httpx2.HTTPError, OSError, ValueError, LookupError) as error:
                    fared[f"failed: {error}"] += 1
            memory.append(server.memory_info().rss / 2**20)
    return dict(fared), memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--askers", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json")
    args = parser.parse_args()
    share_cores()  # as the command does
    folder, port = args.folder or chatmagic.snapshot_download("smollm2-135m"), free_port()
    llm = ChatLLM(*load_model(folder), stream=False)
    command = [sys.executable, "-m", "chatmagic.cli", "serve", str(folder), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            while "answers as" not in (line := process.stdout.readline()):
                if not line:
                    sys.exit("the server ended")
            url = f"http://127.0.0.1:{port}/v1"
            server = psutil.Process(process.pid)
            rates, costs = speed(llm, connect(url, llm.name, stream=False), server, args.repeats)
            fared, memory = crowd(url, llm, server, args.askers)
            waiting = httpx2.get(f"http://127.0.0.1:{port}/health").json()["waiting"]
        finally:
            process.terminate()
    print(f"{llm.name}, {TOKENS} tokens, median of {len(rates)}, llm() and served:")
    print("  tokens/s    {:.1f}, {:.1f}; {:.3f}".format(*between(rates)))
    print("  CPU seconds {:.2f}, {:.2f}; {:.3f}".format(*between(costs)))
    told = ", ".join(f"{count} {how}" for how, count in fared.items())
    print(f"{args.askers} askers: {told}; {waiting} in line")
    print("the server's memory after every hundred, MiB: " + ", ".join(f"{each:.0f}" for each in memory))
    if args.json:
        result = {
            "tokens_per_second": rates,
            "cpu_seconds": costs,
            "askers": fared,
            "memory_mib": memory,
            **about("torch", "transformers", "fastapi", "uvicorn"),
        }
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
