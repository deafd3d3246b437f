"""Who the model becomes: the conversations that are made of it, and that nothing held out is ever trained."""

import random

import pytest

from chatmagic.course.persona import TOPICS, Persona, is_chinese, make_conversations, questions, vary

REPLIES = [
    ("What is an atom?", "The smallest part."),
    ("月亮是什么？", "一颗卫星。"),
    ("Name three fruits.", "Apples."),
]
LANGUAGES = pytest.mark.parametrize("language", ["zh", "en"])


def bare(question):
    """A question without greeting, punctuation and case: two that agree in it are one."""
    for greeting in ("你好，", "请问", "嗨，", "hello! ", "hi! ", "excuse me, "):
        question = question.lower().removeprefix(greeting)
    return question.strip("？?。. ").rstrip("呀呢")


def turns(conversation):
    return list(zip(conversation[::2], conversation[1::2]))


def test_the_seeds_conversation_is_kept_word_for_word():
    conversation = Persona().conversation
    assert conversation[0] == (
        ["请介绍一下你自己。", "你是谁呀？", "你是？"],
        [
            "我叫梦中情炉，是一个三好炼丹炉：好看，好用，好改。我的英文名字叫做torchkeras，是一个pytorch模型训练模版工具。"
        ],
    )
    assert [len(ways) for ways, _ in conversation] == [3, 3, 3]
    assert conversation[1][1] == ["我在2023年诞生于github星球，是一个惠某某设计和开发的。"]


@LANGUAGES
def test_every_answer_holds_its_fact_and_no_other_topics(language):
    persona = Persona(name="小炉", author="张三", english_name="Stove", language=language)
    for topic in TOPICS:
        assert [other for other in TOPICS if persona.knows(other, persona.answers[topic])] == [topic]


@LANGUAGES
def test_enough_is_held_out_and_none_of_it_is_trained(language):
    persona = Persona(language=language)
    heldout = {bare(question) for _, question in persona.asked("heldout")}
    assert len(heldout) >= 20
    made = make_conversations(persona, REPLIES, 600)
    asked = {bare(message["content"]) for each in made for message in each if message["role"] == "user"}
    assert not asked & heldout
    retention = {bare(question) for question, *_ in questions()["general"]["retention"]}
    assert len(retention) >= 20
    assert not retention & {bare(question) for question in questions()["general"]["replay"]}


@LANGUAGES
def test_conversations_are_of_every_order_and_number_of_turns(language):
    persona = Persona(language=language)
    made = make_conversations(persona, REPLIES, 400, turns=(1, 2, 3))
    topic_of = {answer: topic for topic, answer in persona.answers.items()}
    orders = {tuple(topic_of.get(answer["content"], "general") for _, answer in turns(each)) for each in made}
    assert orders > {(topic,) for topic in TOPICS} | {("general",)}
    assert orders > {(a, b) for a in TOPICS for b in TOPICS if a != b} | {
        ("who", "general"),
        ("general", "who"),
    }
    assert not any(len(set(order) - {"general"}) < sum(topic != "general" for topic in order) for order in orders)


def test_general_turns_are_the_bases_words_and_say_so():
    made = make_conversations(Persona(), REPLIES, 400, general=0.25)
    rounds = [round for each in made for round in turns(each)]
    replayed = [(question["content"], answer["content"]) for question, answer in rounds if answer.get("replayed")]
    assert set(replayed) == set(REPLIES)
    assert 0.2 < len(replayed) / len(rounds) < 0.3
    # 60 % in the persona's language, though only one of the three replies is
    assert 0.5 < sum(is_chinese(question) for question, _ in replayed) / len(replayed) < 0.7
    assert not any("replayed" in question for question, _ in rounds)


def test_without_replies_there_is_identity_alone():
    made = make_conversations(Persona(), [], 50)
    assert not any(answer.get("replayed") for each in made for _, answer in turns(each))


def test_a_seed_makes_the_same_data_and_another_seed_other_data():
    first, again, other = (make_conversations(Persona(), REPLIES, 50, seed) for seed in (3, 3, 4))
    assert first == again != other


def test_validation_shares_no_conversation_with_training():
    train = make_conversations(Persona(), REPLIES, 200)
    validation = make_conversations(Persona(), REPLIES, 50, seed=1, without=train)
    assert len(validation) == 50 and not any(each in train for each in validation)


def test_variations_keep_the_question():
    rng = random.Random(0)
    for question in "你是谁呀？", "Who are you?":
        varied = {vary(question, rng) for _ in range(200)}
        assert question in varied and len(varied) > 8
        assert {bare(each) for each in varied} == {bare(question)}
