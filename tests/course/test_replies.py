"""The base's own replies: asked once a model, kept as they come, shipped for the embedded one and still its own."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from chatmagic import build_inputs_labels, build_messages, load_model
from chatmagic.course import replies as module
from chatmagic.course.persona import questions
from chatmagic.course.replies import last_sentence, own_replies, shipped_replies

ASKED = [f"question {number}?" for number in range(20)]
ASKED_TABLE = {
    "zh": {"replay": ASKED[:6], "near_replay": ASKED[6:9]},
    "en": {"replay": ASKED[9:15], "near_replay": ASKED[15:]},
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("CHATMAGIC_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "questions", lambda: ASKED_TABLE)
    monkeypatch.setattr(module, "BATCH", 8)
    return tmp_path / "home"


@pytest.fixture
def model(tmp_path, tiny_models):
    """What own_replies takes of a model: where it lies."""
    shutil.copytree(tiny_models / "llama-2-13b-chat", tmp_path / "base")
    return SimpleNamespace(name_or_path=str(tmp_path / "base"))


def asking(monkeypatch, fails_at=None, say="Yes. It is"):
    """Let this stand for `ask`; returns what it was asked, a batch each."""
    batches = []

    def ask(model, tokenizer, conversations, tokens):
        batches.append([messages[0]["content"] for messages in conversations])
        if len(batches) == fails_at:
            raise KeyboardInterrupt
        return [f"{messages[0]['content']} {say}…" for messages in conversations]

    monkeypatch.setattr(module, "ask", ask)
    return batches


def test_a_model_is_asked_once(model, monkeypatch):
    batches = asking(monkeypatch)
    replies = own_replies(model, None)
    assert replies == [(query, f"{query} Yes.") for query in ASKED], "in the order asked, up to the last whole sentence"
    assert list(map(len, batches)) == [8, 8, 4]
    assert own_replies(model, None) == replies and len(batches) == 3


def test_a_stop_loses_nothing_that_was_answered(model, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        asking(monkeypatch, fails_at=3)
        own_replies(model, None)
    batches = asking(monkeypatch)
    assert [query for query, _ in own_replies(model, None)] == ASKED
    assert list(map(len, batches)) == [4]


def test_another_model_of_the_same_name_is_asked_anew(model, monkeypatch):
    own_replies(model, asking(monkeypatch) and None)
    config = f"{model.name_or_path}/config.json"
    changed = json.loads(open(config).read()) | {"rms_norm_eps": 0.5}
    open(config, "w").write(json.dumps(changed))
    batches = asking(monkeypatch)
    own_replies(model, None)
    assert len(batches) == 3


def test_empty_replies_are_left_out_and_not_asked_again(model, monkeypatch):
    monkeypatch.setattr(module, "ask", lambda model, tokenizer, conversations, tokens: [""] * len(conversations))
    assert own_replies(model, None) == []
    batches = asking(monkeypatch)
    assert own_replies(model, None) == [] and batches == []


def test_last_sentence():
    assert last_sentence("One. Two! Thr") == "One. Two!"
    assert last_sentence("北京。它是") == "北京。"
    assert last_sentence("no end") == "no end"


# --- what ships with the package


@pytest.mark.parametrize("fingerprint", json.loads(module.SHIPPED.read_text(encoding="utf-8")))
def test_the_shipped_replies_are_all_there(model, monkeypatch, fingerprint):
    monkeypatch.setattr(module, "questions", questions)
    batches = asking(monkeypatch)
    asked = [query for table in questions().values() for kind in ("replay", "near_replay") for query in table[kind]]
    with monkeypatch.context() as patch:
        patch.setattr(module, "base_fingerprint", lambda folder: fingerprint)
        assert [query for query, _ in own_replies(model, None)] == asked and batches == []
    own_replies(model, None)
    assert sum(map(len, batches)) == len(asked) > 600


def surprise(model, tokenizer, query: str, reply: str) -> float:
    """How far any token of the reply is from the likeliest there: 0 for greedy decoding in the same arithmetic."""
    ids, labels = build_inputs_labels(build_messages(history=[(query, reply)]), tokenizer)
    learnt = [at for at, label in enumerate(labels) if label != -100][:-1]  # a cut reply does not end there
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].float()
    return max((logits[at - 1].max() - logits[at - 1, ids[at]]).item() for at in learnt)


@pytest.mark.slow
def test_some_of_them_are_still_what_the_model_says(embedded):
    """Made in batches, on another machine perhaps: a token may have won by rounding alone, by no more."""
    model, tokenizer = load_model(embedded)
    made = list(shipped_replies(embedded).items())
    some = made[:: len(made) // 8]
    assert [query for query, reply in some if surprise(model, tokenizer, query, reply) > 0.5] == []
    (query, _), (_, other) = made[0], made[3]
    assert surprise(model, tokenizer, query, other) > 3, "and another reply is not"
