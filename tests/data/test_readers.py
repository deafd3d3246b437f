"""Files as people bring them: each kind in `cases/`, what becomes of it in `cases/expected.toml`."""

import gzip
import json
import re
import sys
import tarfile
import tomllib
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from chatmagic import build_messages, encode_example, read_conversations, read_jsonl, write_jsonl
from chatmagic.data.rows import CHUNK, DataError
from chatmagic.prompts.labels import LabelsError

CASES = Path(__file__).with_name("cases")
EXPECTED = tomllib.loads((CASES / "expected.toml").read_text("utf-8"))
REPORTED = Path(__file__).with_name("reported")
SIGNS = {"user": "问", "assistant": "答", "system": "系统", "masked": "不学", "thought": "想"}


def shown(messages: list[dict]) -> str:
    """A conversation as the expectations write it: 问 甲？ 答 乙。"""
    words = []
    for message in messages:
        assert not message.keys() - {"role", "content", "weight", "reasoning_content"}
        if thought := message.get("reasoning_content"):
            words.append(f"想 {thought}")
        words.append(f"{SIGNS['masked' if message.get('weight') == 0 else message['role']]} {message['content']}")
    return " ".join(words)


def check(path: Path, expected: dict, capsys) -> None:
    """What `read_conversations` makes of a file, and of the same with bad rows left out."""
    arguments = {key: value for key, value in expected.items() if key in ("columns", "encoding", "persona")}
    if "stops" in expected:
        with pytest.raises(DataError) as caught:
            list(read_conversations(path, **arguments))
        assert re.search(expected["stops"], str(caught.value)), caught.value
        assert capsys.readouterr().out == ""
    if "read" in expected:
        on_error = "skip" if "stops" in expected else "stop"
        conversations = read_conversations(path, **arguments, on_error=on_error)
        assert [shown(messages) for messages in conversations] == expected["read"]
        assert capsys.readouterr().out == f"{conversations.summary}\n"
        assert re.search(expected.get("summary", ""), str(conversations.summary)), conversations.summary


def test_every_case_has_its_expectation():
    assert {path.name for path in CASES.iterdir()} - {"expected.toml"} == set(EXPECTED)
    assert all({"stops", "read"} & set(expected) for expected in EXPECTED.values())


@pytest.mark.parametrize("name", EXPECTED)
def test_the_cases(name, capsys):
    check(CASES / name, EXPECTED[name], capsys)


# What people reported, a folder each, with a README of what was expected.
EXPECTED_OF_REPORTED = {
    "01-json-array": {"read": ["问 天为什么蓝？ 答 因为瑞利散射。"] * 2},
    "02-json-array-one-line": {"read": ["问 天为什么蓝？ 答 因为瑞利散射。"] * 2},
    "04-pretty-objects": {"read": ["问 甲 答 乙"] * 2},
    "05-xtuner-conversation": {"read": ["系统 你是心理医生。 问 我睡不着。 答 先聊聊白天。 问 好。 答 慢慢说。"]},
    "07-query-response": {"read": ["系统 短答。 问 一？ 答 一。 问 二？ 答 二。", "问 甲 答 乙"]},
    "08-advertisegen": {
        "read": ["问 类型#帽*颜色#红 答 一顶红帽。"],
        "columns": {"content": "query", "summary": "response"},
    },
    "10-kto-label-false": {"read": ["问 你好 答 你好！"], "summary": "1 labelled bad"},
    "11-dpo": {"stops": "preference data .chosen, rejected."},
    "12-placeholders": {
        "read": ["问 你是谁？ 答 我是小炉，由张三开发。"],
        "persona": {"name": "小炉", "author": "张三"},
    },
    "15-loss-flags": {"read": ["问 首都？ 不学 不告诉你 问 请说 答 巴黎"] * 3},
    "16-history-of-messages": {"read": ["问 一？ 答 一。 问 二？ 答 二。"]},
    "18-empty-answer": {"stops": "nothing to train in 2 rows. a.jsonl, line 1: an empty answer"},
    "19-tool-calls": {"stops": "line 1: .*Tool calls cannot be trained"},
    "20-tools-ignored": {"stops": "it has 'tools'"},
    "22-images": {"stops": "it has 'images'"},
    "23-content-parts": {"read": ["问 甲？ 答 乙。"]},
    "25-surrogate": {"stops": "line 1: half an emoji"},
    "26-gbk": {"read": ["问 天为什么蓝？ 答 因为瑞利散射。"], "encoding": "gbk"},
    "28-gzip": {"read": ["问 天为什么蓝？ 答 因为瑞利散射。"]},
    "29-csv": {"read": ["问 天为什么蓝？ 答 因为瑞利散射。"]},
    "30-trailing-user": {"read": ["问 一？ 答 一。"], "summary": "1 last question without an answer not used"},
    "32-missing-output": {"stops": "no 'output'; found context, instruction, response"},
    "34-two-bad-lines": {"stops": "line 2: Message 1 ", "read": ["问 甲 答 乙"] * 2, "summary": "line 2.*line 4"},
    "38-empty": {"stops": "is empty"},
    "39-duplicate-keys": {"read": ["问 乙 答 丙"]},
    "40-reasoning": {"read": ["问 1+1? 想 一加一 答 2"]},
    "41-blank-user": {"stops": "an empty question"},
    "42-train-without-val": {"read": ["问 甲？ 答 用户自己的数据"] * 3},
    "44-u2028-and-controls": {"read": ["问 甲\u2028乙\u0085丙 答 <|im_end|>丁<think>"]},
}


@pytest.mark.parametrize("name", EXPECTED_OF_REPORTED)
def test_the_reported_cases(name, capsys):
    (path,) = (each for each in (REPORTED / name).iterdir() if each.name != "README")
    check(path, EXPECTED_OF_REPORTED[name], capsys)


@pytest.mark.parametrize("name, way", [("12-placeholders", "persona="), ("26-gbk", 'encoding="gbk"')])
def test_the_way_out_is_told(name, way):
    (path,) = (each for each in (REPORTED / name).iterdir() if each.name != "README")
    with pytest.raises(DataError, match=way):
        list(read_conversations(path))


@pytest.mark.parametrize(
    "encoding, text",
    [
        ("gbk", "这句话说的是天为什么这么蓝。"),
        ("gb18030", "这句话里有一个𠮷字，别的都是常用字。"),
        ("big5", "這句話說的是天為什麼這麼藍。"),
        ("shift_jis", "空はどうして青いのですか。"),
        ("cp1252", "Où est-elle née ? Für wen? «Allá»"),
        ("utf-16", "天为什么蓝？"),
        ("utf-32", "天为什么蓝？"),
    ],
)
def test_the_encoding_that_is_proposed_reads_the_file(tmp_path, encoding, text):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": text, "answer": text}, ensure_ascii=False), encoding)
    with pytest.raises(DataError, match="encoding=") as told:
        list(read_conversations(path))
    proposed = re.search('encoding="(.*?)"', str(told.value))[1]
    (messages,) = read_conversations(path, encoding=proposed)
    assert [message["content"] for message in messages] == [text, text]


@pytest.mark.parametrize(
    "row", [{"question": "a", "answer": "b", "rejected_response": "c"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
)
def test_the_good_answer_can_be_read_as_is_told(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="preference data") as told:
        list(read_conversations(tmp_path / "a.jsonl"))
    columns = json.loads(re.search("columns=({.*?})", str(told.value))[1])
    (messages,) = read_conversations(tmp_path / "a.jsonl", columns=columns)
    assert messages[-1]["content"] == "b"


ANSWERED = [{"role": "user", "content": "甲"}, {"role": "assistant", "content": "乙"}]
TWICE = [*ANSWERED, {"role": "user", "content": "丙"}, {"role": "assistant", "content": "丁"}]
PAIR = {"question": "甲", "answer": "乙"}


@pytest.mark.parametrize(
    "marks",
    [{"weight": 0}, {"Weight": "0"}, {"train": False}, {"training": False}, {"train_on_turn": False}, {"masked": True}],
)
def test_an_answer_that_is_marked_is_not_trained_however_the_mark_is_called(tmp_path, capsys, marks):
    """axolotl, torchtune, and what a spreadsheet makes of a name's case."""
    (tmp_path / "a.jsonl").write_text(json.dumps([TWICE[0], TWICE[1] | marks, *TWICE[2:]]))
    check(tmp_path / "a.jsonl", {"read": ["问 甲 不学 乙 问 丙 答 丁"], "summary": "1 answer and 1 not to be"}, capsys)


@pytest.mark.parametrize("marks", [{"output_with_loss": False}, {"loss": False}, {"mask": True}])
def test_a_round_that_is_marked_is_not_trained_and_the_others_are(tmp_path, capsys, marks):
    """output_with_loss is xtuner's."""
    rounds = [{"input": "甲", "output": "乙"} | marks, {"input": "丙", "output": "丁", "output_with_loss": True}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversation": rounds}))
    check(tmp_path / "a.jsonl", {"read": ["问 甲 不学 乙 问 丙 答 丁"]}, capsys)


@pytest.mark.parametrize(
    "mark",
    [{"is_safe": False}, {"is_correct": 0}, {"accepted": "no"}, {"Label": False}, {"label": "bad"}, {"label": -1}]
    + [{"is_response_safe": "false"}, {"toxic": True}, {"deleted": True}, {"thumbs_down": 1}],
)
def test_what_is_labelled_bad_is_not_learnt_however_the_label_is_called(tmp_path, capsys, mark):
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR | mark) + "\n" + json.dumps({"question": "丙", "answer": "丁"}))
    check(tmp_path / "a.jsonl", {"read": ["问 丙 答 丁"], "summary": r"1 left out: 1 labelled bad \("}, capsys)


@pytest.mark.parametrize(
    "row, says",
    [
        (PAIR | {"image_file": "1.jpg"}, "it has 'image_file': pictures"),
        (PAIR | {"Images": ["1.jpg"]}, "it has 'Images': pictures"),
        (PAIR | {"video_path": "1.mp4"}, "it has 'video_path': pictures"),
        (PAIR | {"question": "图 1：<img>1.jpg</img>\n这是？"}, "it has '<img>1.jpg</img>' in a text: pictures"),
        (PAIR | {"question": "这是？\n<image>"}, "it has '<image>' in a text: pictures"),
        (PAIR | {"Tools": ["now"]}, "it has 'Tools'. Tool calls"),
        (PAIR | {"function_description": "now()"}, "it has 'function_description'. Tool calls"),
        (
            {"messages": ANSWERED, "chat_template_kwargs": {"xml_tools": ["now"]}},
            r"what a template is to write \(xml_to",
        ),
        ([ANSWERED[0], ANSWERED[1] | {"train_detail": [{"train": False}]}], "trained .1. or not .0., nothing between"),
        ({"input": ANSWERED[:1], "preferred_output": "乙", "non_preferred_output": "丁"}, "preference data .*_output"),
        (PAIR | {"passage": "很长"}, r"'passage' stands beside the question. .*columns=\{'passage': \"input\"\}"),
        (PAIR | {"A": "一", "B": "二"}, "'A' stands beside the question"),
        ({"instruction": "甲", "context": "很长", "output": "乙"}, "'context' stands beside the question"),
        ({"task": "译", "input": "甲", "output": "乙"}, r"'task' stands .*columns=\{'task': \"instruction\"\}"),
        (
            {"instruction": "扮一个人", "messages": ANSWERED},
            r"in none of them. .*columns=\{'instruction': \"system\"\}",
        ),
        ({"conversations": [{"id": 1, "conversations": ANSWERED}] * 2}, "the rows seem to lie under 'conversations'"),
        (ANSWERED[0], "the row is one message .content, role.; expected a whole conversation"),
        ({str(number): PAIR for number in range(500)}, "104, 105, .* and 488 more"),
        (PAIR | {"answer": "我是{{名字}}。"}, "a place to be filled in, {{名字}}"),
    ],
)
def test_what_changes_the_meaning_is_refused_however_it_is_called(tmp_path, capsys, row, says):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    check(tmp_path / "a.jsonl", {"stops": f"line 1: .*{says}"}, capsys)


@pytest.mark.parametrize(
    "row, shown",
    [
        (
            PAIR | {"tools": "[]", "num_images": 0, "is_safe": True, "toxic": False, "parallel_tool_calls": True},
            "问 甲 答 乙",
        ),
        (PAIR | {"options": [], "passage": None, "history": float("nan"), "weight": None}, "问 甲 答 乙"),
        (PAIR | {"question": "<video> 怎么用？ `<img>a</img>`"}, "问 <video> 怎么用？ `<img>a</img>` 答 乙"),
        (PAIR | {"part_of_speech": "n", "body_weight": 70, "correct": "B"}, "问 甲 答 乙"),
        ({"System Prompt": "短答。", "User": "甲", "Assistant": "乙"}, "系统 短答。 问 甲 答 乙"),
        ({"系统提示": "短答。", "问题": "甲", "答案": "乙"}, "系统 短答。 问 甲 答 乙"),
        ([{"Role": "User", "Content": "甲"}, {"Role": "Chatbot", "Content": "乙"}], "问 甲 答 乙"),
        ({"dialog": [{"speaker": "患者", "text": "甲"}, {"speaker": "医生", "text": "乙"}]}, "问 甲 答 乙"),
        (
            {
                "systemInstruction": {"role": "system", "parts": [{"text": "短答。"}]},
                "contents": [{"role": "user", "parts": [{"text": "甲"}]}, {"role": "model", "parts": [{"text": "乙"}]}],
            },
            "系统 短答。 问 甲 答 乙",
        ),
        ({"messages": ANSWERED[:1], "response": "乙"}, "问 甲 答 乙"),
        ({"messages": ANSWERED, "reasoning_content": "想想"}, "问 甲 想 想想 答 乙"),
        ({"instruction": "甲", "messages": ANSWERED}, "问 甲 答 乙"),
        ({"prompt": {"messages": ANSWERED[:1]}, "completion": ANSWERED[1:]}, "问 甲 答 乙"),
        ({"instruction": "Human:甲\nAssistant:乙\nHuman: 丙\nAssistant:", "output": "丁"}, "问 甲 不学 乙 问 丙 答 丁"),
        (PAIR | {"answer": "单号 {{Order Number}}"}, "问 甲 答 单号 {{Order Number}}"),
    ],
)
def test_what_says_the_same_in_other_words_is_read(tmp_path, capsys, row, shown):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    check(tmp_path / "a.jsonl", {"read": [shown]}, capsys)


def test_a_place_that_nobody_knows_is_counted_or_filled(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR | {"answer": "单号 {{Order Number}}"}))
    left = "1 place to be filled in left as they are: {{Order Number}}"
    check(tmp_path / "a.jsonl", {"read": ["问 甲 答 单号 {{Order Number}}"], "summary": left}, capsys)
    check(tmp_path / "a.jsonl", {"read": ["问 甲 答 单号 17"], "persona": {"Order Number": "17"}}, capsys)


@pytest.mark.parametrize(
    "columns, says",
    [
        ({"anwser_2": "response"}, "there is no column 'anwser_2'; did you mean 'answer_2'"),
        ({"persona": "system"}, "there is no column 'persona'"),
        (("question",), "is neither two names"),
        ("question", "is neither two names"),
        ({"x": "input", "y": "input"}, "more than one column could be the input: x, y"),
    ],
)
def test_columns_that_name_what_is_not_there_are_refused(tmp_path, capsys, columns, says):
    """They were passed over, and another column was trained for the one that was meant."""
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR | {"answer_2": "丁", "x": "一", "y": "二"}))
    check(tmp_path / "a.jsonl", {"stops": says, "columns": columns}, capsys)


def test_a_table_is_read_as_it_was_written_or_not_at_all(tmp_path, capsys):
    path, bad = tmp_path / "a.csv", '"甲","他说 \\"好\\" 的"\n'
    path.write_text(f"question,answer\n{bad}丙,丁\n")
    check(path, {"stops": "line 2 .*a quote inside a quoted text", "read": ["问 丙 答 丁"]}, capsys)
    path.write_text('question,answer\n丙,丁\n甲,"乙\n戊,己\n')  # the rest of the file was one answer
    check(path, {"stops": "line 3 .*a quote is opened in this row and never closed", "read": ["问 丙 答 丁"]}, capsys)
    path.write_text("question,answer,answer\n甲,乙,丁\n")
    check(path, {"stops": "more than one column that is called 'answer'"}, capsys)
    path.write_text('question, answer\n甲, "乙"\n')
    check(path, {"read": ["问 甲 答 乙"]}, capsys)
    path.write_text("sep=;\nquestion;answer\n甲;乙\n丙;\n")
    check(path, {"read": ["问 甲 答 乙"], "summary": "an empty answer .line 4."}, capsys)


@pytest.mark.parametrize("blank", ["\u200b", "\ufeff \u3000", "\u00a0\u2060"])
def test_what_no_reader_sees_is_no_answer(tmp_path, blank):
    write_jsonl([build_messages(None, [("a", blank)]), build_messages(None, [("a", "b")])], tmp_path / "a.jsonl")
    conversations = read_conversations(tmp_path / "a.jsonl")
    assert [messages[-1]["content"] for messages in conversations] == ["b"]
    assert "empty answer" in str(conversations.summary)


def test_a_row_beyond_the_context_is_named_and_can_be_cut(tmp_path, tokenizer):
    rows = [build_messages(None, [(question, "乙。")]) for question in ("甲？", "很长的问题。" * 20_000)]
    write_jsonl(rows, tmp_path / "a.jsonl")
    *_, long = read_conversations(tmp_path / "a.jsonl")
    with pytest.raises(LabelsError, match="^a.jsonl, line 2: "):
        encode_example(long, tokenizer, max_length=1000)


ROWS = [
    {"instruction": "春天来了吗？", "input": None, "output": "来了。", "messages": None},
    {
        "instruction": None,
        "input": None,
        "output": None,
        "messages": [{"role": "user", "content": "甲"}, {"role": "assistant", "content": "乙"}],
    },
]


def test_parquet_and_arrow(tmp_path, capsys):
    import pyarrow as pa
    from pyarrow import ipc, parquet

    table = pa.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "a.parquet")
    with ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table)
    with ipc.new_stream(tmp_path / "saved.arrow", table.schema) as file:  # as `datasets` saves it
        file.write_table(table)
    for name in "a.parquet", "a.arrow", "saved.arrow":
        check(tmp_path / name, {"read": ["问 春天来了吗？ 答 来了。", "问 甲 答 乙"]}, capsys)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    check(tmp_path / "a.parquet", {"stops": "a.parquet is a Parquet file that is damaged"}, capsys)
    for name in "a.arrow", "saved.arrow":
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
        check(tmp_path / name, {"stops": f"{name} is an Arrow file that is damaged"}, capsys)


def test_excel(tmp_path, capsys):
    import openpyxl

    book = openpyxl.Workbook()
    for row in ("问题", "答案", "备注"), ("春天来了吗？", "来了。", None), (None, None, None), ("几？", 7, "数"):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    expected = {"columns": ("问题", "答案"), "stops": "line 4 .row 2.: 答案 has content of type int"}
    check(
        tmp_path / "a.xlsx",
        expected | {"read": ["问 春天来了吗？ 答 来了。"], "summary": "keys not used: 备注"},
        capsys,
    )
    book.create_sheet("more").append(("问题", "答案"))
    book.save(tmp_path / "a.xlsx")
    check(tmp_path / "a.xlsx", {"stops": r"more than one sheet .Sheet, more."}, capsys)
    (tmp_path / "a.xlsx").write_bytes((tmp_path / "a.xlsx").read_bytes()[:2000])
    check(tmp_path / "a.xlsx", {"stops": "a.xlsx is packed and broken off"}, capsys)


def test_excel_whose_size_is_told_wrongly(tmp_path, capsys):
    """Some programs write a dimension of one cell; openpyxl would read no more."""
    import openpyxl

    book = openpyxl.Workbook()
    for row in ("question", "answer"), ("甲", "乙"), ("丙", "丁"):
        book.active.append(row)
    book.save(tmp_path / "whole.xlsx")
    with zipfile.ZipFile(tmp_path / "whole.xlsx") as whole, zipfile.ZipFile(tmp_path / "a.xlsx", "w") as told:
        for name in whole.namelist():
            told.writestr(name, re.sub(rb'<dimension ref="[^"]*"', b'<dimension ref="A1"', whole.read(name)))
    check(tmp_path / "a.xlsx", {"read": ["问 甲 答 乙", "问 丙 答 丁"]}, capsys)


def test_a_missing_extra_is_told(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"To read a.parquet: pip install 'chatmagic\[data\]'"):
        list(read_conversations(tmp_path / "a.parquet"))


@pytest.mark.parametrize("read", [read_conversations, read_jsonl])
def test_a_file_that_is_not_there(tmp_path, read):
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(DataError, match="There is no file .*trian.jsonl; beside it lie train.jsonl"):
        next(read(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match="is a folder; expected one file of it: train.jsonl"):
        next(read(tmp_path))


def test_an_archive_is_told_to_be_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("train.jsonl", "{}")
    with pytest.raises(DataError, match="a zip archive. Unpack it; it holds train.jsonl"):
        list(read_conversations(tmp_path / "a.zip"))
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "a.zip", "a.zip")
    with pytest.raises(DataError, match="a tar archive. Unpack it: tar xf a.tar.gz"):
        list(read_conversations(tmp_path / "a.tar.gz"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"query": "a", "response": "b"}\n' * 9)[:-12])
    with pytest.raises(DataError, match="packed and broken off"):
        list(read_conversations(tmp_path / "a.jsonl.gz"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "gbk", "utf-8-sig"])
def test_an_encoding_that_is_named_is_read(tmp_path, encoding, capsys):
    (tmp_path / "a.jsonl").write_bytes(('{"query": "春天", "response": "来\u3000了"}\n' * 2).encode(encoding))
    check(tmp_path / "a.jsonl", {"read": ["问 春天 答 来\u3000了"] * 2, "encoding": encoding}, capsys)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ({"on_error": "ignore"}, 'give "stop" or "skip"'),
        ({"encoding": "gkb"}, "No encoding is called 'gkb'"),
        ({"columns": {"content": "ask"}}, "names nothing that is known here. Expected .*query"),
    ],
)
def test_arguments_that_mean_nothing(tmp_path, arguments, complaint):
    (tmp_path / "a.jsonl").write_text('{"query": "a", "response": "b"}\n')
    with pytest.raises(DataError, match=complaint):
        list(read_conversations(tmp_path / "a.jsonl", **arguments))


def test_columns_may_be_given_either_way(capsys):
    for columns in (
        {"content": "query", "summary": "response"},
        {"prompt": "content", "output": "summary"},
        ("content", "summary"),
    ):
        check(CASES / "columns.json", {"columns": columns, "read": ["问 类型#帽 答 一顶帽。"]}, capsys)


@pytest.mark.parametrize("indent", [None, 2])
def test_rows_over_the_edges_of_what_is_read_at_a_time(tmp_path, indent, capsys):
    """Every place in a row falls on the edge of a chunk once; what is wrong further on still has its line."""
    row = {"query": "春\n天" * 40, "response": '"来,了]}' * 30}
    text = json.dumps(row, ensure_ascii=False, indent=indent)
    whole = "[" + ",\n".join([text] * (3 * CHUNK // len(text.encode()))) + "]"
    (tmp_path / "a.json").write_text(whole, "utf-8")
    conversations = list(read_conversations(tmp_path / "a.json"))
    assert len(conversations) == whole.count('"query"') and len(set(map(shown, conversations))) == 1
    (tmp_path / "a.json").write_text(whole[:-1] + ",\n" + text.replace('"response":', '"response"') + "\n]", "utf-8")
    line = whole.count("\n") + 1 + text[: text.index('"response"')].count("\n") + 1
    with pytest.raises(DataError, match=rf"line {line}\b.*not JSON: Expecting ':' delimiter"):
        list(read_conversations(tmp_path / "a.json"))


@pytest.mark.parametrize("form", ["lines", "array"])
def test_a_long_file_is_not_held(tmp_path, form):
    """Ten times the chunk is read, and never three chunks of it are held; the file is not run through beforehand."""
    row = json.dumps({"query": "春天" * 200, "response": "来了" * 200})
    rows = [row] * (10 * CHUNK // len(row))
    (tmp_path / "a").write_text("\n".join(rows) if form == "lines" else "[" + ",\n".join(rows) + "]")
    conversations = read_conversations(tmp_path / "a")
    next(conversations)
    tracemalloc.start()
    count = sum(1 for _ in conversations)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count + 1 == len(rows) and peak < 8 * CHUNK


def test_what_was_read_is_written_and_read_again(tmp_path):
    talk = [*read_conversations(CASES / "loss.jsonl", on_error="skip"), *read_conversations(CASES / "reasoning.jsonl")]
    write_jsonl(talk, tmp_path / "a.jsonl")
    assert list(read_jsonl(tmp_path / "a.jsonl", progress=False)) == talk
    assert list(read_conversations(tmp_path / "a.jsonl")) == talk
