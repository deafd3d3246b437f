"""Every writer of the package, each small and quick, for the tests that let the disk fail under them.

A writer is a function of a folder for its inputs; it returns a function that writes something else for each version
below a folder that it is given. What `covers` names are the modules that write: tests/test_files.py knows if one of
them is not here.
"""

import io
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch

import published
from chatmagic import ChatLLM, adalora_to_lora, build_messages, load_model, merge_adapter, write_jsonl
from chatmagic.course import Persona, classroom, converter, download, evaluate, export, hubs, own, replies, thread
from chatmagic.course.profile import get_profile
from chatmagic.files import write
from chatmagic.notebook import keeping
from chatmagic.training import plots, record, states
from fake_model import FakeModel
from tiny_gguf import tiny_gguf
from tiny_hub import safetensors
from tiny_runs import adalora, tiny_llama

Act = Callable[[Path, int], object]
WRITERS: dict[str, Callable[[Path, pytest.MonkeyPatch], Act]] = {}
COVERED: set[str] = set()
NEW = set()  # those that make what must not be there yet
PROFILE = get_profile("qwen2.5-coder-0.5b-instruct")


def writer(*covers: str, new: bool = False):
    def added(make):
        WRITERS[make.__name__] = make
        COVERED.update(covers)
        NEW.update([make.__name__] * new)
        return make

    return added


def talk(version: int) -> list[dict]:
    return build_messages(None, [("你好", "answer " * 3000)] * version)


@writer("data/dataset.py")
def conversations(source, monkeypatch):
    return lambda where, version: write_jsonl([talk(version)], where / "train.jsonl")


@writer("conversation/llm.py")
def history(source, monkeypatch):
    rounds = [("q", "answer " * 3000)]
    return lambda where, version: ChatLLM(FakeModel(), history=rounds * version).save(where / "chat.jsonl")


@writer("notebook/keeping.py")
def markdown(source, monkeypatch):
    rounds = [("q", "answer " * 3000)]
    return lambda where, version: keeping.export_markdown(
        ChatLLM(FakeModel(), history=rounds * version), where / "chat.md"
    )


@writer("course/thread.py")
def course(source, monkeypatch):
    def act(where, version):
        monkeypatch.setenv("CHATMAGIC_COURSE", str(where))
        started = thread.Course(PROFILE, Persona(name="星" * 10)).remember()
        started.save_json("before.json", {"who": "answer " * 3000 * version})
        started.save_data(train=[talk(version)], val=[talk(version)])

    return act


@writer("course/own.py")
def own_data(source, monkeypatch):
    """The file that `make_own_data` reads is as the reader left it, and what it makes of it is the course's."""

    def act(where, version):
        monkeypatch.setenv("CHATMAGIC_COURSE", str(where))
        file = source / "mine.jsonl"
        write_jsonl([talk(1)] * 10 * version, file)
        os.utime(file, (version, version))
        course = thread.Course(PROFILE, Persona()).learning(file, mix="nothing")
        own.make_own_data(course, lambda: [])

    return act


@writer("course/replies.py")
def own_replies(source, monkeypatch):
    (source / "config.json").write_text("{}")
    model = SimpleNamespace(name_or_path=str(source))
    monkeypatch.setattr(replies, "base_fingerprint", lambda folder: "0" * 12)

    def act(where, version):
        monkeypatch.setenv("CHATMAGIC_COURSE", str(where))
        asked = [f"question {number}?" for number in range(3 * version)]
        monkeypatch.setattr(
            replies, "questions", lambda: dict.fromkeys(("zh", "en"), {"replay": asked, "near_replay": []})
        )
        monkeypatch.setattr(replies, "BATCH", 99)
        monkeypatch.setattr(replies, "ask", lambda model, tokenizer, asked, tokens: ["yes " * 2000] * len(asked))
        replies.own_replies(model, None)

    return act


@writer("course/evaluate.py")
def evaluation(source, monkeypatch):
    """What `evaluate_course` leaves, by `Course.save_json`."""
    assert evaluate.Course.save_json is thread.Course.save_json

    def act(where, version):
        monkeypatch.setenv("CHATMAGIC_COURSE", str(where))
        thread.Course(PROFILE, Persona()).remember().save_json("evaluation.json", ["reply" * 2000] * version)

    return act


@writer("course/download.py", "models/checkpoint.py", "models/unpack.py", "models/shard.py", new=True)
def embedded_model(source, monkeypatch):
    tiny_gguf(source / "tiny.gguf", tied=False)
    profile = replace(PROFILE, packed=200_000, bytes=300_000)

    def act(where, version):
        def fetched(profile, staging):
            return {"pypi": lambda: ("pypi", Path(shutil.copyfile(source / "tiny.gguf", staging / "tiny.gguf")))}

        monkeypatch.setattr(download, "_gguf_sources", fetched)
        monkeypatch.setattr(download, "_check_room", lambda *_: None)
        monkeypatch.setattr(download, "find", lambda *_: download.Wanted(profile, "", "", where / "model", None))
        monkeypatch.setattr(download, "check_machine", lambda *_: None)
        download.snapshot_download("model")

    return act


@writer("course/download.py", "course/hubs.py", new=True)
def hub_model(source, monkeypatch):
    """Its files are the hub's client's to write; that they are all there is ours to say."""
    files = {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}" + b" " * 4000,
        "model.safetensors": safetensors(0, 9),
    }
    remotes = {name: hubs.Remote(len(content), "") for name, content in files.items()}
    hub = SimpleNamespace(name="modelscope", default="master", address=lambda: "http://hub.test")
    hub.listing = lambda id, revision: hubs.Listing("", remotes)
    hub.fetch = lambda id, revision, name, remote, folder: write(folder / name, files[name])

    def act(where, version):
        monkeypatch.setattr(download, "answers", lambda address: None)
        monkeypatch.setattr(download, "_check_room", lambda *_: None)
        monkeypatch.setattr(download, "HUBS", (hub,))
        monkeypatch.setattr(download, "_tell", lambda line: None)
        download.snapshot_download("org/name", where)

    return act


@writer(
    "models/merge.py", "models/shard.py", "models/portable.py", "models/families/sentencepiece.py", new=True
)  # fmt: skip
def merged(source, monkeypatch):
    model, _ = load_model(published.write("llama-2-13b-chat", source / "base"))
    states.save_adapter(adalora(base=model), source / "adapter")
    return lambda where, version: merge_adapter(source / "base", source / "adapter", where / "merged")


@writer("models/plain_lora.py", new=True)
def exported(source, monkeypatch):
    states.save_adapter(adalora(base=tiny_llama()), source / "adapter")
    return lambda where, version: adalora_to_lora(source / "adapter", where / "lora")


@writer("course/classroom.py", new=True)
def workshop(source, monkeypatch):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("# long\n" * 3000, id="cell")])
    nbformat.write(notebook, source / "00.ipynb")
    monkeypatch.setattr(classroom, "shipped", lambda name: source)
    return lambda where, version: classroom.workshop(where / "class")


@writer("course/export.py")
def exported_adapter(source, monkeypatch):
    monkeypatch.setattr(export, "write_card", lambda made, to, use: "long\n" * 3000 * act.version)
    made = SimpleNamespace(name="it", base="base", profile=None, folder=source / "adapter")
    monkeypatch.setattr(export, "find_made", lambda folder: made)

    def act(where, version):
        act.version = version
        model = changed(adalora(base=tiny_llama()), version)
        model.active_peft_config.base_model_name_or_path = "base"
        states.save_adapter(model, source / "adapter")
        export.export_model(source / "adapter", "lora", output=where / "lora")

    return act


@writer("course/converter.py")
def unpacked_converter(source, monkeypatch):
    inside = f"{converter.INSIDE}{converter.CONVERTER}"

    def act(where, version):
        monkeypatch.setenv("CHATMAGIC_HOME", str(where))
        monkeypatch.setattr(converter, "RELEASE", str(version))
        monkeypatch.setattr(converter, "home", lambda: where)
        with tarfile.open(source / converter.ARCHIVE, "w:gz") as packed:
            member = tarfile.TarInfo(inside)
            member.size = 9000 * version
            packed.addfile(member, io.BytesIO(b"x" * member.size))
        monkeypatch.setattr(converter, "pip_download", carried)
        converter.find_converter()

    def carried(wheel, digest, staging, source_=None, **_):
        shutil.copy(source / converter.ARCHIVE, staging)

    return act


@writer("training/states.py")
def adapter(source, monkeypatch):
    model = adalora()
    return lambda where, version: states.save_adapter(changed(model, version), where / "adapter")


@writer("training/states.py")
def state(source, monkeypatch):
    model = adalora()

    def act(where, version):
        saved = states.RunState(step=3, params={"factor": torch.full((9999,), float(version))})
        states.save_state(changed(model, version), saved, where / "run")

    return act


def changed(model, version):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(version)
    return model


@writer("training/record.py")
def course_of_a_run(source, monkeypatch):
    return lambda where, version: record.write_history({"epoch": [*range(2000 * version)]}, where)


@writer("training/plots.py")
def pictures(source, monkeypatch):
    monkeypatch.setattr(plots, "plot_ranks", lambda net: figure(net))
    monkeypatch.setattr(plots, "plot_importance", lambda net: figure(net))

    def act(where, version):
        run = {"epoch": range(version), "val_loss": range(version), "train_loss": range(version)}
        model = SimpleNamespace(
            net=version, allocator=SimpleNamespace(log=[0]), ckpt_path=where, history=run, best=None, epochs=9
        )
        model.monitor, model.mode, model.EpochRunner = "val_loss", "min", None
        curve = plots.LiveCurve()
        curve.in_jupyter = False
        curve.on_fit_start(model)
        plots.RankPictures().on_fit_end(model)

    return act


def figure(version):
    made, axes = plots.plt.subplots(figsize=(2 * version, 2))
    plots.plt.close(made)
    return made


@writer("course/running.py")
def executed_notebooks(source, monkeypatch):
    monkeypatch.setattr("nbclient.NotebookClient.execute", lambda self, env: None)
    monkeypatch.setattr("chatmagic.course.running._print_replies", lambda: None)

    def act(where, version):
        code = "# long\n" * 3000 * version
        for number in (0, 1):
            notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code, id="cell")])
            nbformat.write(notebook, source / f"0{number}.ipynb")
        monkeypatch.setattr("chatmagic.course.running.print", lambda *_, **__: None, raising=False)
        from chatmagic.course.running import execute_all

        execute_all(source, where)

    return act
