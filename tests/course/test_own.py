"""Data of one's own in the course: read, split, mixed, trained by `chatmagic train --data`, and never written over."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from chatmagic import cli, read_conversations
from chatmagic.course import own, role_play, script
from chatmagic.course import thread as course
from chatmagic.course.download import DownloadError
from chatmagic.course.profile import profiles
from chatmagic.course.thread import CourseError, OwnData
from chatmagic.data.dataset import ConversationFile, Examples
from chatmagic.data.rows import DataError
from chatmagic.prompts.labels import LabelsError

NAME = "llama-2-13b-chat"
REPLIES = [(f"What is {n}?", f"It is {n}.") for n in range(40)]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("CHATMAGIC_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(profiles(), NAME, replace(profiles()[NAME], quantize="no", samples=16, epochs=2))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield tmp_path / "home"
    for number, handler in handlers.items():
        signal.signal(number, handler)


def mine(tmp_path, count=40) -> Path:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([{"query": f"{n}?", "response": f"ja {n}"} for n in range(count)], indent=1))
    return path


def made(path: Path, **of_own) -> course.Course:
    run = replace(course.start(NAME), own=OwnData(str(path), **of_own))
    own.make_own_data(run, lambda: REPLIES)
    return run


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_tenth_is_kept_and_the_rest_is_mixed_with_replies(tmp_path, capsys):
    run = made(mine(tmp_path))
    train, val = lines(run.train), lines(run.val)
    said = "mine.json: 40 rows read, 40 conversations, 40 answers.\n"
    assert said in capsys.readouterr().out
    own.make_own_data(run, lambda: pytest.fail("it is made already"))
    assert capsys.readouterr().out == said, "one line of summary, always"
    replayed = [row for row in train if row["messages"][-1].get("replayed")]
    assert (len(train), len(val), len(replayed)) == (36 + 9, 4, 9)
    questions = [row["messages"][0]["content"] for row in [*train, *val] if row not in replayed]
    assert sorted(questions) == sorted(f"{n}?" for n in range(40))
    assert own.used(run, 45) == (
        "40 of 40 conversations are used: 36 to train, 4 to validate, and beside them 9 that keep the model as it is; "
        "an epoch draws 45 of 45, each once"
    )
    other = replace(run, own=replace(run.own, mix="nothing"))
    assert other.folder != run.folder != course.start(NAME).folder
    own.make_own_data(other, lambda: pytest.fail("nothing is asked of the model where nothing is mixed"))
    assert lines(other.val) == val and [row for row in train if row not in replayed] == lines(other.train)


@pytest.mark.parametrize("count, kept", [(2, 1), (9, 1), (10, 1), (3729, 200)])
def test_how_many_are_kept(count, kept):
    learnt, held = own.split_indices(count)
    assert (
        len(held) == kept
        and sorted([*learnt, *held]) == list(range(count))
        and own.split_indices(count) == (learnt, held)
    )
    with pytest.raises(DataError, match="There is 1 conversation: two are the least"):
        own.split_indices(1)


def test_with_who_the_model_is(tmp_path):
    run = made(mine(tmp_path), mix="identity")
    said = [message["content"] for row in lines(run.train) for message in row["messages"]]
    assert all(answer in said for answer in run.persona.answers.values()) and len(lines(run.train)) == 36 + 9 + 18


def test_it_is_read_again_only_when_the_file_changed(tmp_path, capsys):
    path = mine(tmp_path)
    run = made(path)
    before = run.train.read_bytes()
    capsys.readouterr()
    made(path)
    assert run.train.read_bytes() == before
    mine(tmp_path, 60)
    made(path)
    assert "60 rows" in capsys.readouterr().out and len(lines(run.val)) == 6


def test_what_was_made_goes_on_where_it_was_copied_to(tmp_path, monkeypatch, capsys):
    """With the file copied too, or without it."""
    path = mine(tmp_path)
    run = made(path)
    assert str(tmp_path) not in (run.folder / "own.json").read_text()
    before = run.train.read_bytes()
    shutil.copytree(run.folder.parent, tmp_path / "elsewhere")
    shutil.rmtree(run.folder.parent)
    monkeypatch.setenv("CHATMAGIC_COURSE", str(tmp_path / "elsewhere"))
    os.utime(path, (1, 1))
    capsys.readouterr()
    for _ in range(2):
        again = made(path)
        assert again.train.read_bytes() == before and "40 of 40" in own.used(again, 45)
        assert capsys.readouterr().out.startswith("mine.json: 40 rows read, ")
        path.unlink(missing_ok=True)
    with pytest.raises(DataError):
        made(tmp_path / "other.json")


def test_a_file_of_the_readers_is_never_written_over(tmp_path):
    path = mine(tmp_path)
    run = made(path)
    run.train.write_text("mine\n")
    mine(tmp_path, 50)
    with pytest.raises(CourseError, match="is your own"):
        made(path)
    assert run.train.read_text() == "mine\n"
    assert {each.name for each in run.folder.iterdir()} == {"train.jsonl", "val.jsonl", "made.json", "own.json"}


def test_bad_data_leaves_nothing(tmp_path):
    path = mine(tmp_path)
    path.write_text(path.read_text()[:-20])
    run = replace(course.start(NAME), own=OwnData(str(path)))
    with pytest.raises(DataError, match="mine.json, line"):
        own.make_own_data(run, lambda: pytest.fail("the file comes first"))
    assert not list(run.folder.iterdir())


def train(*arguments) -> int:
    return cli.main(["train", NAME, *map(str, arguments)])


@pytest.fixture
def with_model(home, tiny_models):
    shutil.copytree(tiny_models / NAME, home / NAME)


@pytest.mark.slow
def test_the_command(with_model, tmp_path, capsys, monkeypatch):
    """From a file to an adapter; a second time, the same data; what the course had before is as it was."""
    identity = course.start(NAME)
    assert train("--data", mine(tmp_path), "--mix", "nothing", "--max-length", 200) == 0
    said = capsys.readouterr().out
    assert "mine.json: 40 rows read" in said
    assert "36 to train, 4 to validate; an epoch draws 36 of 36, each once; " in said and " of 200 (mine.json, " in said
    run = course.resume()
    assert run.own == OwnData(str(tmp_path / "mine.json"), mix="nothing", max_length=200)
    assert (run.adapter / "adapter_model.safetensors").is_file() and not list(identity.folder.iterdir())
    drawn = []
    monkeypatch.setattr(script, "RandomSampler", lambda data, num_samples: drawn.append(num_samples) or range(36))
    assert train("--no-resume") == 0, "what is left out is as before"
    assert train("--data", tmp_path / "mine.json", "--samples", 20, "--mix", "nothing") == 0
    assert drawn == [36, 20] and "an epoch draws 20 of 36" in capsys.readouterr().out
    assert course.resume().own.samples == 20


@pytest.mark.slow
def test_what_is_evaluated_is_what_was_trained(with_model, tmp_path, capsys):
    """The held-out rows and what the base knew; not who the model is."""
    assert train("--data", mine(tmp_path), "--mix", "nothing") == 0
    capsys.readouterr()
    assert cli.main(["evaluate"]) == 0
    said = capsys.readouterr().out
    assert "held-out loss" in said and "retained" in said and "alone" not in said
    (path,) = course.resume().folder.glob("evaluation.json")
    found = json.loads(path.read_text("utf-8"))
    held = [*read_conversations(course.resume().val)]
    for when in ("before", "after"):
        asked = [[question, answer] for question, answer, _ in found[when]["replies"]]
        assert asked == [[talk[-2]["content"], talk[-1]["content"]] for talk in held]
        assert found["table"][when]["own data"]["held-out loss"] == found[when]["loss"] > 0


def test_the_arguments(tmp_path):
    path = tmp_path / "gbk.json"
    path.write_bytes(
        '{"content": "帽", "summary": "一顶帽。"}\n{"content": "鞋"}\n{"content": "衣", "summary": "一件"}'.encode(
            "gbk"
        )
    )
    said = [
        "--data",
        str(path),
        "--columns",
        "content=query",
        "summary=response",
        "--encoding",
        "gbk",
        "--on-error",
        "skip",
    ]
    chosen = cli.chosen_course(cli.parser().parse_args(["train", NAME, *said]))
    columns = {"content": "query", "summary": "response"}
    assert chosen.own == OwnData(str(path), columns=columns, encoding="gbk", on_error="skip")
    own.make_own_data(chosen, lambda: REPLIES)
    assert [row["messages"][0]["content"] for row in lines(chosen.val)] in (["帽"], ["衣"])
    assert course.Course(chosen.profile, chosen.persona, own=chosen.own).remember().folder == course.resume().folder
    assert cli.chosen_course(cli.parser().parse_args(["train", NAME])).own == chosen.own
    assert cli.chosen_course(cli.parser().parse_args(["train", NAME, "--data", ""])).own is None


def test_a_conversation_that_is_too_long_is_told_before_the_first_step(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b"}]} for n in (9, 999)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(LabelsError, match="^a.jsonl, line 2: The conversation is"):
        Examples(ConversationFile(path), tokenizer, max_length=500).summary()
    assert Examples(ConversationFile(path), tokenizer).summary().endswith("(a.jsonl, line 2)")


def test_examples_are_encoded_when_they_are_drawn(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"query": f"{n}", "response": "b"}) + "\n" for n in range(50)))
    with pytest.raises(DataError, match="expected an object with 'messages'"):
        ConversationFile(path)  # read_jsonl's own forms
    conversations = list(read_conversations(path))
    encoded = []
    row = SimpleNamespace(input_ids=[1, 2], labels=[-100, 2], replayed=[False, False])
    monkeypatch.setattr("chatmagic.data.dataset.encode_rows", lambda *a, **k: encoded.append(a) or [row])
    examples = Examples(conversations, tokenizer)
    assert len(examples) == 50 and not encoded
    assert examples[7][0]["labels"] == [-100, 2] and len(encoded) == 1


HUB = {"train.jsonl": '{"query": "a", "response": "b"}\n' * 4, "README.md": "#", "test.jsonl": ""}


def on_a_hub(monkeypatch, files: dict[str, str], answering: str) -> list[str]:
    """Stand-ins for both hubs' clients, of which one has the data set; the list of who was asked."""
    asked = []

    def client(name):
        def download(id, local_dir, **settings):
            asked.append((name, id, settings))
            if name != answering:
                raise OSError("404")
            for file, text in files.items():
                (Path(local_dir) / file).parent.mkdir(parents=True, exist_ok=True)
                (Path(local_dir) / file).write_text(text)

        return download

    monkeypatch.setattr(own, "answers", lambda address: None)
    monkeypatch.setattr("modelscope.dataset_snapshot_download", client("modelscope"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", client("huggingface"))
    return asked


@pytest.mark.parametrize("hub", ["modelscope", "huggingface"])
def test_a_data_set_by_its_id(tmp_path, monkeypatch, capsys, hub):
    asked = on_a_hub(monkeypatch, HUB, hub)
    run = made("someone/some-data")
    assert "train.jsonl: 4 rows read" in capsys.readouterr().out and len(lines(run.val)) == 1
    assert [name for name, *_ in asked] == ["modelscope", "huggingface"][: 1 + (hub == "huggingface")]
    assert asked[-1][1:] == ("someone/some-data", {} if hub == "modelscope" else {"repo_type": "dataset"})
    made("someone/some-data", mix="nothing")
    assert len(asked) < 3, "it is fetched once"


def test_which_file_of_a_data_set(monkeypatch):
    on_a_hub(monkeypatch, {"a.jsonl": "", "b/c.jsonl.xz": "", ".cache/x.json": ""}, "modelscope")
    with pytest.raises(
        DataError, match="more than one file of data, or none: a.jsonl, b/c.jsonl.xz. Say which: o/d:FILE"
    ):
        own.dataset_file("o/d")
    assert own.dataset_file("o/d:b/c.jsonl.xz") == own.home() / "datasets" / "o" / "d" / "b" / "c.jsonl.xz"
    on_a_hub(monkeypatch, {}, "neither")
    with pytest.raises(DownloadError, match="modelscope says: 404 huggingface says: 404"):
        own.dataset_file("o/e")


@pytest.mark.parametrize(
    "name", ["data/train.jsonl", "data/train.jsonl.xz", "data/train.json.bz2", "mine", "a/b/c", "~/data.parquet"]
)
def test_what_is_a_path_is_no_id(name):
    assert own.dataset_file(name) == Path(os.path.expanduser(name))


@pytest.mark.parametrize("language, voice", [("zh", "小船"), ("en", "Little boat")])
def test_the_role_play_set(language, voice):
    conversations = list(read_conversations(role_play(language)))
    assert len(conversations) == 64 and all(voice in talk[-1]["content"] for talk in conversations)
    assert len({talk[0]["content"] for talk in conversations}) == 64
