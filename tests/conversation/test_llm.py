"""ChatLLM over a fake model: the conversation, its history and its file."""

import json
import os
from itertools import pairwise
from threading import Thread

import pytest

from chatmagic import ChatLLM, ChatmagicError, build_messages
from chatmagic.conversation.llm import Interrupted
from chatmagic.conversation.registry import registered
from chatmagic.conversation.reply import Reply
from fake_model import FakeModel


@pytest.fixture
def fake():
    return FakeModel()


def test_a_reply_is_a_string_that_knows_what_it_cost(fake, capsys):
    reply = ChatLLM(fake, stream=False)("你好")
    assert reply == "1: 你好" and capsys.readouterr().out == ""
    assert (reply.query, reply.model, reply.stats.stop_reason) == ("你好", "fake", "stop")
    assert (reply.stats.tokens_in, reply.stats.tokens_out) == (2, 5)
    assert 0 < reply.stats.seconds_to_first_token < reply.stats.seconds
    assert reply.stats.tokens_per_second > 0


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_reply_is_not_remembered(fake, text):
    fake.reply = lambda turn, question: text
    llm = ChatLLM(fake, history=[("a", "b")], stream=False)
    assert llm("hi") == text and llm.history == [("a", "b")]
    assert llm("hi").notices == ["the reply is empty, and is not remembered"]


def test_what_no_time_was_taken_of(fake):
    fake.reply = lambda turn, question: ""
    reply = ChatLLM(fake)("hi")
    assert reply == "" and reply.stats.tokens_per_second is None
    assert str(reply.stats) == "2 tokens in (0 kept), 0 out, first after ? s, ? tokens/s, stop"


def test_streaming_prints_pieces_as_they_come(fake, monkeypatch):
    calls = []
    monkeypatch.setattr("builtins.print", lambda *text, **keywords: calls.append((*text, keywords)))
    ChatLLM(fake)("hi")
    assert calls == [(c, {"end": "", "flush": True}) for c in "1: hi"] + [({},)]


def test_a_reply_that_was_cut_ends_with_one_line(fake, capsys):
    reply = ChatLLM(fake)("hello", max_new_tokens=4)
    assert capsys.readouterr().out == "1: h\n[cut after 4 tokens: --max-new-tokens (max_new_tokens=) allows more]\n"
    assert reply == "1: h" and len(reply.notices) == 1


def test_half_a_character_kills_nothing(fake, capsys, tmp_path):
    asked = []

    def stream(messages, stats, **options):
        asked.append(messages[-1]["content"])
        yield from ("a\ud83d", "\ude42b", "\udc00", "c", "\ud83d")

    fake.stream = stream
    llm = ChatLLM(fake)
    assert llm("what is \ud83d") == "a🙂b\ufffdc\ufffd" and capsys.readouterr().out == "a🙂b\ufffdc\ufffd\n"
    assert asked == ["what is \ufffd"]
    llm.save(tmp_path / "chat.jsonl")


def test_two_threads_in_one_conversation_wait_for_each_other():
    fake = FakeModel(delay=0.005)
    llm = ChatLLM(fake, stream=False)
    threads = [Thread(target=llm, args=[name]) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [reply for _, reply in llm.history] == [f"{n}: {query}" for n, (query, _) in enumerate(llm.history, 1)]
    assert sorted(query for query, _ in llm.history) == [*"abc"]


def test_totals(fake):
    llm = ChatLLM(fake, stream=False)
    llm("a"), llm("b", remember=False)
    fake.failure = KeyboardInterrupt()
    with pytest.raises(Interrupted):
        llm("c")
    assert (llm.totals.replies, llm.totals.tokens_in, llm.totals.tokens_out) == (3, 1 + 1 + 6, 4 + 4 + 3)


def test_chat_leaves_history_alone(fake):
    llm = ChatLLM(fake, history=[("a", "b")], system="s")
    assert llm.chat(messages=llm.build_messages(query="x")) == "1: x"
    assert fake.asked[0][0] == [{"role": "user", "content": "x"}]
    assert llm.history == [("a", "b")]


def test_history_keeps_the_last_whole_rounds(fake):
    llm = ChatLLM(fake, max_chat_rounds=2, stream=False, system="be brief")
    for query in "abcd":
        llm(query)
    assert llm.history == [("c", "3: c"), ("d", "3: d")]
    assert fake.asked[-1][0] == build_messages("d", [("b", "2: b"), ("c", "3: c")], "be brief")


@pytest.mark.parametrize("most", [0, 1, 2, 3, 4, 20])
def test_a_full_history_drops_several_rounds_at_once(fake, most):
    """Dropping one begins the prompt elsewhere, so that nothing kept of the last turn can be used in the next."""
    llm = ChatLLM(fake, max_chat_rounds=most, stream=False)
    for turn in range(3 * most + 3):
        llm(f"question {turn}")
        assert llm.history == [] if most == 0 else llm.history[-1][0] == f"question {turn}" and len(llm.history) <= most
    begins = [messages[0]["content"] for messages, _ in fake.asked]
    anew = sum(before != after for before, after in pairwise(begins))
    assert anew <= 2 * most / max(1, most // 4) + 2 if most else anew == len(begins) - 1


def test_a_full_context_leaves_out_several_rounds_at_once():
    llm = ChatLLM(FakeModel(context=1000), max_new_tokens=100, stream=False)
    for turn in range(60):
        llm(f"{turn:20}")
        assert sum(len(message["content"]) for message in llm.backend.asked[-1][0]) <= 900
    begins = [messages[0]["content"] for messages, _ in llm.backend.asked]
    assert sum(before != after for before, after in pairwise(begins)) <= 60 * 44 / 225 + 1
    assert len(llm.backend.asked[-1][0]) > 2 * 10
    llm.history = llm.history[:3]  # some are taken back: all that there are fit again
    llm("x")
    assert len(llm.backend.asked[-1][0]) == 7
    llm.history = [("a" * 850, "b" * 20), ("c" * 430, "d" * 430)]
    llm("short")
    assert [message["content"][0] for message in llm.backend.asked[-1][0]] == ["c", "d", "s"]  # one stays if it can
    llm("x" * 300)
    assert [message["content"][0] for message in llm.backend.asked[-1][0]] == ["s", "2", "x"]


def test_no_rounds_means_no_history(fake):
    llm = ChatLLM(fake, max_chat_rounds=0, stream=False)
    assert [llm("a"), llm("b"), llm.history] == ["1: a", "1: b", []]


def test_the_oldest_rounds_give_way_to_the_context():
    llm = ChatLLM(FakeModel(context=30), max_new_tokens=10, stream=False)
    for query in ("aaaa", "bbbb", "cccc"):
        llm(query)
    # 4 + 7 + 4 + 7 + 4 = 26 characters do not fit 30 - 10: the first round is left out, of the prompt alone
    assert llm.backend.asked[2][0] == build_messages("cccc", [("bbbb", "2: bbbb")])
    assert [query for query, _ in llm.history] == ["aaaa", "bbbb", "cccc"]


@pytest.mark.parametrize("failure", [ChatmagicError("broken"), RuntimeError("CUDA error"), KeyboardInterrupt()])
def test_a_turn_that_failed_leaves_the_history(fake, failure):
    llm = ChatLLM(fake, stream=False)
    llm("a")
    fake.failure = failure
    with pytest.raises(Interrupted if isinstance(failure, KeyboardInterrupt) else type(failure)):
        llm("b")
    assert llm.history == [("a", "1: a")]
    assert llm("c") == "2: c"


def test_a_fresh_start_is_part_of_the_turn(fake):
    llm = ChatLLM(fake, history=[("a", "b")], stream=False)
    fake.failure = ChatmagicError("broken")
    with pytest.raises(ChatmagicError, match="broken"):
        llm("abc", new=True)
    with pytest.raises(ChatmagicError, match="not JSON"):
        llm("no JSON", new=True, check=Reply.json)
    assert llm.history == [("a", "b")]
    assert llm("x", new=True) == "1: x" and fake.asked[-1][0] == build_messages("x")
    assert llm.history == [("x", "1: x")]
    assert llm("y", new=True, remember=False) == "1: y" and llm.history == []


def test_an_interrupted_reply_is_kept_with_the_exception(fake):
    fake.failure = KeyboardInterrupt()
    with pytest.raises(Interrupted, match="after 3 tokens") as caught:
        ChatLLM(fake, stream=False)("abc")
    assert caught.value.reply == "1: " and caught.value.reply.stats.stop_reason == "interrupted"
    assert isinstance(caught.value, KeyboardInterrupt)  # `except Exception` in a loop must not swallow Stop


def test_outside_the_conversation(fake):
    llm = ChatLLM(fake, history=[("a", "b")], stream=False)
    assert llm("x", remember=False, system="s") == "1: x"
    assert llm.history == [("a", "b")] and fake.asked[0][0] == build_messages("x", system="s")


@pytest.mark.parametrize(
    "option",
    [
        *({"temperature": value} for value in (-1, "0.5", float("nan"), float("inf"), True, [1])),
        *({"top_p": value} for value in (0, 1.5, "hot")),
        *({"max_new_tokens": value} for value in (0, "9", 2.5, True)),
        *({"seed": value} for value in (-1, "7", 0.5)),
        *({"thinking_budget": value} for value in (-1, "100", 0.5)),
        {"thinking": "on"},
        {"greedy": "yes"},
    ],
    ids=str,
)
@pytest.mark.parametrize("context", [None, 100])
def test_impossible_options(context, option):
    fake = FakeModel(context=context)
    with pytest.raises(ChatmagicError, match=f"{next(iter(option))} must be .*, not"):
        ChatLLM(fake)("x", **option)
    assert fake.asked == []


def test_what_is_no_text_is_not_sent(fake):
    llm = ChatLLM(fake, stream=False)
    for question in (5, None, ["a"], b"a"):
        with pytest.raises(ChatmagicError, match="expected a"):
            llm(question)
        with pytest.raises(ChatmagicError, match="expected a"):
            llm.chat(build_messages("a", [("b", "c")], question or 5))
    for messages in ("hi", [], ["hi"], [{"role": "user"}], [{"role": "user", "content": None}]):
        with pytest.raises(ChatmagicError, match="expected|must be a dict"):
            llm.chat(messages)
    assert fake.asked == [] and llm.history == [] and llm.asked is None


def test_an_option_that_is_none_is_not_given(fake):
    ChatLLM(fake, stream=False)("x", temperature=None, seed=None, top_p=None)
    assert fake.asked[0][1] == {"max_new_tokens": 512}


def test_json_reply(fake):
    llm = ChatLLM(fake, stream=False)
    fake.reply = lambda turn, question: question
    assert llm('```json\n{"a": [1]}\n```').json() == {"a": [1]}
    with pytest.raises(ChatmagicError, match="begins 'Sure"):
        llm("Sure! {}").json()


def test_save_and_load(fake, tmp_path):
    llm = ChatLLM(fake, stream=False, system="系统")
    llm("一"), llm("two\nlines\u2028")
    path = tmp_path / "chat.jsonl"
    llm.save(path)
    assert path.read_text("utf-8") == (
        '{"messages": [{"role": "system", "content": "系统"}, {"role": "user", "content": "一"}, '
        '{"role": "assistant", "content": "1: 一"}, {"role": "user", "content": "two\\nlines\u2028"}, '
        '{"role": "assistant", "content": "2: two\\nlines\u2028"}]}\n'
    )
    other = ChatLLM(fake)
    other.load(path)
    assert (other.history, other.system) == (llm.history, "系统")


def test_load_takes_a_conversation_however_its_json_is_written(fake, tmp_path):
    text = json.dumps({"messages": build_messages(None, [("一", "二")], "s")}, ensure_ascii=False, indent=2)
    for encoding in "utf-8", "utf-8-sig":
        (tmp_path / "chat.json").write_text(text.replace("\n", "\r\n"), encoding)
        llm = ChatLLM(fake)
        llm.load(tmp_path / "chat.json")
        assert (llm.history, llm.system) == ([("一", "二")], "s")


def test_a_folder_is_no_file(fake, tmp_path):
    llm = ChatLLM(fake, history=[("a", "b")])
    for use in llm.save, llm.load:
        with pytest.raises(ChatmagicError, match="is a folder: name a file in it, such as .*chat.jsonl"):
            use(tmp_path)
    assert llm.history == [("a", "b")] and list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_the_file(fake, tmp_path):
    llm, path = ChatLLM(fake, history=[("a", "b")]), tmp_path / "chat.jsonl"
    llm.save(path)
    before = path.read_bytes()
    llm.history = [("\ud800", "a lone surrogate cannot be written")]
    with pytest.raises(ChatmagicError, match="cannot be saved.*surrogates"):
        llm.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_save_that_is_cut_short_leaves_the_file(fake, tmp_path, monkeypatch):
    llm, path = ChatLLM(fake, history=[("a", "b")]), tmp_path / "chat.jsonl"
    llm.save(path)
    before = path.read_bytes()
    llm.history *= 2

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ChatmagicError, match=f"The disk of {tmp_path} is full"):
        llm.save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "not JSON of one conversation"),
        ("{}\n", "not JSON of one conversation"),
        ("[1]\n", "not JSON of one conversation"),
        ('{"messages": []}\n', "empty"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "not answered"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', "Message 0"),
    ],
)
def test_a_file_that_is_no_conversation(fake, tmp_path, text, reason):
    llm = ChatLLM(fake, history=[("a", "b")])
    (tmp_path / "chat.jsonl").write_text(text)
    with pytest.raises(ChatmagicError, match=reason):
        llm.load(tmp_path / "chat.jsonl")
    assert llm.history == [("a", "b")]


def test_models_are_registered_by_name_and_not_kept_alive(fake):
    registered.clear()
    first, second = ChatLLM(fake), ChatLLM(fake, name="second")
    assert list(registered) == ["fake", "second"] and fake.asked == []  # no hidden prompt
    first = ChatLLM(fake)
    assert list(registered) == ["second", "fake"] and registered["fake"] is first
    del first, second
    assert not registered


def test_reset_forgets_and_frees(fake):
    llm = ChatLLM(fake, history=[("a", "b")])
    llm.reset()
    assert llm.history == [] and fake.forgotten == 1


def test_thinking_is_told_where_somebody_says(fake):
    llm = ChatLLM(fake, stream=False)
    llm("a"), llm("b", thinking=True)
    llm.thinking = False
    llm("c"), llm("d", thinking=True), llm.chat(build_messages("e"))
    told = [options.get("thinking") for _, options in fake.asked]
    assert told == [None, True, False, True, False]


def test_a_model_without_a_template_here_has_no_prompt_to_show(fake):
    with pytest.raises(ChatmagicError, match="only the server has the chat template of fake"):
        ChatLLM(fake).build_prompt(build_messages("a"))
