"""What a reply is, beside its words: the JSON and the code in it, what it cost, and what is said of how it ended."""

import pytest

from chatmagic.conversation.reply import Reply, Stats, Totals, ending
from chatmagic.errors import ChatmagicError

# --- the JSON in it


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [1, "名"]}',
        '\n  {"a": [1, "名"]}\n',
        '```json\n{"a": [1, "名"]}\n```',
        'Here it is:\n\n```\n{"a": [1, "名"]}\n```\nAnything else?',
        '~~~JSON\n{"a": [1, "名"]}\n~~~',
        '```json\n{"a": [1, "名"]}',  # cut before the fence is closed
        '`{"a": [1, "名"]}`',
        '```json{"a": [1, "名"]}```',
        '```python\nprint(1)\n```\n```json\n{"a": [1, "名"]}\n```',  # the first that is JSON
        '   ````json\n{"a":\n [1, "名"]}\n   ````\n',
    ],
)
def test_json_is_found_however_it_is_wrapped(text):
    assert Reply(text).json() == {"a": [1, "名"]}


def test_of_two_fences_the_first_counts_and_a_fence_before_the_rest():
    assert Reply("```\n[1]\n```\n```\n[2]\n```").json() == [1]
    assert Reply("7").json() == 7


@pytest.mark.parametrize(
    "text, told",
    [
        ("Sure! {}", "Expecting value: line 1 column 1 .*there it reads 'Sure! {}'. It begins 'Sure! {}'"),
        ('{"a": 1', "there it reads ''.*--max-new-tokens"),
        ("Look:\n```json\n{'a': 1}\n```", "there it reads .'a': 1}.*It begins .Look:"),  # of the fence, not the whole
        ("", "not JSON"),
    ],
)
def test_what_is_no_json_is_told_with_the_place(text, told):
    with pytest.raises(ChatmagicError, match=told):
        Reply(text).json()


@pytest.mark.parametrize("wrap", ["{}", "```json\n{}\n```"])
def test_json_that_is_nested_too_deep_is_told_as_well(wrap):
    with pytest.raises(ChatmagicError, match="brackets within brackets") as error:
        Reply(wrap.format("[" * 200_000)).json()
    assert len(str(error.value)) < 100


# --- the code in it


@pytest.mark.parametrize(
    "text, code",
    [
        ("no code", ""),
        ("`x = 1`", ""),
        ("```\nx = 1\n```", "x = 1"),
        ("```python\nx = 1\n\ny = 2\n```", "x = 1\n\ny = 2"),
        ("```Python title=a.py\nx = 1\n```", "x = 1"),
        ("``` py\nx = 1\n```", "x = 1"),
        ("```bash\nls\n```", ""),
        ("``` bash\nls\n```", ""),
        ("First:\n```python3\nx = 1\n```\nthen\n```sh\nls\n```\nand\n~~~ipython\ny = 2\n~~~\n", "x = 1\n\ny = 2"),
        ("```python\nif x:\n    y\n", "if x:\n    y"),  # cut before the fence is closed
        ("````python\n'''\n```\nnot the end\n```\n'''\n````\nz", "'''\n```\nnot the end\n```\n'''"),
        ("~~~python\n```\n~~~", "```"),
        ("   ```python\nx = 1\n   ```  \nafter", "x = 1"),
        ("    ```python\n    x = 1\n    ```", ""),  # Markdown's code by its indent, which shows a fence
        ("```python\nx = '```'\n```", "x = '```'"),
        ("```python\nx = 1\n`````\nafter", "x = 1"),  # may be closed by more
        ("a ```python\nx = 1\n", ""),  # a fence begins its line
    ],
)
def test_the_python_code_is_that_of_its_fences(text, code):
    assert Reply(text).code() == code


# --- what it cost


def test_the_speed_is_of_the_tokens_that_were_timed():
    assert Stats(tokens_out=11, seconds_to_first_token=1.0, seconds=3.0).tokens_per_second == 5.0
    assert Stats(tokens_out=11, tokens_at_once=3, seconds_to_first_token=1.0, seconds=3.0).tokens_per_second == 4.0
    assert Stats(tokens_out=12, tokens_at_once=12, seconds_to_first_token=3.0, seconds=3.0).tokens_per_second == 4.0
    assert Stats(tokens_out=2, seconds_to_first_token=1.0, seconds=3.0).tokens_per_second == 0.5
    for unknown in (Stats(), Stats(tokens_out=11), Stats(tokens_out=1, seconds_to_first_token=1.0, seconds=3.0)):
        assert unknown.tokens_per_second is None


def test_a_line_of_it_says_what_is_not_known():
    told = Stats(20, 15, 11, 4, 1, 1.0, 3.0, "length")
    assert str(told) == "20 tokens in (15 kept), 11 out (4 of them thought), first after 1.00 s, 5.0 tokens/s, length"
    assert str(Stats()) == "? tokens in (0 kept), ? out, first after ? s, ? tokens/s, stop"


def test_totals_count_a_server_that_tells_nothing():
    totals = Totals()
    totals.add(Stats(tokens_in=3, tokens_out=2, seconds=1.5))
    totals.add(Stats(seconds=0.5))
    assert totals == Totals(replies=2, tokens_in=3, tokens_out=2, seconds=2.0)


# --- how it ended

MORE = "--max-new-tokens (max_new_tokens=) allows more"


@pytest.mark.parametrize(
    "said, thinking, stats, told",
    [
        ("Hi.", "", Stats(tokens_out=3), None),
        ("Hi.", "Hm.", Stats(tokens_out=9, tokens_thought=5), None),
        ("Hi", "", Stats(tokens_out=10, stop_reason="length"), f"cut after 10 tokens: {MORE}"),
        ("Hi", "", Stats(stop_reason="length"), f"cut: {MORE}"),
        (
            "Hi",
            "",
            Stats(tokens_out=9, stop_reason="length"),
            "cut after 9 tokens: the context is full, and %chat_reset forgets the conversation",
        ),
        ("Hi", "", Stats(tokens_out=4, stop_reason="filtered"), "cut after 4 tokens by a filter"),
        ("No.", "", Stats(tokens_out=4, stop_reason="refused"), "the model refused to answer"),
        ("Hi", "", Stats(tokens_out=4, stop_reason="tool_calls"), "ended by the server after 4 tokens: tool_calls"),
        ("", "", Stats(tokens_out=1), "the reply is empty, and is not remembered"),
        (" \n", "", Stats(tokens_out=1), "the reply is empty, and is not remembered"),
        (
            "",
            "",
            Stats(tokens_out=4, stop_reason="filtered"),
            "the reply is empty, and is not remembered: cut after 4 tokens by a filter",
        ),
        # With nothing said, fewer tokens than were allowed are no sign of a full context.
        (
            "",
            "",
            Stats(tokens_out=4, stop_reason="length"),
            f"the reply is empty, and is not remembered: cut after 4 tokens: {MORE}",
        ),
        (
            " ",
            "Hm.",
            Stats(tokens_out=10, stop_reason="length"),
            f"nothing was said, all went into the thought after 10 tokens; not remembered. {MORE}, or --thinking off",
        ),
        (
            "",
            "",
            Stats(tokens_thought=7),
            f"nothing was said, all went into the thought; not remembered. {MORE}, or --thinking off",
        ),
    ],
)
def test_its_reader_is_told_how_it_ended(said, thinking, stats, told):
    reply = Reply(said)
    reply.thinking, reply.stats = thinking, stats
    assert ending(reply, max_new_tokens=10) == told
