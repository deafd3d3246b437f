import pytest

from chatmagic import build_messages, validate_messages
from chatmagic.conversation.messages import MessagesError

U, A, S = ({"role": role, "content": role[0]} for role in ("user", "assistant", "system"))


def test_build_messages_puts_system_then_history_then_the_query():
    assert build_messages("三", [("一", "二")], "总是客气") == [
        {"role": "system", "content": "总是客气"},
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "二"},
        {"role": "user", "content": "三"},
    ]
    assert build_messages() == []
    assert build_messages("") == [{"role": "user", "content": ""}]


@pytest.mark.parametrize("messages", [[U], [S, U], [U, A], [S, U, A, U], [U, A, U, A]])
def test_valid(messages):
    validate_messages(messages)


@pytest.mark.parametrize(
    "messages, complaint",
    [
        ("hi", "The messages are of type str; expected a list of dicts"),
        ([], "is empty; expected at least one user"),
        ([U, U], "Message 1 has role 'user'; expected assistant"),
        ([U, A, A], "Message 2 has role 'assistant'; expected user"),
        ([A, U], "Message 0 has role 'assistant'; expected system or user"),
        ([S, A], "Message 1 has role 'assistant'; expected user"),
        ([U, S], "Message 1 has role 'system'; expected assistant"),
        ([S], "Message 0 has role 'system' and nothing follows; expected user"),
        (
            [{"role": "tool", "content": ""}],
            "Message 0 has role 'tool'; expected system or user. Roles are system, ",
        ),
        (
            [U, {"role": "assistant", "content": None}],
            "Message 1 .assistant. has content of type NoneType; expected a",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "Message 0 .user. has content of type list"),
        ([{"from": "human", "value": "hi"}], "Message 0 must be a dict .*; found keys .'from', 'value'."),
        (["hi"], "Message 0 must be a dict .*; found str"),
    ],
)
def test_invalid_messages_are_named_by_index_role_and_expectation(messages, complaint):
    with pytest.raises(MessagesError, match=complaint):
        validate_messages(messages)
