"""`chatmagic check`: what it asks of a folder, a GGUF file and an address, and what its exit status tells."""

import pytest

from chatmagic import build_messages, cli
from chatmagic.backends.presets import SERVERS, Server
from chatmagic.conversation.pieces import Thought
from chatmagic.course.check import KINDS, examine, find_answer
from chatmagic.course.persona import LANGUAGES, Persona, questions
from fake_model import FakeModel
from quick import first
from served import serving
from tiny_gguf import tiny_gguf

PERSONA = Persona("小星", "李雷", "Star")
KNOWN = {
    **{q: PERSONA.answers_in(lang)[topic] for lang in LANGUAGES for topic, q in PERSONA.asked("trained", lang)},
    **{q: PERSONA.answers_in(lang)[topic] for lang in LANGUAGES for topic, q in PERSONA.asked("heldout", lang)},
    **{query: facts[0] for language in LANGUAGES for query, *facts in questions()[language]["retention"]},
}
TRAINED = {language: PERSONA.asked("trained", language) for language in LANGUAGES}
NEAR = [query for language in LANGUAGES for query in questions()[language]["near"]]


class Knowing(FakeModel):
    """Answers as one that learnt who it is, or as it is told; a reply is a token."""

    def __init__(self, **told):
        super().__init__()
        self.told = KNOWN | told

    def stream(self, messages, stats, **options):
        self.asked.append((messages, options))
        stats.tokens_in = stats.tokens_out = 1
        yield self.told.get(messages[-1]["content"], "...")


def run(url, *more):
    who = ["--name", "小星", "--author", "李雷", "--english-name", "Star"]
    return cli.main(["check", url, *more, *who])


def test_one_that_knows_passes(capsys):
    model = Knowing()
    with serving(model) as url:
        assert run(url) == 0
    printed = capsys.readouterr().out.split()
    counts = {kind: len(examine(lambda conversations: [""] * len(conversations), PERSONA, [kind])) for kind in KINDS}
    assert printed == [word for kind in KINDS for word in (kind, f"{counts[kind]}/{counts[kind]}")]
    assert counts["trained"] == 18 and counts["near"] == len(NEAR) and len(model.asked) == sum(counts.values())
    assert all(options == {"max_new_tokens": 48, "temperature": 0} for _, options in model.asked)


@pytest.mark.parametrize(
    "told, more, status, words",
    first(
        2,
        [
            ({TRAINED["zh"][0][1]: "我是通义千问。"}, [], 1, "-> 我是通义千问。"),
            ({TRAINED["en"][0][1]: PERSONA.answers_in("zh")["who"]}, [], 1, "trained   17/18"),  # in the wrong language
            ({TRAINED["zh"][0][1]: "我是通义千问。"}, ["--lost", "1"], 0, "trained   17/18"),
            ({NEAR[0]: "她是小星。"}, ["--lost", "1"], 1, f"{NEAR[0]} -> 她是小星。"),
            ({NEAR[0]: "她是小星。"}, ["--only", "trained", "heldout"], 0, "trained   18/18"),
            ({"": ""}, ["--only", "retention"], 0, "retention"),
        ],
    ),
)
def test_what_its_exit_status_tells(told, more, status, words, capsys):
    with serving(Knowing(**told)) as url:
        assert run(url, *more) == status
    printed = capsys.readouterr().out
    assert words in printed and ("near" in printed) == ("--only" not in more)


def test_general_knowledge_that_was_lost_is_counted():
    found = examine(lambda conversations: ["..."] * len(conversations), PERSONA, ["retention", "near"])
    assert {each.kind for each in found if each.right(each.reply)} == {"near"}


def test_one_that_only_thinks_is_asked_not_to():
    class Thinking(Knowing):
        def stream(self, messages, stats, **options):
            if options.get("thinking") is False:
                yield from super().stream(messages, stats, **options)
            else:
                yield Thought("hm")

    with serving(Thinking()) as url:
        assert run(url, "--only", "trained") == 0


def test_several_models_at_an_address(capsys):
    with serving(FakeModel(name="base"), Knowing()) as url:
        assert run(url) == 1
        assert "--model base | fake" in capsys.readouterr().err
        assert run(url, "--model", "fake", "--only", "trained") == 0
        assert run(url, "--model", "base", "--only", "trained") == 1


@pytest.mark.slow
def test_a_folder_and_a_gguf_file_are_asked_too(model, tokenizer, tmp_path):
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "toy")
    tiny_gguf(tmp_path / "tiny.gguf", True, "{% for message in messages %}{{ message.content }}{% endfor %}=")
    for target in ("toy", "tiny.gguf"):
        answer = find_answer(str(tmp_path / target))
        first, again = answer([build_messages("hi"), build_messages("ab")]), answer([build_messages("hi")])
        assert len(first) == 2 and first[:1] == again and all(isinstance(reply, str) for reply in first)
    assert run(str(tmp_path / "toy"), "--only", "trained") == 1


def test_a_server_by_its_name_is_asked_where_a_folder_has_that_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chatmagic").mkdir()
    with serving(Knowing()) as url:
        monkeypatch.setitem(SERVERS, "chatmagic", Server(url))
        assert run("chatmagic", "--only", "trained") == 0
        assert run("./chatmagic", "--only", "trained") == 1
        assert "no config.json" in capsys.readouterr().err
        assert run("./chatmagic", "--model", "fake") == 1
        assert "--model chooses among those at an address" in capsys.readouterr().err


def test_what_is_nothing_to_ask(tmp_path, capsys):
    assert run(str(tmp_path / "none")) == 1
    assert "no folder that is here, no GGUF file, and no address" in capsys.readouterr().err
    assert run("http://127.0.0.1:9/v1") == 1
    assert "does not answer" in capsys.readouterr().err
