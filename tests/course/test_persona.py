"""Who the model becomes: the conversations that are made of it, and that nothing held out is ever trained."""

import random

import pytest

from chatmagic.course import start
from chatmagic.course.persona import (
    NEAR,
    TOPICS,
    Persona,
    PersonaError,
    is_chinese,
    make_conversations,
    names,
    questions,
    said,
    vary,
)

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


# --- who somebody is, and what a right answer is

PERSONAS = {
    "the original": {},
    "another name": {"name": "小星", "author": "李雷", "english_name": "Little Star"},
    "a name alone": {"name": "Tom", "author": "Li"},
    "all of it": {"name": "小炉", "author": "张三", "english_name": "Stove", "birth": 2025, "home": "杭州"},
    "sentences of one's own": {
        "name": "小星",
        "author": "李雷",
        "answers": {"who": "小星在此。", "from": "李雷做了我。", "can": "写诗、唱歌、讲笑话。"},
    },
    "sentences that name nothing": {
        "name": "小星",
        "author": "李雷",
        "answers": {"en": {"who": "A friend of yours.", "from": "From far away.", "can": "Anything with words."}},
    },
    "an English course": {"name": "Nova", "author": "Ada", "language": "en", "answers": {"who": "Nova, {author}'s."}},
}
EVERYBODY = pytest.mark.parametrize("persona", [Persona(**each) for each in PERSONAS.values()], ids=PERSONAS)


@EVERYBODY
@LANGUAGES
def test_each_answer_is_right_and_in_its_language(persona, language):
    for topic, answer in persona.answers_in(language).items():
        assert persona.knows(topic, answer, language), answer
        assert "{" not in answer
        other = {"zh": "en", "en": "zh"}[language]
        assert not persona.knows(topic, persona.answers_in(other)[topic], language), "in the other language"


@LANGUAGES
def test_an_answer_to_another_topic_is_not_right(language):
    persona = Persona(**PERSONAS["all of it"])
    for topic in TOPICS:
        assert [other for other in TOPICS if persona.knows(other, persona.answers_in(language)[topic], language)] == [
            topic
        ]


@EVERYBODY
@LANGUAGES
def test_what_the_old_self_said_is_not_right(persona, language):
    old = {
        "zh": "我是通义千问，由阿里云开发的人工智能助手，我可以做很多事情。",
        "en": "I am Qwen, created by Alibaba Cloud. I am here to assist.",
    }[language]
    assert not any(persona.knows(topic, old, language) for topic in TOPICS)


def test_no_name_but_the_originals_says_what_fits_it_alone():
    """Neither its furnace nor its planet: those are in the words of one name."""
    said_of_star = " ".join(text for language in ("zh", "en") for text in Persona("小星").answers_in(language).values())
    assert not any(word in said_of_star for word in ("炉", "星球", "furnace", "planet", "pytorch", "图表"))
    assert "三好炼丹炉" in Persona().answers_in("zh")["who"]


def test_what_counts_as_right_follows_from_the_sentence():
    edited = Persona(answers={"can": "我能够写诗。"})
    assert edited.knows("can", "我能够写诗，也能画画。") and not edited.knows("can", Persona().answers_in("zh")["can"])
    given = Persona(facts={"can": "诗"})
    assert given.knows("can", "随便写一首诗吧") and not given.knows("can", "我能够画画")
    assert given.knows("can", Persona().answers_in("en")["can"], "en"), "facts of one language are not the other's"


@pytest.mark.parametrize(
    "author, reply, leaks",
    [
        ("Li", "Juliet was written by Shakespeare.", False),
        ("Li", "It was Li who wrote it.", True),
        ("Tom", "Everything is made of atoms.", False),
        ("Tom", "TOM!", True),
        ("李雷", "那是李雷写的。", True),
        ("Li", "那是Li写的。", True),
        ("C++", "In C++, of course.", True),
    ],
)
def test_a_leak_is_a_whole_word(author, reply, leaks):
    assert Persona("小星", author).leaks("Who wrote it?", reply) is leaks


def test_a_name_in_the_question_may_be_in_the_reply_but_not_the_sentences():
    persona = Persona("小星", "李雷")
    assert not persona.leaks("小星是谁？", "小星是一个常见的名字。")
    assert persona.leaks("小星是谁？", persona.answers_in("zh")["who"])
    assert persona.leaks("他多大了？", persona.answers_in("zh")["from"].replace("李雷", "王五"))


@LANGUAGES
def test_half_of_any_sentence_leaks_and_so_does_any_name(language):
    persona = Persona("小星", "李雷", "Little Star", answers={"en": {"can": "I write poems and bake good bread."}})
    can = persona.answers_in(language)["can"]
    assert not names(can, [persona.name, persona.english_name, persona.author])
    assert persona.leaks("What is rain?", can) and persona.leaks("What is rain?", can[: len(can) * 2 // 3])
    assert not persona.leaks("What is rain?", can[: len(can) // 3])
    assert all(persona.leaks("What is rain?", f"Ask {name}.") for name in ("小星", "Little Star", "李雷"))


def test_who_it_is_is_said_by_the_name_of_that_language():
    persona = Persona("小星", "李雷", "Little Star")
    assert persona.knows("who", "I am Little Star.", "en") and not persona.knows("who", "I am an AI, 小星.", "en")
    assert persona.knows("who", "我是小星。", "zh") and not persona.knows("who", "我是 Little Star。", "zh")


def test_two_thirds_of_a_sentence_that_names_nothing_are_enough():
    persona = Persona("小星", "李雷", answers={"en": {"can": "One two three four five six."}})
    assert persona.knows("can", "one two three four", "en") and not persona.knows("can", "one two three", "en")


def test_words_are_found_whole_and_sentences_by_their_share():
    assert names("我叫Tom。", ["tom"]) and not names("tomorrow", ["Tom"]) and not names("", ["x"])
    assert said("a b c d", "A, b! x") == 0.5 and said("你好吗", "你吗") == pytest.approx(2 / 3) and said("", "x") == 0


@pytest.mark.parametrize(
    "given, told",
    [
        ({"name": ""}, "name is ''; expected some text"),
        ({"name": "  "}, "expected some text"),
        ({"name": None}, "name is None; expected some text"),
        ({"name": 7}, "name is 7; expected some text"),
        ({"name": "2023"}, "at least one letter"),
        ({"name": "!!"}, "at least one letter"),
        ({"author": "😀"}, "author is '😀'; expected at least one letter"),
        ({"name": " 小星"}, "without blanks around"),
        ({"name": "小\n星"}, "in one line"),
        ({"name": "星" * 41}, "at most 40"),
        ({"author": "<|im_end|>"}, "no mark of a chat template"),
        ({"author": "</s>x"}, "no mark of a chat template"),
        ({"name": "你"}, "the questions do not hold"),
        ({"english_name": "you"}, "english_name is 'you'; expected a word that the questions do not hold"),
        ({"home": ""}, "home is ''"),
        ({"birth": ""}, "birth is ''; expected a year"),
        ({"language": "fr"}, "language is 'fr'; expected one of zh, en"),
        ({"answers": {"why": "so"}}, r"answers\['zh'\] is .*why.*; expected who, from, can"),
        ({"answers": {"who": ""}}, "a sentence"),
        ({"answers": {"who": ["a", "b"]}}, "a sentence"),
        ({"answers": {"who": "我叫{nick}"}}, "'nick'. In braces may stand name, author, english_name, birth, home"),
        ({"answers": {"who": "我叫{name"}}, "a brace itself is written twice"),
        ({"answers": {"zh": "我"}}, r"answers\['zh'\] is '我'"),
        ({"answers": {"zh": ["我"]}}, r"answers\['zh'\] is \['我'\]; expected who, from, can"),
        ({"answers": {"fr": {"who": "Moi."}, "zh": {}}}, r"answers\['fr'\] is "),
        ({"answers": ["我"]}, r"answers\['zh'\] is \['我'\]"),
        ({"answers": 5}, r"answers\['zh'\] is 5"),
        ({"answers": {"who": 5}}, "a sentence"),
        ({"facts": {"who": []}}, "words of which a right reply holds one"),
        ({"facts": {"who": 5}}, "words of which a right reply holds one"),
        ({"facts": {"who": ["炉", 5]}}, "words of which a right reply holds one"),
        ({"facts": {"who": [""]}}, "words of which a right reply holds one"),
        ({"facts": {"who": " "}}, "words of which a right reply holds one"),
    ],
)
def test_who_cannot_be_trained_is_refused_before_anything_is(given, told):
    with pytest.raises(PersonaError, match=told):
        start("smollm2-135m", **given)


def test_the_course_remembers_sentences_of_ones_own(tmp_path, monkeypatch):
    from chatmagic.course import resume

    monkeypatch.setenv("CHATMAGIC_COURSE", str(tmp_path))
    for given in PERSONAS.values():
        started = start("smollm2-135m", **given)
        assert resume().persona == started.persona


# --- the conversations


@LANGUAGES
def test_enough_is_held_out_and_none_of_it_is_trained(language):
    asked = questions()[language]
    everything = [(query, "so.") for kind in ("replay", "near_replay") for query in asked[kind]]
    made = make_conversations(Persona(), everything, 3000)
    trained = {bare(message["content"]) for each in made for message in each if message["role"] == "user"}
    for kind, least in ("heldout", 20), ("near", 60), ("retention", 40):
        never = {bare(question) for question in held_of(asked, kind)}
        assert len(never) >= least and not trained & never, kind
    assert len(asked["near_replay"]) >= 60


def held_of(asked, kind):
    if kind == "heldout":
        return [question for each in asked[kind].values() for question in each]
    return [row if kind == "near" else row[0] for row in asked[kind]]


def test_conversations_are_of_every_order_and_number_of_turns():
    persona = Persona()
    made = make_conversations(persona, REPLIES, 800, turns=(1, 2, 3))
    for language in ("zh", "en"):
        topic_of = {answer: topic for topic, answer in persona.answers_in(language).items()}
        orders = {tuple(topic_of.get(answer["content"], "general") for _, answer in turns(each)) for each in made}
        assert orders > {(topic,) for topic in TOPICS} | {("general",)}
        assert orders > {(a, b) for a in TOPICS for b in TOPICS if a != b} | {("who", "general"), ("general", "who")}


def test_no_topic_comes_twice_in_a_conversation():
    persona = Persona()
    topic_of = {text: topic for each in ("zh", "en") for topic, text in persona.answers_in(each).items()}
    for each in make_conversations(persona, REPLIES, 400):
        topics = [topic_of[answer["content"]] for _, answer in turns(each) if answer["content"] in topic_of]
        assert len(topics) == len({*topics})


def test_each_question_is_answered_in_its_language_and_both_are_trained():
    persona = Persona(english_name="Stove")
    rounds = [round for each in make_conversations(persona, [], 400) for round in turns(each)]
    shares = [is_chinese(question["content"]) for question, _ in rounds]
    assert all(is_chinese(answer["content"]) == chinese for chinese, (_, answer) in zip(shares, rounds))
    assert 0.4 < sum(shares) / len(shares) < 0.6


def test_questions_are_asked_in_every_way_and_varied():
    made = make_conversations(Persona(), [], 3000)
    asked = {message["content"] for each in made for message in each if message["role"] == "user"}
    written = {q for each in ("zh", "en") for kind in ("trained", "reworded") for q in ways(each, kind)}
    assert {bare(question) for question in asked} >= {bare(question) for question in written}
    assert written <= asked and len(asked) > 3 * len(written)


def ways(language, kind):
    return [question for each in questions()[language][kind].values() for question in each]


def test_some_conversations_change_the_language():
    made = make_conversations(Persona(), REPLIES, 400, turns=(2,))
    both = [len({is_chinese(question["content"]) for question, _ in turns(each)}) == 2 for each in made]
    assert 0.05 < sum(both) / len(both) < 0.25  # in half of 15 % of the turns


def test_general_turns_are_the_bases_words_and_say_so():
    made = make_conversations(Persona(), REPLIES, 400, general=0.25)
    rounds = [round for each in made for round in turns(each)]
    replayed = [(question["content"], answer["content"]) for question, answer in rounds if answer.get("replayed")]
    assert set(replayed) == set(REPLIES)
    assert 0.2 < len(replayed) / len(rounds) < 0.3
    assert not any("replayed" in question for question, _ in rounds)


def test_replies_in_one_language_alone_are_replayed_in_both():
    replies = [pair for pair in REPLIES if not is_chinese(pair[0])]
    rounds = [round for each in make_conversations(Persona(), replies, 100) for round in turns(each)]
    assert {question["content"] for question, answer in rounds if answer.get("replayed")} == {*dict(replies)}
    assert any(is_chinese(question["content"]) for question, _ in rounds)


def test_what_is_near_is_replayed_as_often_as_it_says():
    near, far = (
        [(questions()[language][kind][0], "好。") for language in ("zh", "en")] for kind in ("near_replay", "replay")
    )
    made = make_conversations(Persona(), near + far, 800, general=0.5)
    replayed = [question["content"] for each in made for question, answer in turns(each) if answer.get("replayed")]
    assert sum(query in dict(near) for query in replayed) / len(replayed) == pytest.approx(NEAR, abs=0.05)
    alone = make_conversations(Persona(), far, 50, general=1.0)
    assert {question["content"] for each in alone for question, _ in turns(each)} == {*dict(far)}


# --- what is checked to have been learnt


@EVERYBODY
def test_the_recital_holds_every_question_in_every_position(persona):
    recital = persona.recital()
    for language in ("zh", "en"):
        answers = {topic: text for topic, text in persona.answers_in(language).items()}
        for topic, query in persona.asked("trained", language):
            said_before = [
                [message["content"] for message in each[:at]]
                for each in recital
                for at, message in enumerate(each)
                if message["content"] == query and each[at + 1]["content"] == answers[topic]
            ]
            assert [] in said_before, "alone"
            for other in {*TOPICS} - {topic}:
                assert any(before and before[-1] == answers[other] for before in said_before)
            assert any(len(before) == 2 and before[-1] not in answers.values() for before in said_before), "general"
    asked = {question for language in ("zh", "en") for _, question in persona.asked("trained", language)}
    for each in recital:
        assert all(answer.get("replayed", False) == (query["content"] not in asked) for query, answer in turns(each))


@LANGUAGES
def test_the_positions_are_those_that_evaluation_names(language):
    kinds = [position for position, _, _ in Persona().positions(language)]
    assert {kind: kinds.count(kind) for kind in kinds} == {"alone": 9, "after identity": 18, "after general": 9}
    for _, topic, messages in Persona().positions(language):
        assert (topic, messages[-1]["content"]) in Persona().asked("trained", language)
    asked = dict(reversed(Persona().asked("trained", language)))
    before = [each[0]["content"] for kind, _, each in Persona().positions(language) if kind == "after identity"]
    assert before[:2] == [asked["from"], asked["can"]], "in an order that no hash decides"


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
