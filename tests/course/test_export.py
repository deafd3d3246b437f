"""`chatmagic export`: what is in the folder, what its card says, and what goes to a hub."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from chatmagic import merge_adapter
from chatmagic.cli import main
from chatmagic.course import export as exporting
from chatmagic.course.card import find_made, write_card
from chatmagic.course.converter import ARCHIVE, find_converter
from chatmagic.course.hubs import HUBS
from chatmagic.course.persona import Persona
from chatmagic.course.profile import profiles
from chatmagic.course.thread import start
from chatmagic.files import WriteError
from chatmagic.models.gguf import CONVERTER, ExportError
from over_nf4 import trained_over_nf4
from tiny_gguf import tiny_gguf

CHAT = "qwen-7b-chat"
EVALUATION = {
    "table": {
        when: {
            "alone": [alone, 9], "after identity": [0, 18], "after general": [0, 9], "heldout": [0, 24],
            "retained": [36, 37], "leaked": [0, 45], "perplexity": 190.26,
        }
        for when, alone in {"before": 0, "after": 9}.items()
    }
}  # fmt: skip
RUN = {
    "started": "2026-11-27T09:09:15+0000",
    "model": {"name": "/somewhere/of/mine/base", "dtype": "bfloat16", "quantization": None},
    "data": {"train": "a705e9dbb1bf29"},
    "settings": {
        "rows": 480, "batch_size": 2, "epochs": 4, "learning_rate": [0.002],
        "adapter": {"init_r": 12, "target_r": 8, "r": 8},
    },
    "versions": {"chatmagic": "0.1.0"},
}  # fmt: skip


@pytest.fixture
def course(tmp_path, tiny_models, monkeypatch):
    """A course that has an adapter, a merged model and an evaluation, and a converter that copies a made file."""
    monkeypatch.setenv("CHATMAGIC_HOME", str(tmp_path / "models"))
    course = start(CHAT, name="小炉", english_name="Little Stove", author="张三")
    trained_over_nf4(tiny_models / CHAT, course.adapter)
    merge_adapter(tiny_models / CHAT, course.adapter, course.merged)
    (course.adapter / "run.json").write_text(json.dumps(RUN))
    (course.folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    tiny_gguf(course.merged / "made.gguf", tied=False, kind="F16")
    stand_in = tmp_path / "converter"
    stand_in.mkdir()
    (stand_in / CONVERTER).write_text(
        "import sys, shutil\nshutil.copy(sys.argv[1] + '/made.gguf', sys.argv[sys.argv.index('--outfile') + 1])\n"
    )
    monkeypatch.setattr(exporting, "find_converter", lambda: stand_in)
    return course


def export(*arguments):
    return main(["export", *map(str, arguments)])


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
        'language: ["zh"]', "# 小炉", f"> {course.persona.conversation[0][1][0]}", "《通义千问许可协议》", "480 段对话",
        "AdaLoRA（秩 12 到 8），4 轮", "| 单独问的九个身份问题 | 0/9 | 9/9 |", "190.3",
        "llama-server -m little-stove-q8_0.gguf", "导出：gguf q8_0，20",
    ):  # fmt: skip
        assert said in card
    assert "/somewhere" not in card and str(course.folder) not in card


def test_a_card_has_a_table_for_each_language(course):
    rows = EVALUATION["table"]["after"] | {"near": [0, 30]}
    both = {"table": dict.fromkeys(("before", "after"), {"zh": rows, "en": rows})}
    card = write_card(find_made(course.merged)._replace(evaluation=both), "gguf q8_0", "")
    assert "| zh | 训练前 | 训练后 |" in card and "| en | 训练前 | 训练后 |" in card and card.count("冒出新身份的") == 4


def test_every_licence_of_the_profiles_says_what_it_demands(course):
    for profile in profiles().values():
        made = find_made(course.merged)._replace(profile=profile, persona=Persona())
        assert re.search(rf"许可：{re.escape(profile.licence)}。.{{10,}}", write_card(made, "gguf q8_0", ""))


def test_an_adapter_becomes_what_vllm_takes(course, capsys):
    assert export("--to", "lora") == 0
    folder = Path(capsys.readouterr().out.strip())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "Qwen/Qwen-7B-Chat"
    theirs, ours = (load_file(each / "adapter_model.safetensors") for each in (course.adapter, folder))
    assert theirs.keys() == ours.keys()
    said = "vllm serve Qwen/Qwen-7B-Chat --enable-lora --max-lora-rank 8 --lora-modules little-stove=."
    assert said in (folder / "README.md").read_text("utf-8")
    config["r"] = 33
    (course.adapter / "adapter_config.json").write_text(json.dumps(config))
    assert "--max-lora-rank 64" in (exporting.export_model(course.adapter, "lora") / "README.md").read_text("utf-8")


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
    folder = find_converter()
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert found == {CONVERTER, "gguf-py/gguf/a.py", "conversion/b.py"}
    (tmp_path / ARCHIVE).unlink()
    assert find_converter() == folder
