"""Chat records of every shape become one form, or are refused with a reason."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith.core.errors import UserError
from tinsmith.text.chat import BadRecord, Call, Conversation, Message, parse_conversation

ASK = {"role": "user", "content": "1+1?"}
ANSWER = {"role": "assistant", "content": "2"}
TOOL = {"type": "function", "function": {"name": "add"}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
RESULT = {"role": "tool", "content": "2"}


def output(record, **options):
    return [(m.role, m.content) for m in parse_conversation(record, **options).messages]


def test_messages():
    record = {"messages": [{"role": "system", "content": "S"}, ASK, ANSWER]}
    assert output(record) == [("system", "S"), ("user", "1+1?"), ("assistant", "2")]


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ({"question": "Q", "final": "1", "equation": "x"}, "1"),
        ({"prompt": "Q", "answer": "so 1", "final": "1"}, "so 1"),
        ({"question": "Q", "answer": 2}, "2"),
    ],
)
def test_questions_with_an_answer_are_chats(record, answer):
    assert output(record) == [("user", "Q"), ("assistant", answer)]
    assert output({"system": "S"} | record)[0] == ("system", "S")
    assert output({"question": "Q"}, answered=False) == [("user", "Q")]


def test_developer_is_system_and_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    record = {"messages": [{"role": "developer", "content": parts}, ASK, ANSWER]}
    assert output(record)[0] == ("system", "ab")


def test_llamafactory_parts_of_reasoning_and_calls():
    parts = [
        {"type": "reasoning", "value": "use it"},
        {"type": "text", "value": "So:"},
        {"type": "tool_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
    ]
    result = [{"type": "text", "value": "2"}]
    record = {
        "messages": [ASK, {"role": "assistant", "content": parts}, RESULT | {"content": result}]
    }
    call = Call(name="add", arguments={"x": 1})
    assert parse_conversation(record).messages[1:] == (
        Message(role="assistant", content="So:", reasoning="use it", calls=(call,)),
        Message(role="tool", content="2"),
    )


def test_sharegpt():
    record = {
        "system": "S",
        "tools": json.dumps([TOOL]),
        "conversations": [
            {"from": "human", "value": "1+1?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "It is 2."},
        ],
    }
    conversation = parse_conversation(record)
    assert conversation.messages == (
        Message(role="system", content="S"),
        Message(role="user", content="1+1?"),
        Message(role="assistant", content="", calls=(Call(name="add", arguments={"x": 1}),)),
        Message(role="tool", content="2"),
        Message(role="assistant", content="It is 2."),
    )
    assert conversation.tools == (TOOL,)


def test_minimind():
    """Tools on the system message, calls as JSON text, and a system message for tools only."""
    record = {
        "conversations": [
            {"role": "system", "content": "", "tools": json.dumps([TOOL])},
            ASK,
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "use it",
                "tool_calls": '[{"name": "add", "arguments": "{\\"x\\": 1}"}]',
            },
            RESULT,
            ANSWER,
        ]
    }
    conversation = parse_conversation(record)
    assert conversation.tools == (TOOL,)
    assert [message.role for message in conversation.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert conversation.messages[1].calls == (Call(name="add", arguments={"x": 1}),)
    assert conversation.messages[1].reasoning == "use it"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "I", "input": "", "output": "O"}, [("user", "I"), ("assistant", "O")]),
        ({"instruction": "I", "output": "O"}, [("user", "I"), ("assistant", "O")]),
        (
            {"instruction": "I", "input": "X", "output": "O"},
            [("user", "I\n\nX"), ("assistant", "O")],
        ),
        (
            {"instruction": "I", "output": "O", "system": "S", "history": [["a", "b"]]},
            [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "I"), ("assistant", "O")],
        ),
    ],
)
def test_alpaca(record, expected):
    assert output(record) == expected


def test_rows_of_parquet_with_empty_columns_are_read():
    empty = {"from": None, "value": None, "tool_calls": None, "reasoning_content": None}
    record = {"messages": [ASK | empty, ANSWER | empty], "tools": None, "system": None}
    assert output(record) == [("user", "1+1?"), ("assistant", "2")]


def test_a_blank_system_message_is_left_out():
    assert output({"messages": [{"role": "system", "content": " "}, ASK, ANSWER]}) == [
        ("user", "1+1?"),
        ("assistant", "2"),
    ]


def test_a_prompt_need_not_be_answered():
    assert output({"messages": [ASK]}, answered=False) == [("user", "1+1?")]
    assert output({"instruction": "I"}, answered=False) == [("user", "I")]
    whole = parse_conversation({"messages": [ASK, ANSWER]})
    assert whole.prompt() == parse_conversation({"messages": [ASK]}, answered=False)
    assert whole.prompt().prompt() == whole.prompt()


def messages(*items):
    return {"messages": list(items)}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "not a JSON object"),
        ({}, "none of `messages`"),
        ({"text": "x"}, "none of `messages`"),
        ({"messages": "x"}, "`messages`: not valid JSON"),
        ({"messages": "[1]"}, "`messages` is not a list of objects"),
        ({"conversations": ["x"]}, "`conversations` is not a list of objects"),
        (messages(), "has no message of a user or an assistant"),
        (messages({"role": "system", "content": "S"}), "has no message of a user or an assistant"),
        (messages(ASK), "no assistant turn"),
        (messages({"content": "x"}), "message 1: `role` is missing"),
        (messages({"role": "robot", "content": "x"}), "message 1: unknown role 'robot'"),
        (messages({"role": 3, "content": "x"}), "message 1: unknown role 3"),
        (messages({"role": "user"}), "message 1: `content` is missing"),
        (messages({"role": "user", "content": 3}), "message 1: `content` is not text"),
        (messages({"role": "user", "content": [{"type": "image"}]}), "`content` is not text"),
        (messages({"role": "user", "content": [{"type": []}]}), "`content` is not text"),
        (messages({"role": "user", "content": [{"type": "text"}]}), "`content` is not text"),
        (messages(ASK, ASK, ANSWER), "message 2: role user, expected assistant"),
        (messages(ANSWER, ASK), "message 1: role assistant, expected system or user"),
        (messages(ASK, ANSWER, ANSWER), "message 3: role assistant, expected user"),
        (messages(ASK, ANSWER, RESULT), "message 3: role tool, expected user"),
        (messages(ASK, CALL, ASK, ANSWER), "message 3: role user, expected tool"),
        (messages(ASK, {"role": "system", "content": "S"}, ANSWER), "message 2: role system"),
        (messages(ASK, {"role": "assistant", "content": " \n"}), "message 2: empty content"),
        (messages({"role": "user", "content": ""}, ANSWER), "message 1: empty content"),
        (messages(ASK, {"role": "assistant", "content": "\ud800"}), "lone surrogate"),
        (messages(ASK, ANSWER | {"reasoning_content": 5}), "`reasoning_content` is not text"),
        (messages(ASK, ANSWER | {"tool_calls": "[{"}), "`tool_calls`: not valid JSON"),
        (messages(ASK, ANSWER | {"tool_calls": [{}]}), "a tool call has no name"),
        (messages(ASK, ANSWER | {"tool_calls": [3]}), "a tool call has no name"),
        (
            messages(ASK, ANSWER | {"tool_calls": [{"name": "f", "arguments": "x"}]}),
            "arguments: not valid JSON",
        ),
        (
            messages(ASK, ANSWER | {"tool_calls": [{"name": "f", "arguments": [1]}]}),
            "arguments are not a JSON object",
        ),
        (messages(ASK, ANSWER) | {"tools": "{"}, "`tools`: not valid JSON"),
        (messages(ASK, ANSWER) | {"tools": [1]}, "`tools` is not a list of objects"),
        (messages(ASK, ANSWER) | {"tools": [{"x": b"raw"}]}, "a bytes is not JSON"),
        (messages(ASK, ANSWER) | {"tools": "[" * 5000}, "`tools`"),
        (messages(ASK, ANSWER) | {"tools": "[" * 80 + "]" * 80}, "nested more than 64"),
        (messages(ASK, ANSWER) | {"system": 4}, "`system` is not text"),
        ({"instruction": "I"}, "no text in any of `answer`, `output`, `final`"),
        ({"question": "Q"}, "no text in any of `answer`, `output`, `final`"),
        ({"prompt": ["Q"], "answer": "A"}, "`prompt` is not text"),
        ({"question": "Q", "answer": " "}, "message 2: empty content"),
        ({"question": "Q", "answer": True}, "no text in any of"),
        ({"instruction": 3, "output": "O"}, "`instruction` is not text"),
        ({"instruction": "", "output": "O"}, "message 1: empty content"),
        ({"instruction": "I", "output": None}, "no text in any of `answer`, `output`"),
        ({"instruction": "I", "output": "O", "history": [["a"]]}, "`history`"),
    ],
)
def test_T9_a_defect_has_a_short_reason(record, reason):
    with pytest.raises(BadRecord) as caught:
        parse_conversation(record)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [*("messages", "conversations", "instruction", "input", "output", "system", "history", "tools")]
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "function_call"])
ITEM = st.fixed_dictionaries(
    {},
    optional={
        "role": ROLES | JSON,
        "from": ROLES | JSON,
        "content": st.just("x") | JSON,
        "value": st.just("x") | JSON,
        "tool_calls": JSON,
        "reasoning_content": JSON,
        "tools": JSON,
    },
)


@settings(derandomize=True, deadline=None, max_examples=500)
@given(st.dictionaries(KEYS, st.lists(ITEM, max_size=4) | JSON, max_size=4) | JSON, st.booleans())
def test_T9_any_json_is_a_conversation_or_a_reason(record, answered):
    try:
        outcome = parse_conversation(record, answered=answered)
    except BadRecord as error:
        outcome = str(error)
    assert isinstance(outcome, Conversation) or (outcome and "\n" not in outcome)
