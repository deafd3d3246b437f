"""`chatmagic export`: what is in the folder, what its card says, and what goes to a hub."""

import json
import re
import shutil
from pathlib import Path
from string import Formatter

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatmagic import build_messages, merge_adapter
from chatmagic.cli import main
from chatmagic.course import converter
from chatmagic.course import export as exporting
from chatmagic.course.card import Made, find_made, words, write_card
from chatmagic.course.check import find_answer
from chatmagic.course.converter import ARCHIVE, find_converter
from chatmagic.course.evaluate import POSITIONS, summary
from chatmagic.course.hubs import HUBS
from chatmagic.course.own import own_summary
from chatmagic.course.persona import LANGUAGES, Persona
from chatmagic.course.profile import profiles
from chatmagic.course.thread import start
from chatmagic.files import FULL, WriteError, make_folder, write
from chatmagic.models.checkpoint import CheckpointError, sha256
from chatmagic.models.gguf import CONVERTER, ExportError
from disk import contents
from over_nf4 import trained_over_nf4
from tiny_gguf import tiny_gguf

CHAT = "qwen-7b-chat"
EVALUATION = {
    "table": {
        when: dict.fromkeys(
            ("zh", "en"),
            {
                "alone": [alone, 9], "after identity": [0, 18], "after general": [0, 9], "heldout": [0, 24],
                "retained": [36, 37], "leaked": [0, 45], "near": [0, 60], "perplexity": 190.26,
            },
        )
        for when, alone in {"before": 0, "after": 9}.items()
    }
}  # fmt: skip
RUN = {
    "started": "2026-11-27T09:09:15+0000",
    "model": {"name": "/somewhere/of/mine/base", "dtype": "bfloat16", "quantization": None},
    "data": {"train": "a705e9dbb1bf29"},
    "settings": {
        "rows": 480, "batch_size": 2, "batches": 30, "epochs": 4, "learning_rate": [0.002],
        "adapter": {"init_r": 12, "target_r": 8, "r": 8},
    },
    "versions": {"chatmagic": "0.1.0"},
}  # fmt: skip

FILES = {"train.jsonl": "0123456789abcdef"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_models):
    """A folder with an adapter and what it was merged into, as a course leaves them."""
    folder = tmp_path_factory.mktemp("trained")
    trained_over_nf4(tiny_models / CHAT, folder / "adapter")
    merge_adapter(tiny_models / CHAT, folder / "adapter", folder / "merged")
    tiny_gguf(folder / "merged" / "made.gguf", tied=False, kind="F16")
    return folder


@pytest.fixture
def course(tmp_path, trained, monkeypatch):
    """A course that has an adapter, a merged model and an evaluation, and a converter that copies a made file."""
    monkeypatch.setenv("CHATMAGIC_HOME", str(tmp_path / "models"))
    course = start(CHAT, name="小炉", english_name="Little Stove", author="张三")
    shutil.copytree(trained, course.folder, dirs_exist_ok=True)
    (course.adapter / "run.json").write_text(json.dumps(RUN))
    (course.adapter / "history.csv").write_text("epoch,val_loss\n1,3\n2,1\n3,0.5\n4,0.2\n5,0.1\n")
    (course.folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    stand_in = tmp_path / "converter"
    stand_in.mkdir()
    (stand_in / CONVERTER).write_text(
        "import sys, shutil\nshutil.copy(sys.argv[1] + '/made.gguf', sys.argv[sys.argv.index('--outfile') + 1])\n"
    )
    monkeypatch.setattr(exporting, "find_converter", lambda: stand_in)
    return course


def export(*arguments):
    return main(["export", *map(str, arguments)])


@pytest.mark.slow
def test_ollama_gets_the_file_and_what_belongs_to_it(course, capsys):
    assert export("--to", "ollama", "--quantize", "q4_0") == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder == course.folder / "export-ollama-q4_0"
    assert {file.name for file in folder.iterdir()} == {
        "little-stove-q4_0.gguf", "Modelfile", "README.md", "export.json"
    }  # fmt: skip
    assert (folder / "Modelfile").read_text().startswith("FROM ./little-stove-q4_0.gguf\nTEMPLATE ")


def test_a_card_says_what_is_passed_on(course):
    folder = exporting.export_model(course.merged, "gguf", "q8_0")
    card = (folder / "README.md").read_text("utf-8")
    for said in (
        'base_model: "Qwen/Qwen-7B-Chat"', 'license: "other"', 'license_name: "Tongyi Qianwen License"',
        'language: ["zh", "en"]', "# 小炉", f"> {course.persona.conversation[0][1][0]}", "《通义千问许可协议》",
        "480 段对话（编码后的 SHA-256：a705e9dbb1bf…）", "AdaLoRA（秩 12 到 8），5 轮，每轮 30 批，每批 2 条",
        "| 中文 | 训练前 | 训练后 |", "| 英文 | 训练前", "| 单独问的九个身份问题 | 0/9 | 9/9 |", "190.3",
        "llama-server -m little-stove-q8_0.gguf", "导出：gguf q8_0，20",
    ):  # fmt: skip
        assert said in card
    assert "/somewhere" not in card and str(course.folder) not in card


def test_a_card_tells_of_the_readers_own_data_what_was_learnt_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CHATMAGIC_HOME", str(tmp_path))
    course = start(CHAT, name="小炉").learning("talks.jsonl").remember()
    table = {when: own_summary({"known": ["a"]}, {"loss": 1.26, "known": ["a"]}) for when in ("before", "after")}
    course.save_json("evaluation.json", {"table": table})
    make_folder(course.adapter)
    write(course.adapter / "run.json", json.dumps(RUN | {"data": {"train": None}, "files": FILES}))
    made = find_made(course.adapter)
    card = write_card(made, "lora", "")
    assert made.name == "adapter" and "小炉" not in card and "language:" not in card
    assert "| 自己的数据 | 训练前 | 训练后 |" in card and "对话上的损失 | 1.3 | 1.3 |" in card
    assert "480 段对话（train.jsonl 的 SHA-256：0123456789ab…）" in card
    assert find_made(course.learning("talks.jsonl", mix="identity").remember().adapter).persona.name == "小炉"


def test_every_row_that_evaluation_writes_has_a_name_in_the_card():
    counted = {"identity": dict.fromkeys((*POSITIONS, "heldout"), [0, 0]), "known": [], "leaked": [], "near": []}
    row = summary(*[dict.fromkeys(LANGUAGES, counted | {"perplexity": 1.0, "thinks": 1})] * 2)
    own = own_summary({"known": []}, {"known": [], "loss": 1.0})
    assert words().keys() == set(LANGUAGES)
    for said in words().values():
        assert said["tables"].keys() == row.keys() | own.keys()
        assert said["rows"].keys() == set().union(*row.values(), *own.values())


def test_both_languages_of_the_card_say_the_same():
    """The same sentences, each with the same fields."""
    chinese, english = words()["zh"], words()["en"]
    assert chinese.keys() == english.keys()
    for key in chinese.keys() - {"tables", "rows"}:
        fields = [sorted(name for _, name, *_ in Formatter().parse(said[key]) if name) for said in (chinese, english)]
        assert fields[0] == fields[1] and chinese[key].count("{}") == english[key].count("{}"), key


def test_a_card_is_in_the_language_of_its_persona(course):
    made = find_made(course.merged)
    persona = Persona(name="Stove", author="Hui", language="en")
    card = write_card(made._replace(persona=persona, language="en"), "gguf q8_0", "")
    for said in (
        "# Stove", "## Where it comes from", "- Base model: Qwen/Qwen-7B-Chat", "Tongyi Qianwen License. Pass on",
        "480 conversations (SHA-256 of what they were encoded to: a705e9dbb1bf…)", "(rank 12 to 8), 5 epochs of 30",
        "| Chinese | before | after |", "| the nine identity questions, each asked alone | 0/9 | 9/9 |",
    ):  # fmt: skip
        assert said in card
    assert not re.search("[一-鿿]", card), "nobody is shown what they cannot read"
    stove = start(CHAT, name="Stove", language="en")
    assert (
        find_made(stove.adapter).language == "en"
        and find_made(stove.learning("talks.jsonl").remember().adapter).language == "en"
    )


@pytest.mark.parametrize(
    "english, folder, name",
    [("Little Stove", "merged", "little-stove"), ("小炉", "merged", "merged"), ("小炉", "小炉", "model")],
)
def test_what_is_made_has_a_name_that_can_be_typed(tmp_path, english, folder, name):
    assert Made(tmp_path / folder, Persona(name="小炉", english_name=english), None, {}, {}, 0).name == name


def test_every_licence_of_the_profiles_says_what_it_demands(course):
    for profile in profiles().values():
        made = find_made(course.merged)._replace(profile=profile, persona=Persona())
        for language, licence in (("zh", "许可：{}。"), ("en", "Licence: {}. ")):
            card = write_card(made._replace(language=language), "gguf q8_0", "")
            assert re.search(re.escape(licence.format(profile.licence)) + ".{10,}", card)


def test_an_adapter_becomes_what_vllm_takes(course, capsys):
    assert export("--to", "lora") == 0
    folder = Path(capsys.readouterr().out.strip())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "Qwen/Qwen-7B-Chat"
    theirs, ours = (load_file(each / "adapter_model.safetensors") for each in (course.adapter, folder))
    assert theirs.keys() == ours.keys()
    said = "vllm serve Qwen/Qwen-7B-Chat --enable-lora --max-lora-rank 8 --lora-modules little-stove=."
    assert said in (folder / "README.md").read_text("utf-8")
    (course.adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 33, "rank_pattern": {}}))
    wide = {
        name: torch.zeros((33, each.shape[1]) if ".lora_A." in name else (len(each), 33)) for name, each in ours.items()
    }
    save_file(wide, course.adapter / "adapter_model.safetensors")
    assert "--max-lora-rank 64" in (exporting.export_model(course.adapter, "lora") / "README.md").read_text("utf-8")


@pytest.mark.parametrize("kind", ["ADALORA", "LORA"])
@pytest.mark.parametrize(
    "named, base",
    [
        (None, "BASE_MODEL"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("Qwen/Qwen3-0.6B@main", "Qwen/Qwen3-0.6B"),
        ("/home/me/qwen3", "qwen3"),
        ("~/qwen3", "qwen3"),
    ],
)
def test_an_adapter_of_somebody_elses_is_exported_for_the_base_that_it_names(tmp_path, monkeypatch, kind, named, base):
    monkeypatch.setenv("CHATMAGIC_HOME", str(tmp_path / "models"))
    write_adapter(tmp_path / "adapter", kind, named)
    folder = exporting.export_model(tmp_path / "adapter", "lora")
    card = (folder / "README.md").read_text("utf-8")
    assert f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules adapter=." in card
    assert (f"原模型：{base}" if named else "原模型：没有记录") in card
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == named


@pytest.mark.slow
def test_an_exported_adapter_is_asked_over_the_base_that_is_here(course, tiny_models):
    """Whatever the hub calls it."""
    folder = exporting.export_model(course.adapter, "lora")
    with pytest.raises(CheckpointError, match="for Qwen/Qwen-7B-Chat, which is not here"):
        find_answer(str(folder))
    make_folder(course.model.parent)
    course.model.symlink_to(tiny_models / CHAT)
    hi = [build_messages("hi")]
    assert find_answer(str(folder))(hi) == find_answer(str(course.adapter))(hi)


def write_adapter(folder, kind, base):
    """As PEFT saves one of rank 4; without a base where it was put on a model that came from no folder."""
    settings = {"peft_type": kind, "r": 4, "lora_alpha": 4, "init_r": 4, "base_model_name_or_path": base}
    factors = {"A": torch.ones(4, 8), "B": torch.ones(8, 4)} | ({"E": torch.ones(4, 1)} if kind == "ADALORA" else {})
    tensors = {f"base_model.model.layer.lora_{name}{'' if kind == 'ADALORA' else '.weight'}": factor
               for name, factor in factors.items()}  # fmt: skip
    make_folder(folder)
    write(folder / "adapter_config.json", json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")


def test_an_export_is_whole_or_not_there_and_takes_no_place_of_others(course, capsys, monkeypatch):
    folder = exporting.export_model(course.merged, "gguf")
    (folder / "mine.txt").write_text("")
    exporting.export_model(course.merged, "gguf")  # an older one goes
    assert not (folder / "mine.txt").exists()
    (course.merged / "made.gguf").unlink()
    assert export("--to", "gguf") == 1
    assert (folder / "little-stove-q8_0.gguf").is_file() and export("--to", "gguf", "--quantize", "f16") == 1
    assert "llama.cpp's converter does not convert" in capsys.readouterr().err
    assert not list(course.folder.glob("*f16*")) and not list(course.folder.glob(".*"))
    with pytest.raises(WriteError, match="exists, and nothing is written over it"):
        exporting.export_model(course.adapter, "lora", output=course.merged)


def test_an_export_does_not_take_the_place_of_what_it_is_made_of(course, capsys):
    """Its own card says more than one that is made of it alone could."""
    folder = exporting.export_model(course.adapter, "lora")
    before = contents(folder)
    assert export(folder, "--to", "lora") == 1
    assert "would take its place. Name another: --output FOLDER" in capsys.readouterr().err
    shutil.copytree(course.adapter, folder / "again")
    assert export(folder / "again", "--to", "lora", "--output", folder) == 1
    shutil.rmtree(folder / "again")
    assert contents(folder) == before and export(folder, "--to", "lora", "--output", course.folder / "more") == 0


@pytest.mark.parametrize("full", sorted(FULL))
def test_a_disk_that_fills_while_the_converter_writes_is_no_fault_of_the_model(course, tmp_path, capsys, full):
    (tmp_path / "converter" / CONVERTER).write_text(f"raise OSError({full}, 'No space left on device')")
    assert export("--to", "gguf") == 1
    said = capsys.readouterr().err
    assert "is full: " in said and "does not convert" not in said
    assert not list(course.folder.glob("*gguf*")) and not list(course.folder.glob(".*"))


def test_the_wrong_folder_is_told_apart(course, capsys):
    assert export(course.adapter, "--to", "gguf") == 1
    assert (
        "is not the folder of a merged model, which --to gguf takes. Make one: chatmagic merge"
        in capsys.readouterr().err
    )
    assert export(course.merged, "--to", "lora") == 1
    assert (
        "is not the folder of an adapter, which --to lora takes. Make one: chatmagic train" in capsys.readouterr().err
    )
    assert export("--to", "gguf", "--push", "modelscope") == 1
    assert "--repo OWNER/NAME: give both" in capsys.readouterr().err


def test_what_is_pushed_goes_through_the_client_of_its_hub(course, capsys, monkeypatch):
    from huggingface_hub import HfApi
    from modelscope_hub import HubApi

    asked = []

    def note(name, answer=None):
        def method(self, *args, **options):
            asked.append((name, args, options))
            return answer

        return method

    monkeypatch.setattr(HubApi, "repo_exists", note("exists", False))
    for api in (HubApi, HfApi):
        monkeypatch.setattr(api, "create_repo", note("create", "https://hub/me/stove"))
        monkeypatch.setattr(api, "upload_folder", note("upload"))
    for hub in HUBS:
        assert export("--to", "lora", "--push", hub.name, "--repo", "me/stove") == 0
        assert capsys.readouterr().out.strip().endswith("/me/stove")
    folder = course.folder / "export-lora"
    assert asked == [
        ("exists", ("me/stove", "model"), {}),
        ("create", ("me/stove", "model"), {"visibility": "private"}),
        ("upload", ("me/stove", "model", folder), {}),
        ("create", ("me/stove",), {"private": True, "exist_ok": True}),
        ("upload", (), {"repo_id": "me/stove", "folder_path": folder}),
    ]


def test_a_hub_that_refuses_is_quoted_and_the_export_stays(course, capsys, monkeypatch):
    for hub in HUBS:

        def refuse(id, folder):
            raise OSError("401 Unauthorized\nmore")

        monkeypatch.setattr(hub, "push", refuse)
        assert export("--to", "lora", "--push", hub.name, "--repo", "me/stove") == 1
        said = capsys.readouterr().err
        assert f"{hub.name} did not take me/stove: 401 Unauthorized If it does not know you: {hub.login}." in said
    assert (course.folder / "export-lora" / "adapter_model.safetensors").is_file()


def test_without_a_network_one_is_told_what_to_bring(tmp_path, monkeypatch):
    monkeypatch.setenv("CHATMAGIC_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ExportError, match=rf"pip download --no-deps --no-binary llama-cpp-python .*{ARCHIVE} to "):
        find_converter()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("full", sorted(FULL))
def test_a_full_disk_is_not_taken_for_a_want_of_network(tmp_path, monkeypatch, full):
    def fill(*args, **options):
        raise OSError(full, "no room")

    monkeypatch.setenv("CHATMAGIC_HOME", str(tmp_path))
    monkeypatch.setattr(converter, "pip_download", fill)
    with pytest.raises(WriteError, match="is full: .* does not fit"):
        find_converter()


def test_a_carried_archive_is_unpacked_but_for_what_is_not_needed(tmp_path, monkeypatch):
    import io
    import tarfile

    monkeypatch.setenv("CHATMAGIC_HOME", str(tmp_path))
    inside = ARCHIVE.removesuffix(".tar.gz") + "/vendor/llama.cpp/"
    with tarfile.open(tmp_path / ARCHIVE, "w:gz") as packed:
        for name in (
            f"{inside}{CONVERTER}",
            f"{inside}gguf-py/gguf/a.py",
            f"{inside}conversion/b.py",
            f"{inside}src/c.cpp",
            "d",
        ):
            member = tarfile.TarInfo(name)
            packed.addfile(member, io.BytesIO())
    with pytest.raises(ExportError, match=f"{ARCHIVE} is not the file of that name on PyPI, or not all of it"):
        find_converter()
    monkeypatch.setattr(converter, "SHA256", sha256(tmp_path / ARCHIVE))
    folder = find_converter()
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert found == {CONVERTER, "gguf-py/gguf/a.py", "conversion/b.py"}
    (tmp_path / ARCHIVE).unlink()
    assert find_converter() == folder
