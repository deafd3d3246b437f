"""No notebook, output, log, manifest or checkpoint holds a key, a token or the path of somebody's home."""

import json
import re
from pathlib import Path

import pytest

from chatmagic import adalora_to_lora, merge_adapter
from disk import contents
from hub import HUGGINGFACE, MODELSCOPE, Hubs, Repository, proxied
from quick import first
from tiny_hub import ID, download, model
from tiny_runs import adalora, fit, tiny_llama
from writers import WRITERS

ROOT = Path(__file__).resolve().parents[1]
SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bms-[0-9a-f]{8}-[0-9a-f-]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}"
    r"|://[^/\s:@\"'<>{}]+:[^/\s@\"'<>{}]+@"
    r"|/(?:home/(?!USER\b|ubuntu\b)\w+/|Users/\w+/|root/(?!autodl)[\w.])|[A-Z]:\\\\Users\\\\\w+"
)
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
KEYS = {name: f"hf_{'K3y' * 9}" for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN", "OPENAI_API_KEY")}


def strings(value) -> list[str]:
    """Every text in what JSON holds, decoded."""
    if isinstance(value, dict):
        return [text for each in (*value.keys(), *value.values()) for text in strings(each)]
    if isinstance(value, list):
        joined = ["".join(value)] if value and all(isinstance(each, str) for each in value) else []
        return joined + [text for each in value for text in strings(each)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize(
    "text, found",
    [
        ("hf_" + "a" * 34, True),
        ("sk-" + "a1" * 20, True),
        ("http://me:secret@proxy:3128", True),
        ("/" + "home/someone/models", True),
        ("/" + "Users/someone/models", True),
        ("/" + "root/.cache/chatmagic", True),
        ("/" + "root/autodl-tmp", False),
        ("~/.cache/chatmagic", False),
        ("https://huggingface.co/a@b", False),
    ],
)
def test_what_counts_as_one(text, found):
    assert bool(SECRET.search(text)) == found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_notebooks(path):
    assert [found[0] for text in strings(json.loads(path.read_text("utf-8"))) if (found := SECRET.search(text))] == []


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results").glob("*.json")), ids=lambda path: path.name)
def test_results(path):
    assert [found[0] for text in strings(json.loads(path.read_text("utf-8"))) if (found := SECRET.search(text))] == []


@pytest.mark.parametrize("name", WRITERS)
def test_what_the_package_writes(name, tmp_path, monkeypatch):
    """Each writer's files, with keys in the environment."""
    for variable, key in KEYS.items():
        monkeypatch.setenv(variable, key)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("source", "made"):
        (tmp_path / folder).mkdir()
    WRITERS[name](tmp_path / "source", monkeypatch)(tmp_path / "made", 1)
    assert (files := contents(tmp_path / "made"))
    for path, content in files.items():
        assert KEYS["HF_TOKEN"].encode() not in content, path
        assert str(tmp_path).encode() not in content, path


def test_a_run_and_what_is_made_of_it(tmp_path, monkeypatch):
    """From a model in the folder of models, whose place there is all that is noted of it."""
    monkeypatch.setenv("CHATMAGIC_HOME", str(tmp_path / "models"))
    base, made = tmp_path / "models" / "tiny", tmp_path / "made"
    tiny_llama().save_pretrained(base)
    fit(adalora(12, base=type(tiny_llama()).from_pretrained(base)), made / "adapter", epochs=3)
    merge_adapter(base, made / "adapter", made / "merged")
    adalora_to_lora(made / "adapter", made / "lora")
    files = contents(made)
    expected = {"state.pt", "run.json", "history.csv", "chatmagic.json", "config.json"}
    assert expected <= {Path(path).name for path in files}
    assert [path for path, content in files.items() if str(tmp_path).encode() in content] == []
    assert json.loads((made / "adapter" / "run.json").read_text())["model"]["name"] == "tiny"
    for folder in (made / "adapter", made / "lora", next(made.glob("adapter/last-*"))):
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"


@pytest.mark.parametrize("source", first(1, ["huggingface", "modelscope"]))
def test_a_download_neither_notes_nor_prints_one(tmp_path, source):
    files = model(1, 3000)
    hubs = Hubs({ID: Repository({"master": files}, {"main": files})})
    with proxied(hubs) as proxy:
        process = download(proxy.replace("//", "//me:secret@"), tmp_path, ID, "--source", source, **KEYS)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    kept = b"".join(path.read_bytes() for path in (tmp_path / ID).iterdir()).decode(errors="replace")
    for text in (err, kept):
        assert KEYS["HF_TOKEN"] not in text and "secret" not in text and str(tmp_path) not in text


@pytest.mark.parametrize("how", first(1, ["unreachable", "503 for all"]))
def test_nor_does_one_that_fails(tmp_path, how):
    """Where the hubs' addresses hold a password of their own."""
    addresses = {
        "MODELSCOPE_ENDPOINT": MODELSCOPE.replace("//", "//me:secret@"),
        "HF_ENDPOINT": HUGGINGFACE.replace("//", "//me:secret@"),
    }
    with proxied(Hubs({}), lambda url: how) as proxy:
        if how == "unreachable":
            proxy = "http://127.0.0.1:9"
        process = download(proxy.replace("//", "//me:secret@"), tmp_path, ID, **KEYS, **addresses)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "modelscope says: " in err and "huggingface says: " in err
    assert KEYS["HF_TOKEN"] not in err and "secret" not in err
