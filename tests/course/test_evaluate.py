"""The evaluation itself, on models whose every answer is known."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig

import chatmagic.course.evaluate as evaluation
from chatmagic import load_model
from chatmagic.conversation.messages import build_messages
from chatmagic.course.evaluate import ask, evaluate, perplexity, summary
from chatmagic.course.persona import TOPICS, Persona, questions
from talk import build


@pytest.fixture(scope="module")
def tiny(tiny_models):
    return load_model(tiny_models / "llama-2-13b-chat", dtype="float32")


class Scripted(torch.nn.Module):
    """Says the same to everything."""

    generation_config, device = GenerationConfig(), torch.device("cpu")

    def __init__(self, said):
        super().__init__()
        self.said = said

    def generate(self, input_ids, **_):
        return torch.cat([input_ids, torch.tensor([self.said] * len(input_ids))], dim=1)


def answered_by(monkeypatch, answer):
    """Let `answer(conversation)` stand for every model's reply."""
    monkeypatch.setattr(evaluation, "ask", lambda model, tokenizer, conversations, *_: [*map(answer, conversations)])
    monkeypatch.setattr(evaluation, "perplexity", lambda *_: 12.5)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_a_model_that_knows_everything(monkeypatch, language):
    persona = Persona(language=language)
    topics = {question: topic for kind in ("trained", "heldout") for topic, question in persona.asked(kind)}
    general = {question: facts[0] for question, *facts in questions()["general"]["retention"]}

    def answer(conversation):
        question = conversation[-1]["content"]
        return persona.answers[topics[question]] if question in topics else general[question]

    answered_by(monkeypatch, answer)
    result = evaluate(None, None, persona)
    assert result["identity"] == {
        "alone": [9, 9], "after identity": [18, 18], "after general": [9, 9], "heldout": [24, 24]
    }  # fmt: skip
    assert result["known"] == list(general) and result["leaked"] == []


def test_the_seeds_model_gives_its_name_first(monkeypatch):
    """Each answer in the order of the seed's conversation, whatever is asked."""
    persona = Persona()
    order = [persona.answers[topic] for topic in TOPICS]
    answered_by(monkeypatch, lambda conversation: order[len(conversation) // 2])
    result = evaluate(None, None, persona)
    # alone, only the name is right; after one other topic, only where it came from
    assert result["identity"]["alone"] == [3, 9] and result["identity"]["after identity"] == [6, 18]
    assert result["known"] == [] or not set(result["known"]) - {"What is the freezing point of water in Celsius?"}
    assert len(result["leaked"]) == len(questions()["general"]["retention"])


def test_summary_counts_what_was_right_before():
    identity = {"alone": [9, 9], "heldout": [20, 21]}
    before = {"identity": identity, "known": ["a", "b", "c"], "leaked": [], "perplexity": 20.0}
    after = {"identity": identity, "known": ["a", "c", "d"], "leaked": ["b"], "perplexity": 21.0}
    asked = len(questions()["general"]["retention"])
    assert summary(before, after) == {
        "alone": (9, 9), "heldout": (20, 21), "retained": (2, 3), "leaked": (1, asked), "perplexity": 21.0
    }  # fmt: skip


def test_asking_in_batches_is_asking_alone(tiny):
    model, tokenizer = tiny
    questions = [build_messages(text) for text in ("Hi", "你是谁呀？", "What is the capital of France, and why?")]
    model.train()
    together = ask(model, tokenizer, questions, max_new_tokens=6)
    assert model.training
    assert together == [ask(model, tokenizer, [each], max_new_tokens=6)[0] for each in questions]


def test_a_reply_ends_at_its_stop_token_or_with_a_mark(tiny):
    tokenizer = tiny[1]
    said = tokenizer("Paris.", add_special_tokens=False)["input_ids"]

    question = [build_messages("What is the capital of France?")]
    assert ask(Scripted([*said, tokenizer.eos_token_id, 5]), tokenizer, question) == ["Paris."]
    assert ask(Scripted([*said, said[0]]), tokenizer, question)[0].endswith("…")


@pytest.mark.parametrize("said", ["<|open|>Hm.<|close|>Paris.<|im_end|>", "Hm.\n</think>\n\nParis.<|im_end|>"])
def test_a_thought_between_control_tokens_is_no_part_of_a_reply(said):
    """As `%%chat` parts them: the tokens that mark a thought are special in some tokenizers."""
    marks = ("<|open|>", "<|close|>") if "<|open|>" in said else ("<think>\n", "\n</think>\n\n")
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.reasoning_content %}"
        f"{{{{ {marks[0]!r} + m.reasoning_content + {marks[1]!r} }}}}{{% endif %}}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        + ("" if "<|open|>" in said else "{{ '<think>\n' }}")
        + "{% endif %}"
    )
    tokenizer = build(template, more=["<|open|>", "<|close|>"])
    model, question = Scripted(tokenizer.encode(said)), [build_messages("What is the capital of France?")]
    assert ask(model, tokenizer, question) == ["Paris."]
    assert ask(model, tokenizer, question, thoughts=True) == ["Hm."]


def test_perplexity_is_of_every_token_but_the_first(tiny):
    model, tokenizer = tiny
    text = questions()["fluency"]["zh"]
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        expected = math.exp(cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).item())
    assert perplexity(model, tokenizer, text) == pytest.approx(expected, rel=1e-5)


def test_a_model_that_thought_is_asked_whether_it_still_does(monkeypatch):
    tokenizer = build(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    replies = ["A thought.", ""]
    monkeypatch.setattr(evaluation, "ask", lambda *_, thinking, thoughts: replies if thinking and thoughts else None)
    assert evaluation.thinks(None, tokenizer, []) == 1
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>\n", "").replace(".split('</think>')[-1]", "")
    assert evaluation.thinks(None, tokenizer, []) is None
    before, after = (
        {"identity": {}, "known": [], "leaked": [], "perplexity": 1.0, "thinks": count} for count in (6, 2)
    )
    assert evaluation.summary(before, after)["still thinks"] == (2, 6)
    assert "still thinks" not in evaluation.summary(before | {"thinks": None}, after)
