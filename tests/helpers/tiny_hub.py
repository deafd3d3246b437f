"""A tiny model as a hub has it, with what the course does not read; and `chatmagic download` as a process that can be
killed, against `hub.proxied`."""

import json
import os
import random
import signal
import struct
import subprocess
import sys
from pathlib import Path

from hub import Hubs, Repository, environment, proxied, seeded

ID = "org/tiny-model"
ROOT = Path(__file__).resolve().parents[2]


def safetensors(seed: int, size: int) -> bytes:
    """A file of one tensor of random bytes."""
    header = json.dumps({"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + random.Random(seed).randbytes(size)


def model(seed: int = 0, size: int = 300_000) -> dict[str, bytes]:
    """{file: content} of two shards, and of what stays on the hub."""
    shards = {f"model-0000{number}-of-00002.safetensors": safetensors(seed + number, size) for number in (1, 2)}
    index = {"weight_map": {name: name for name in ()} | {f"weight{at}": name for at, name in enumerate(shards)}}
    read = shards | {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "config.json": json.dumps({"model_type": "llama", "seed": seed}).encode(),
        "tokenizer.json": b"{}" + b" " * 2000,
        "tokenizer_config.json": b"{}",
    }
    return read | LEFT


LEFT = {
    "modeling_tiny.py": b"raise SystemExit('run')",
    "pytorch_model.bin": b"PK" + b"\0" * 50_000,
    "pytorch_model.bin.index.json": b"{}",
    "README.md": b"# tiny",
    "consolidated.00.pth": b"\0" * 50_000,
    "onnx/model.onnx": b"\0" * 50_000,
}


def read(files: dict[str, bytes]) -> dict[str, bytes]:
    """Those that are to be here after a download."""
    return {name: content for name, content in files.items() if name not in LEFT}


def here(folder: Path) -> dict[str, bytes]:
    """What lies there, without the manifest."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".complete"}


def download(proxy: str, home: Path, *arguments: str, **more: str) -> subprocess.Popen:
    """`chatmagic download`, running."""
    command = [sys.executable, "-m", "chatmagic.cli", "download", *arguments]
    kept = {name: value for name, value in os.environ.items() if name.lower() not in ("all_proxy", "no_proxy")}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=kept | environment(proxy, str(home)) | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def schedule(seed: int, home: Path) -> str:
    """Download the model through what befalls it by chance, killed now and then and started again; what came of it:
    "whole" or "refused". Raises AssertionError where it is neither."""
    chance = random.Random(seed)
    files = model(seed)
    hubs = Hubs({ID: Repository({"master": files}, {"main": files})})
    source = chance.choice(("auto", "auto", "modelscope", "huggingface"))
    with proxied(hubs, seeded(chance, chance.choice((0.1, 0.3, 0.6)))) as proxy:
        for kills in range(chance.choice((1, 2, 4)), -1, -1):
            process = download(proxy, home, ID, "--source", source)
            try:
                out, err = process.communicate(timeout=chance.uniform(0.7, 4) if kills else 120)
            except subprocess.TimeoutExpired:
                assert kills, "it never ends"
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                continue
            if process.returncode == 0:
                break
            assert process.returncode == 1 and "\nchatmagic: " in err and "Traceback" not in err, err
            assert "could not be downloaded" in err and "run this again" in err, err
    folder = home / "org/tiny-model"
    if process.returncode:
        assert not folder.exists(), "what is not whole is not there"
        return "refused"
    assert out.strip() == str(folder) and here(folder) == read(files)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing else is left"
    return "whole"
