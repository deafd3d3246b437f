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
from chatmagic.course.persona import Persona, is_chinese, questions
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

    def get_output_embeddings(self):
        return torch.nn.Identity()

    def generate(self, input_ids, **_):
        return torch.cat([input_ids, torch.tensor([self.said] * len(input_ids))], dim=1)


def answered_by(monkeypatch, answer):
    """Let `answer(conversation)` stand for every model's reply."""
    monkeypatch.setattr(evaluation, "ask", lambda model, tokenizer, conversations, *_: [*map(answer, conversations)])
    monkeypatch.setattr(evaluation, "perplexity", lambda *_: 12.5)
    monkeypatch.setattr(evaluation, "longest", lambda *_: 60)


LANGUAGES = ("zh", "en")


def scripted(persona, says):
    """The answer of a model that, for each question asked of it, says `says(kind, language, topic or facts)`."""
    table = {}
    for language in LANGUAGES:
        asked = questions()[language]
        for kind in ("trained", "heldout"):
            table |= {query: (kind, language, topic) for topic, query in persona.asked(kind, language)}
        table |= {query: ("known", language, facts[0]) for query, *facts in asked["retention"]}
        table |= {query: ("near", language, query) for query in asked["near"]}
    return lambda conversation: says(*table[conversation[-1]["content"]])


def all_right(persona):
    def says(kind, language, what):
        return {"known": what, "near": "Who knows?"}.get(kind) or persona.answers_in(language)[what]

    return says


def test_a_model_that_knows_everything(monkeypatch):
    persona = Persona("小星", "李雷")
    answered_by(monkeypatch, scripted(persona, all_right(persona)))
    result = evaluate(None, None, persona)
    for language in LANGUAGES:
        table = result[language]
        assert table["identity"] == {
            "alone": [9, 9], "after identity": [18, 18], "after general": [9, 9], "heldout": [24, 24]
        }  # fmt: skip
        assert table["known"] == [query for query, *_ in questions()[language]["retention"]]
        assert table["leaked"] == table["near"] == []
        assert table["perplexity"] == 12.5


def test_an_answer_in_the_other_language_is_not_right(monkeypatch):
    """The old recipe: asked in English, a model with a Chinese persona answered in Chinese or kept its old name."""
    persona = Persona("小星", "李雷")
    right = all_right(persona)

    def says(kind, language, what):
        return right(kind, "zh" if kind in ("trained", "heldout") else language, what)

    answered_by(monkeypatch, scripted(persona, says))
    result = evaluate(None, None, persona)
    assert [right for right, _ in result["zh"]["identity"].values()] == [9, 18, 9, 24]
    assert [right for right, _ in result["en"]["identity"].values()] == [0, 0, 0, 0]


def test_who_answers_for_itself_whatever_is_asked_leaks_everywhere(monkeypatch):
    persona = Persona("小星", "李雷")
    answered_by(monkeypatch, scripted(persona, lambda kind, language, what: persona.answers_in(language)["who"]))
    result = evaluate(None, None, persona)
    for language in LANGUAGES:
        table = result[language]
        assert (len(table["leaked"]), len(table["near"])) == (len(questions()[language]["retention"]), 60)
        assert table["identity"]["alone"] == [3, 9] and table["known"] == []


def test_a_model_that_gives_its_name_first(monkeypatch):
    """As the original's way teaches: each answer in the order of its one conversation, whatever is asked."""
    persona = Persona()
    order = {language: [*persona.answers_in(language).values()] for language in LANGUAGES}

    def answer(conversation):
        language = "zh" if is_chinese(conversation[-1]["content"]) else "en"
        return order[language][len(conversation) // 2]

    answered_by(monkeypatch, answer)
    for table in evaluate(None, None, persona).values():
        # alone, only the name is right; after one other topic, only where it came from
        assert table["identity"]["alone"] == [3, 9] and table["identity"]["after identity"] == [6, 18]


def test_summary_counts_what_was_right_before():
    identity = {"alone": [9, 9], "heldout": [20, 21]}
    before = {"identity": identity, "known": ["a", "b", "c"], "leaked": [], "near": ["x"], "perplexity": 20.0}
    after = {"identity": identity, "known": ["a", "c", "d"], "leaked": ["b"], "near": [], "perplexity": 21.0}
    table = summary({"zh": before, "en": after}, {"zh": after, "en": before})
    asked = {language: len(questions()[language]["retention"]) for language in LANGUAGES}
    assert table["zh"] == {
        "alone": (9, 9), "heldout": (20, 21), "retained": (2, 3), "leaked": (1, asked["zh"]), "near": (0, 60),
        "perplexity": 21.0,
    }  # fmt: skip
    assert (table["en"]["retained"], table["en"]["near"]) == ((2, 3), (1, 60))


def test_asking_in_batches_is_asking_alone(tiny):
    model, tokenizer = tiny
    questions = [build_messages(text) for text in ("Hi", "你是谁呀？", "What is the capital of France, and why?")]
    model.train()
    together = ask(model, tokenizer, questions, max_new_tokens=6)
    assert model.training
    assert together == [ask(model, tokenizer, [each], max_new_tokens=6)[0] for each in questions]


def test_the_head_is_not_given_a_slice(tiny):
    """For each row of which PyTorch would copy a frozen one."""
    model, tokenizer = tiny
    whole = []
    with model.get_output_embeddings().register_forward_hook(
        lambda _, given, out: whole.append(given[0].is_contiguous())
    ):
        ask(model, tokenizer, [build_messages("who are you?" * count) for count in (1, 2, 3)], max_new_tokens=1)
    assert whole == [True]


def test_who_recites_its_longest_answer_is_not_cut_off(tiny):
    """However many tokens a tokenizer makes of a Chinese character."""
    tokenizer, room = tiny[1], []
    persona = Persona(answers={"who": "我叫梦中情炉。" * 30})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            evaluation, "ask", lambda model, tokenizer, asked, tokens: room.append(tokens) or [""] * len(asked)
        )
        patch.setattr(evaluation, "perplexity", lambda *_: 1.0)
        evaluate(None, tokenizer, persona)
    said = tokenizer(persona.answers_in("zh")["who"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    assert room == [len(said)] and len(said) > 200


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
    text = questions()["zh"]["fluency"]
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
        {"zh": {"identity": {}, "known": [], "leaked": [], "near": [], "perplexity": 1.0, "thinks": count}}
        for count in (6, 2)
    )
    assert evaluation.summary(before, after)["zh"]["still thinks"] == (2, 6)
    before["zh"]["thinks"] = None
    assert "still thinks" not in evaluation.summary(before, after)["zh"]
