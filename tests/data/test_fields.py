"""Every field of a record is used or named in the report of prepare."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith.data.files import read_records
from tinsmith.data.formats import FORMATS
from tinsmith.data.prepare.prepare import prepare
from tinsmith.data.sources import ChatsData, TextData
from tinsmith.text.chat import BadRecord, Call, encode_chat, parse_conversation
from tinsmith.text.fields import Fields

NAMES = st.sampled_from(
    [
        *("system", "system_prompt", "context", "input", "options", "choices", "question"),
        *("instruction", "prompt", "query", "answer", "output", "final", "response", "completion"),
        *("chosen", "rejected", "id", "source", "tools", "functions", "topic", "history", "text"),
    ]
)
MESSAGE_NAMES = st.sampled_from(
    [
        *("reasoning", "thinking", "reasoning_content", "name", "tool_call_id", "value", "id"),
        *("weight", "train", "tool_calls", "function_call", "cache_control"),
    ]
)


@st.composite
def records(draw):
    """Records whose leaves are texts that occur once, with the path of every text."""
    leaves = {}

    def leaf(path):
        leaves[text := f"leaf{len(leaves)}x"] = path
        return text

    def value(name, path):
        if name in ("options", "choices"):
            return [leaf(path), leaf(path)]
        if name in ("tools", "functions"):
            return [{"name": leaf(path)}]
        if name == "history":
            return [[leaf(path), leaf(path)]]
        if name in ("tool_calls", "function_call"):
            key = draw(st.sampled_from(["arguments", "parameters"]))
            call = {"name": leaf(path), key: {"x": leaf(path)}}
            if draw(st.booleans()):
                call["id"] = leaf(f"{path}.id")
            return [call] if name == "tool_calls" else call
        if name in ("weight", "train"):
            return draw(st.sampled_from([0, 1]))
        return leaf(path)

    def message(role, key):
        names = draw(st.lists(MESSAGE_NAMES, unique=True, max_size=3))
        extra = {name: value(name, f"{key}.{name}") for name in names}
        if draw(st.booleans()):
            return {"from": role, "value": leaf(f"{key}.value")} | {
                name: item for name, item in extra.items() if name != "value"
            }
        return {"role": role, "content": leaf(f"{key}.content")} | extra

    record = {name: value(name, name) for name in draw(st.lists(NAMES, unique=True, max_size=6))}
    if draw(st.booleans()):
        key = draw(st.sampled_from(["messages", "conversations"]))
        record[key] = [message("user", key), message("assistant", key)]
    return record, leaves


@settings(derandomize=True, deadline=None, max_examples=600)
@given(records(), st.sampled_from(["chats", "pairs", "prompts"]))
def test_D3_every_field_is_used_or_named(drawn, name):
    record, leaves = drawn
    fields = Fields(record)
    try:
        content = FORMATS[name].read(fields)
    except BadRecord:
        return
    unread = FORMATS[name].unread(fields)
    for text, path in leaves.items():
        names = path.split(".")
        prefixes = {".".join(names[: end + 1]) for end in range(len(names))}
        is_named = not prefixes.isdisjoint(unread)
        assert text in repr(content) or is_named or text not in repr(record), (path, unread)


def user(text="q"):
    return {"role": "user", "content": text}


def assistant(text="a", **more):
    return {"role": "assistant", "content": text} | more


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}])
def test_D3_a_message_without_weight_has_no_loss(flag, tokenizer):
    messages = [user("hi"), assistant("BAD", **flag), user("again"), assistant("GOOD", weight=1)]
    ids, mask = encode_chat(tokenizer, parse_conversation({"messages": messages}))
    learned = tokenizer.decode([i for i, is_target in zip(ids, mask, strict=True) if is_target])
    assert "GOOD" in learned
    assert "BAD" not in learned
    assert "BAD" in tokenizer.decode(ids)
    plain = [{k: v for k, v in each.items() if k in ("role", "content")} for each in messages]
    assert encode_chat(tokenizer, parse_conversation({"messages": plain})).ids == ids
    with pytest.raises(BadRecord, match="weight"):
        parse_conversation({"messages": [user(), assistant(weight=0.5)]})
    fields = Fields({"messages": [user() | {"train": True}, assistant()]})
    parse_conversation(fields)
    assert list(fields.unread()) == ["messages.train"]


@pytest.mark.parametrize(
    ("record", "question"),
    [
        ({"question": "Q", "context": "C", "answer": "a"}, "Q\n\nC"),
        ({"instruction": "Q", "context": "C", "output": "a"}, "Q\n\nC"),
        ({"prompt": "Q", "input": "C", "output": "a"}, "Q\n\nC"),
        ({"question": "Q", "options": ["A) one", "B) two"], "answer": "a"}, "Q\n\nA) one\nB) two"),
        ({"question": "Q", "choices": ["one", 2], "answer": "a"}, "Q\n\nA. one\nB. 2"),
        (
            {"question": "Q", "choices": {"label": ["1", "2"], "text": ["x", "y"]}, "answer": "a"},
            "Q\n\n1. x\n2. y",
        ),
        ({"prompt": "q", "completion": "a"}, "q"),
        ({"query": "q", "response": "a"}, "q"),
        ({"instruction": "q", "response": "a"}, "q"),
        ({"prompt": [user()], "completion": [assistant()]}, "q"),
        ({"prompt": [user()], "completion": assistant()}, "q"),
        ({"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}}, "q"),
        ({"messages": json.dumps([user(), assistant()])}, "q"),
        ({"messages": [{"role": "USER", "content": "q"}, {"role": "model", "content": "a"}]}, "q"),
    ],
)
def test_D12_usual_shapes_are_one_conversation(record, question):
    messages = parse_conversation(record).messages
    assert [(m.role, m.content) for m in messages] == [("user", question), ("assistant", "a")]
    assert parse_conversation({"system_prompt": "S"} | record).messages[0].content == "S"


def test_D3_D12_calls_reasoning_and_tools_in_their_usual_spellings():
    call = Call(name="f", arguments={"x": 1})
    named = {"name": "f", "parameters": {"x": 1}}
    line = json.dumps({"name": "f", "arguments": {"x": 1}})
    for calling, calls in (
        (assistant(None, tool_calls=[named]), (call,)),
        (assistant(None, function_call={"name": "f", "arguments": '{"x": 1}'}), (call,)),
        ({"from": "function_call", "value": f"{line}\n{line}"}, (call, call)),
    ):
        for result, text in (({"y": 2}, '{"y": 2}'), (None, ""), ("r", "r")):
            tool = {"role": "ipython", "content": result}
            chat = parse_conversation({"messages": [user(), calling, tool, assistant()]})
            assert chat.messages[1].calls == calls
            assert chat.messages[2].content == text
    for key in ("reasoning", "thinking", "reasoning_content"):
        chat = parse_conversation({"messages": [user(), assistant(**{key: "why"})]})
        assert chat.messages[1].reasoning == "why"
    chat = parse_conversation({"functions": [{"name": "f"}], "messages": [user(), assistant()]})
    assert chat.tools == ({"type": "function", "function": {"name": "f"}},)


def test_D11_null_columns_are_absent():
    chat = [user(), assistant()]
    null = dict.fromkeys(["messages", "conversations", "instruction", "prompt", "question"])
    expected = parse_conversation({"messages": chat})
    for record in (
        {"messages": chat},
        {"conversations": chat},
        {"instruction": "q", "output": "a"},
        {"prompt": "q", "answer": "a"},
        {"question": "q", "response": "a"},
    ):
        assert parse_conversation(null | {"answer": None, "chosen": None} | record) == expected
    pair = {"chosen": "x", "rejected": "y"}
    for record in ({"messages": [user()]}, {"instruction": "q"}, {"question": "q"}):
        assert FORMATS["pairs"].read(null | record | pair).prompt == expected.prompt()
        assert FORMATS["prompts"].read(null | record).prompt == expected.prompt()


def test_D3_prepare_names_the_fields_never_read(prepared, write_lines, capsys):
    rows = [{"messages": [user(), assistant(str(i), name="n")], "topic": "t"} for i in range(4)]
    path = write_lines("c.jsonl", [*rows, {"messages": [user(), assistant("x")], "topic": None}])
    result = prepared(ChatsData(path=str(path), validation=0), "chats")
    assert result.report["sources"][0]["never_read"] == {"messages.name": 4, "topic": 4}
    texts = write_lines("t.jsonl", [{"text": f"a text {i}", "url": "u"} for i in range(3)])
    result = prepared(TextData(path=str(texts), validation=0))
    assert result.report["sources"][0]["never_read"] == {"url": 3}


def test_D10_structs_of_parquet_have_no_padding(tmp_path):
    tools = [
        {"name": "f", "parameters": {"properties": {"x": {"type": "number"}}}},
        {"name": "g", "parameters": {"properties": {"city": {"type": "string", "enum": ["a"]}}}},
    ]
    calls = [{"name": "f", "arguments": {"x": 0}}, {"name": "g", "arguments": {"city": "a"}}]
    result = {"role": "tool", "content": "r"}
    rows = [
        {
            "messages": [user(), assistant(None, tool_calls=[call]), result, assistant()],
            "tools": [tool],
        }
        for call, tool in zip(calls, tools, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    read = [record.data for record in read_records(tmp_path / "x.parquet")]
    assert [parse_conversation(each) for each in read] == [
        parse_conversation(each) for each in rows
    ]


def test_D12_the_line_of_prepare_says_how_many_records_are_rejected_and_why(
    tmp_path, tokenizer, write_lines
):
    rows = [{"messages": [user(), assistant(str(i))]} for i in range(2)]
    path = write_lines("c.jsonl", [*rows, {}, *([{"messages": [user()]}] * 2)])
    lines = []
    config = ChatsData(path=str(path), validation=0)
    result = prepare(config, tokenizer, "chats", tmp_path / "data", lines.append)
    assert "3 lines rejected (60%; most often: no assistant turn; see " in lines[0]
    assert lines[1] == " warning c: more than half of the records are rejected"
    assert list(result.report["sources"][0]["reject_reasons"].values()) == [2, 1]
