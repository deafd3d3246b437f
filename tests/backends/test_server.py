"""ChatLLM over a server: what is asked of it, how it may answer, and what it refuses, breaks off or does not have."""

import re
import subprocess
import sys
import time
import traceback

import pytest

from chatmagic import ChatmagicError, build_messages, connect
from chatmagic.conversation.llm import Interrupted
from chatmagic.conversation.pieces import Notice, Thought
from fake_server import delta, refuses, running, says, sends, usage
from generation import interrupt_after


@pytest.fixture
def server(monkeypatch):
    for variable in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "CHATMAGIC_KEY_127_0_0_1"):
        monkeypatch.delenv(variable, raising=False)
    with running() as server:
        yield server


@pytest.fixture
def pauses(monkeypatch):
    """The seconds that a busy server was waited for, none of them really."""
    pauses = []
    monkeypatch.setattr("chatmagic.backends.server.sleep", pauses.append)
    return pauses


def ask(server, *moods, query="hi", **options):
    """A quiet ChatLLM's reply to one question in these moods."""
    server.moods = list(moods)
    return connect(server.url, "parrot", stream=False)(query, **options)


def test_a_server_streams_and_counts(server, capsys):
    server.moods = [says(finish_reason="length")]
    llm = connect(server.url, "parrot", system="s", max_chat_rounds=5)
    reply = llm("hi", temperature=0.5, top_p=0.9, seed=3, max_new_tokens=3)
    assert reply == "你好!"
    assert capsys.readouterr().out == "你好!\n[cut after 3 tokens: --max-new-tokens (max_new_tokens=) allows more]\n"
    assert (reply.stats.tokens_in, reply.stats.tokens_out, reply.stats.stop_reason) == (9, 3, "length")
    assert llm.history == [("hi", "你好!")]
    asked = server.requests[-1]
    assert asked["messages"] == build_messages("hi", system="s")
    assert (asked["temperature"], asked["top_p"], asked["seed"], asked["max_tokens"]) == (0.5, 0.9, 3, 3)
    llm("again", greedy=True, stream=False)
    assert server.requests[-1]["messages"] == build_messages("again", [("hi", "你好!")], "s")
    assert server.requests[-1]["temperature"] == 0 and server.requests[-1]["max_tokens"] == 512


ODD = {
    "null where a list or an object is expected": [
        {"choices": None},
        {"choices": [{"index": 0, "delta": None, "finish_reason": None}]},
        {"choices": [None]},
        {"choices": [{"index": 0}], "usage": None},
        delta("你好!", "stop"),
    ],
    "content as a list": [delta([{"type": "text", "text": "你"}, {"type": "text", "text": "好!"}], "stop")],
    "no finish reason, but an end": [delta("你好!"), "data: [DONE]"],
    "an empty finish reason": [delta("你好", ""), delta("!", ""), "data: [DONE]"],
    "no blank after data:": ['data:{"choices": [{"delta": {"content": "你好!"}, "finish_reason": "stop"}]}'],
    "lines without blank ones between": [
        'data: {"choices": [{"delta": {"content": "你"}}]}\ndata: {"choices": [{"delta": {"content": "好!"}}]}',
        "data: [DONE]",
    ],
    "an event over two lines": ['data: {"choices": [{"delta":\ndata: {"content": "你好!"}}]}', "data: [DONE]"],
    "carriage returns": ['data: {"choices": [{"delta": {"content": "你好!"}}]}\r\n\r', "data: [DONE]\r"],
    "comments, pings and names of events": [": ping", "event: message", delta("你好!"), ": ping", "data: [DONE]"],
    "a delta that is text": [{"choices": [{"delta": "你好!"}]}, "data: [DONE]"],
    "choices that are text": [{"choices": ["你好", "!"]}, "data: [DONE]"],
    "one choice, and no list": [{"choices": {"delta": {"content": "你好!"}, "finish_reason": "stop"}}],
    "choices by their numbers": [{"choices": {"0": {"delta": {"content": "你好!"}, "finish_reason": "stop"}}}],
    "parts of all kinds": [delta([None, "你", {"type": "output_text", "text": {"value": "好!"}}, True], "stop")],
    "a finish reason that is none": [delta("你好!", True), "data: [DONE]"],
    "a finish reason that is an object": [delta("你好!", {"type": "stop"}), "data: [DONE]"],
    "a finish reason in capitals": [delta("你好!", "STOP")],
    "counts that are text": [delta("你好!", "stop"), usage("9", "3", reasoning_tokens="0"), "data: [DONE]"],
    "counts that are none": [delta("你好!", "stop"), {"usage": {"completion_tokens_details": []}}, "data: [DONE]"],
    "the whole once more": [
        delta("你好!"),
        {"choices": [{"delta": {}, "message": {"content": "你好!"}, "finish_reason": "stop"}]},
    ],
    "a second choice": [
        {"choices": [{"index": 0, "delta": {"content": "你好!"}}, {"index": 1, "delta": {"content": "Hi"}}]},
        "data: [DONE]",
    ],
    "a ping that is an event": ["data: ping", delta("你好!", "stop")],
    "objects, a line each": [
        '{"choices": [{"delta": {"content": "你好"}}]}\n'
        '{"choices": [{"delta": {"content": "!"}, "finish_reason": "stop"}]}'
    ],
    "a whole reply in an event": [
        {"choices": [{"message": {"role": "assistant", "content": "你好!"}, "finish_reason": "stop"}]}
    ],
    "a whole reply, and no stream": [
        '{\n "choices": [\n {"message": {"content": "你好!"}}],\n "usage": {"prompt_tokens": 9}}'
    ],
}


@pytest.mark.parametrize("lines", ODD.values(), ids=ODD)
def test_however_a_reply_is_written(server, lines):
    reply = ask(server, sends(*lines))
    assert (reply, reply.stats.stop_reason, reply.notices) == ("你好!", "stop", [])


def test_a_line_separator_in_a_reply_cuts_no_line(server):
    assert ask(server, sends('data: {"choices": [{"delta": {"content": "a\u2028b"}}]}', "data: [DONE]")) == "a\u2028b"


SAID = {
    "in the stream": sends({"error": {"message": "the GPU fell over", "code": 500}}),
    "as vLLM once wrote it": sends({"object": "error", "message": "the GPU fell over"}),
    "by an event's name": sends("event: error\ndata: the GPU fell over"),
    "under status 200": refuses(200, "the GPU fell over"),
    "under status 200, as a text": refuses(200, {"error": "the GPU fell over"}),
    "in a list": refuses(200, [{"error": {"message": "the GPU fell over"}}]),
    "as FastAPI writes it": refuses(500, {"detail": [{"loc": ["body", "x"], "msg": "the GPU fell over"}]}),
    "as MiniMax writes it": refuses(
        200, {"choices": None, "base_resp": {"status_code": 1, "status_msg": "the GPU fell over"}}
    ),
    "as a page": refuses(502, "<html><head><title>the GPU fell over</title></head><body>nginx</body></html>"),
    "as plain text": refuses(500, ["the GPU fell over"]),
}


@pytest.mark.parametrize("mood", SAID.values(), ids=SAID)
def test_an_error_is_shown_in_the_servers_own_words(server, mood):
    with pytest.raises(ChatmagicError, match=r"^the server at http\S+ failed \(\d+\): .*the GPU fell over$"):
        ask(server, mood)


@pytest.mark.parametrize("key", ["token", "max", "stream", "k"])
def test_a_key_that_is_a_word_hides_no_other(server, key):
    """A server on this machine takes any; of an error that repeats it no more is hidden than the key."""
    server.moods = [refuses(400, UNSUPPORTED), refuses(400, f"no. {key}, and stream_options unknown"), says()]
    assert connect(server.url, "parrot", key=key, stream=False)("hi") == "你好!"
    server.moods = [refuses(400, f"what is {key}: max_tokens stream")]
    with pytest.raises(ChatmagicError, match="what is …: max_tokens"):
        connect(server.url, "parrot", key=key, stream=False)("hi")


def test_what_is_no_reply_at_all(server):
    with pytest.raises(ChatmagicError, match="answered what is no reply: 'Hello from port 8000'"):
        ask(server, sends("Hello from port 8000"))
    with pytest.raises(ChatmagicError, match="answered what is no reply: ''$"):
        ask(server, sends())


UNSUPPORTED = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)


@pytest.mark.parametrize(
    "words, left, status",
    [
        (UNSUPPORTED, {"max_completion_tokens", "stream", "stream_options"}, 400),
        ("body.stream_options: Extra inputs are not permitted", {"max_tokens", "stream"}, 422),
        ("unknown field: stream_options", {"max_tokens", "stream"}, 400),
        ("Streaming is not supported by this backend", {"max_tokens"}, 501),
        ("该模型不支持 max_tokens", {"max_completion_tokens", "stream", "stream_options"}, 400),
        ("use max_completion_tokens, not max_tokens", {"max_completion_tokens", "stream", "stream_options"}, 400),
        ("参数错误：stream_options", {"max_tokens", "stream"}, 400),
        ("Invalid parameter: stream_options", {"max_tokens", "stream"}, 400),
        ("[] is not of type 'object' - 'stream_options'", {"max_tokens", "stream"}, 400),
        ("该模型暂不支持流式输出（stream）", {"max_tokens"}, 400),
        ("Streaming responses cannot be requested for this model", {"max_tokens"}, 400),
    ],
)
def test_what_a_server_does_not_know_is_said_otherwise_once_and_for_all(server, words, left, status):
    server.moods = [refuses(status, words), says()]
    llm = connect(server.url, "parrot", stream=False)
    assert llm("hi") == "你好!" and llm("again") == "你好!"
    assert len(server.requests) == 3
    for asked in server.requests[1:]:
        assert asked.keys() == {"model", "messages"} | left
        assert 512 in asked.values()


def test_both_may_be_refused_one_after_the_other(server):
    assert ask(server, refuses(400, UNSUPPORTED), refuses(400, "stream_options is unknown"), says()) == "你好!"


def test_what_changes_the_meaning_is_never_left_out(server):
    with pytest.raises(ChatmagicError, match="Unsupported value: 'temperature'"):
        ask(server, refuses(400, "Unsupported value: 'temperature' does not support 0.5 with this model."))
    assert len(server.requests) == 1


OVERFLOWS = [
    "This model's maximum context length is 100 tokens. However, you requested 120 tokens",
    "request (13392 tokens) exceeds the available context size (8192 tokens), try increasing it",
    "The input (120 tokens) is longer than the model's context length (100 tokens)",
    "Range of input length should be [1, 30720]",
    "length of prompt_tokens (120) must be less than max_seq_len (100)",
    "Your input exceeds the context window of this model",
    "Input length 120 exceeds the maximum allowed length 100",
    "The input token count exceeds the maximum number of tokens allowed",
    "inputs tokens + max_new_tokens must be <= 100. Given: 120 inputs tokens and 20 max_new_tokens",
    "tokens in request more than max tokens allowed",
    "Please reduce the length of the messages or completion.",
    "输入长度超过模型最大上下文限制",
    "模型上下文长度超限，请缩短输入",
    "messages 参数非法，token 数超过上限",
    "对话过长",
]


@pytest.mark.parametrize("words", OVERFLOWS)
def test_a_full_context_leaves_out_the_oldest_rounds_and_says_so(server, capsys, words):
    """And the next question does not begin with what did not fit."""

    def holds_five(handler, request):
        (says() if len(request["messages"]) <= 5 else refuses(400, words))(handler, request)

    server.moods = [holds_five]
    rounds = [(str(n), str(n)) for n in range(7)]
    llm = connect(server.url, "parrot", history=rounds)
    assert llm("hi") == "你好!"
    assert server.requests[-1]["messages"] == build_messages("hi", rounds[-1:])
    out = capsys.readouterr().out
    assert out == "你好!\n[parrot's context is full: the 6 oldest rounds were left out]\n"
    assert llm.history == [*rounds, ("hi", "你好!")]
    asked = len(server.requests)
    assert llm("more").notices == [] and len(server.requests) == asked + 1
    assert server.requests[-1]["messages"] == build_messages("more", [rounds[-1], ("hi", "你好!")])


def test_a_question_that_is_too_long_by_itself(server):
    llm = connect(server.url, "parrot", history=[("a", "b")], stream=False)
    server.moods = [refuses(400, OVERFLOWS[0])]
    with pytest.raises(ChatmagicError, match="too long: This model's maximum context length is 100.*%chat_reset"):
        llm("hi")
    assert llm.history == [("a", "b")]


def test_a_context_that_the_server_does_not_tell_of(server):
    """Ollama cuts a long prompt in silence: with `context` the rounds that do not fit are left out here."""
    llm = connect(server.url, "parrot", context=100, max_new_tokens=20, stream=False)
    llm.history = [(f"{n}" * 120, "x") for n in range(4)]
    server.moods = [says(tokens_in=80)]
    llm("hi")
    assert [len(message["content"]) for message in server.requests[-1]["messages"]] == [120, 1, 2]
    llm.history = [(f"{n}" * 120, "x") for n in range(4)]
    server.moods = [says(tokens_in=12)]  # of 18 bytes and what is around them
    llm("hello", remember=False), llm("hi")
    assert len(server.requests[-1]["messages"]) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_waited_for_and_the_reader_told(server, pauses, capsys, status):
    server.moods = [refuses(status, "slow down", Retry_After="7"), refuses(status, "slow down"), says()]
    reply = connect(server.url, "parrot")("hi")
    assert reply == "你好!" and pauses == [7.0, 14.0]
    assert capsys.readouterr().out == (
        "[127.0.0.1 is busy (slow down): asked again in 7 s]\n[127.0.0.1 is busy (slow down): asked again in 14 s]\n"
        "你好!\n"
    )


def test_a_server_that_stays_busy(server, pauses):
    with pytest.raises(ChatmagicError, match=r"is busy \(slow down\); ask again in 30 s"):
        ask(server, refuses(429, "slow down"))
    assert 60 < sum(pauses) <= 120
    with pytest.raises(ChatmagicError, match="ask again in 3600 s"):
        ask(server, refuses(429, "slow down", Retry_After="3600"))


def test_a_date_may_say_when_to_ask_again(server, pauses):
    from email.utils import formatdate

    ask(server, refuses(429, "slow down", Retry_After=formatdate(time.time() + 20, usegmt=True)), says())
    assert 17 < pauses[0] <= 20


def test_no_waiting_mends_an_empty_purse(server, pauses):
    with pytest.raises(ChatmagicError, match="You exceeded your current quota"):
        ask(server, refuses(429, "You exceeded your current quota, please check your plan and billing details"))
    assert pauses == []


def test_stop_ends_the_waiting_for_a_busy_server(server):
    interrupt_after(0.3)
    start = time.perf_counter()
    with pytest.raises(Interrupted):
        ask(server, refuses(429, "slow down", Retry_After="60"))
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize(
    "finish, notice",
    [
        ("length", "cut after 3 tokens: --max-new-tokens"),
        ("content_filter", "cut after 3 tokens by a filter"),
        ("sensitive", "cut after 3 tokens by a filter"),
        ("SAFETY", "cut after 3 tokens by a filter"),
        ("MAX_TOKENS", "cut after 3 tokens: --max-new-tokens"),
        ("insufficient_system_resource", "ended by the server after 3 tokens: insufficient_system_resource"),
    ],
)
def test_a_reply_that_did_not_end_by_itself_says_so_in_a_line(server, capsys, finish, notice):
    server.moods = [says(finish_reason=finish)]
    llm = connect(server.url, "parrot")
    reply = llm("hi", max_new_tokens=3)
    assert capsys.readouterr().out.startswith(f"你好!\n[{notice}") and reply.notices[0].startswith(notice)
    assert llm.history == [("hi", "你好!")] and reply == "你好!"


def test_a_refusal_is_shown_in_the_models_words(server):
    reply = ask(server, sends(delta(None, refusal="I can't help with that."), delta(None, "stop"), "data: [DONE]"))
    assert reply == "I can't help with that." and reply.stats.stop_reason == "refused"
    assert reply.notices == ["the model refused to answer"]


EMPTY = {
    "nothing": (sends(delta("", "stop"), usage(9, 0), "data: [DONE]"), "the reply is empty, and is not remembered"),
    "blanks": (sends(delta(" \n", "stop"), "data: [DONE]"), "the reply is empty"),
    "filtered": (sends(delta("", "content_filter"), "data: [DONE]"), "not remembered: cut by a filter"),
    "a tool's name": (sends(delta(None, "tool_calls"), "data: [DONE]"), "ended by the server: tool_calls"),
    "all thought": (
        sends(delta(None, reasoning_content="Hm"), delta("", "length"), usage(9, 20), "data: [DONE]"),
        r"nothing was said, all went into the thought after 20 tokens; not remembered\. --max-new.*--thinking off",
    ),
    "all thought in secret": (
        sends(delta("", "length"), usage(9, 20, reasoning_tokens=20), "data: [DONE]"),
        "nothing was said, all went into the thought after 20 tokens",
    ),
}


@pytest.mark.parametrize("mood, notice", EMPTY.values(), ids=EMPTY)
def test_an_empty_reply_is_not_remembered_and_says_why(server, mood, notice):
    server.moods = [mood]
    llm = connect(server.url, "parrot", history=[("a", "b")], stream=False)
    reply = llm("hi")
    assert not reply.strip() and llm.history == [("a", "b")]
    assert re.search(notice, reply.notices[-1])


THOUGHTS = {
    "reasoning_content": [
        delta(None, reasoning_content="Hm, "),
        delta(None, reasoning_content="yes."),
        delta("\n\nHi"),
    ],
    "reasoning": [delta(None, reasoning="Hm, "), delta("", reasoning="yes."), delta("Hi")],
    "both at once": [delta(None, reasoning="Hm, yes.", reasoning_content="Hm, yes."), delta("Hi")],
    "parts": [delta([{"type": "thinking", "thinking": [{"type": "text", "text": "Hm, yes."}]}]), delta("Hi")],
    "tags": [delta(piece) for piece in ("<th", "ink>\nHm, ", "yes.", "\n</thi", "nk>\n", "\nHi")],
    "under thinking": [delta(None, thinking="Hm, yes."), delta("Hi")],
    "an object": [delta(None, reasoning={"text": "Hm, yes."}), delta("Hi")],
    "other tags": [delta(piece) for piece in ("<think", "ing>\nHm, ", "yes.", "\n</thinking>", "\nHi")],
    "a tag that only closes": [delta(piece) for piece in ("Hm, ", "yes.\n</think>", "\n\nHi")],
    "whole": ['{"choices": [{"message": {"content": "Hi", "reasoning_content": "Hm, yes."}}]}'],
    "whole with tags": ['{"choices": [{"message": {"content": "<think>Hm, yes.</think>Hi"}}]}'],
}


@pytest.mark.parametrize("lines", THOUGHTS.values(), ids=THOUGHTS)
def test_a_thought_is_apart_however_it_is_sent(server, lines):
    server.moods = [sends(*lines, *["data: [DONE]"] * isinstance(lines[0], dict))]
    llm = connect(server.url, "parrot", stream=False)
    reply = llm("hi")
    assert (reply, reply.thinking) == ("Hi", "Hm, yes.") and llm.history == [("hi", "Hi")]


def test_words_that_mention_a_tag_stay_words(server):
    text = "Write `</think>` after `<think>`, as in\n<think>\nHm\n</think>\n\nYes."
    assert ask(server, says(text)) == text


def test_pieces_tell_what_they_are(server):
    pieces = []
    server.moods = [sends(*THOUGHTS["tags"], delta("", "length"), "data: [DONE]")]
    connect(server.url, "parrot")("hi", stream=pieces.append)
    kinds = [type(piece) for piece in pieces if piece]
    assert kinds[0] is Thought and kinds[-1] is Notice and str in kinds


TOLD = [
    ("vllm", True, {"chat_template_kwargs": {"enable_thinking": True, "thinking": True}}),
    ("ollama", False, {"reasoning_effort": "none"}),
    ("deepseek", False, {"thinking": {"type": "disabled"}}),
    ("dashscope", True, {"enable_thinking": True}),
    ("siliconflow", False, {"enable_thinking": False}),
]


@pytest.mark.parametrize("name, thinking, told", TOLD)
def test_each_kind_of_server_is_told_to_think_in_its_way(server, name, thinking, told):
    from chatmagic.backends.presets import SERVERS

    llm = connect(server.url, "parrot", stream=False)
    llm.backend._connection.server = SERVERS[name]
    llm("hi", thinking=thinking)
    assert told.items() <= server.requests[-1].items()
    if budgets := SERVERS[name].budgets:
        llm("hi", thinking_budget=100)
        assert {budget: 100 for budget in budgets}.items() <= server.requests[-1].items()
    else:
        with pytest.raises(ChatmagicError, match="takes no thinking_budget; max_new_tokens"):
            llm("hi", thinking_budget=100)


def test_a_budget_that_is_not_kept_is_told(server):
    mood = sends(delta(None, reasoning="Hm"), delta("Hi", "stop"), usage(9, 210, reasoning_tokens=200), "data: [DONE]")
    assert ask(server, mood, thinking_budget=50).notices == ["thought 200 tokens: the server does not keep to a budget"]
    assert ask(server, mood, thinking_budget=190).notices == []


def test_tokens_per_second_are_of_those_that_were_timed(server):
    counted = usage(9, 103, reasoning_tokens=100)
    hidden = ask(server, sends(delta("a"), delta("b"), delta("c", "stop"), counted, "data: [DONE]", delay=0.05))
    assert hidden.stats.tokens_thought == 100 and hidden.stats.tokens_at_once == 101
    assert 5 < hidden.stats.tokens_per_second < 40  # of the two after the first, not of 103
    whole = ask(server, refuses(200, {"choices": [{"message": {"content": "Hi"}}], "usage": counted["usage"]}))
    assert whole.stats.tokens_per_second == 103 / whole.stats.seconds


def test_the_key_is_nowhere_to_be_seen(server, tmp_path, capsys):
    def wants_sesame(handler, request):
        if handler.headers["Authorization"] != "Bearer sesame":
            return refuses(401, f"wrong key: {handler.headers['Authorization']}")(handler, request)
        mood = refuses(400, "maximum context length is 100") if request["messages"][-1]["content"] == "x" else says()
        mood(handler, request)

    server.moods = [wants_sesame]
    llm = connect(server.url, "parrot", key="sesame")
    llm("hi")
    llm.save(tmp_path / "chat.jsonl")
    seen = (tmp_path / "chat.jsonl").read_text() + repr(llm) + repr(vars(llm)) + repr(vars(llm.backend))
    seen += repr(vars(llm.backend._connection))
    for key, query in [("sesame-seed", "hi"), ("sesame", "x")]:
        with pytest.raises(ChatmagicError) as caught:
            connect(server.url, "parrot", key=key)(query)
        seen += "".join(traceback.format_exception(caught.value))
    assert "sesame" not in seen + "".join(capsys.readouterr())


BREAKING_OFF = {
    "ends early": sends(*map(delta, "你好!")),
    "dies": sends(*map(delta, "你好!"), length=9999),
    "sends half an event": sends(*map(delta, "你好!"), 'data: {"choices": [{"ind'),
}


@pytest.mark.parametrize("mood", BREAKING_OFF.values(), ids=BREAKING_OFF)
def test_a_server_that_breaks_off(server, capsys, mood):
    server.moods = [mood, says()]
    llm = connect(server.url, "parrot")
    with pytest.raises(ChatmagicError, match=f"{server.url} broke off in the middle of a reply; ask again"):
        llm("hi")
    assert capsys.readouterr().out == "你好!\n" and llm.history == []
    assert llm("hi") == "你好!"


def test_a_server_that_falls_asleep(server):
    server.moods = [sends(delta("你"), delta("好"), delay=1)]
    with pytest.raises(ChatmagicError, match="sent nothing for 0.2 s: .*timeout="):
        connect(server.url, "parrot", timeout=0.2, stream=False)("hi")


def test_an_option_no_server_has(server):
    with pytest.raises(ChatmagicError, match="no option 'top_k'.*extra_body"):
        connect(server.url, "parrot")("hi", top_k=5)


def test_stop_ends_a_servers_reply(server):
    server.moods = [says(delay=10), says()]
    llm = connect(server.url, "parrot")
    start = time.perf_counter()
    with pytest.raises(Interrupted) as caught:
        llm("hi", stream=lambda piece: interrupt_after(0.2))  # while the next is waited for
    assert time.perf_counter() - start < 9 and caught.value.reply == "你"
    assert llm("hi") == "你好!"


def test_chatting_with_a_server_imports_no_torch(server):
    """Where there is one; where there is none: tests/test_without_torch.py."""
    code = (
        "import sys, chatmagic; print(chatmagic.connect(sys.argv[1], 'm', stream=False)('hi'))\n"
        "assert not {'torch', 'transformers', 'IPython'} & set(sys.modules), set(sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code, server.url], text=True) == "你好!\n"
