"""Chat sessions: history, trimming, tools, undo."""

import pytest
import torch

from tinsmith.core.errors import UserError
from tinsmith.infer.completions import CompletionEngine
from tinsmith.infer.engine import Event
from tinsmith.infer.sample import SamplingParams
from tinsmith.infer.session import EMPTY_REPLY, ChatSession
from tinsmith.text.chat import encode_prompt, parse_conversation
from tinsmith.text.tools import TOOL_SPECS

GREEDY = SamplingParams(temperature=0)
WARM = SamplingParams(temperature=1.5, seed=5)


@pytest.fixture
def engine(small, tokenizer):
    lm = small(vocab_size=tokenizer.vocab_size, max_seq_len=200)
    return CompletionEngine(lm, tokenizer, max_batch_size=2)


class ScriptedEngine:
    """Stands in for `Engine`: completes every prompt with the next of these texts."""

    max_seq_len = 2000

    def __init__(self, tokenizer, replies):
        self.prompts, self._tokenizer, self._replies = [], tokenizer, list(replies)
        self._pending = []

    def add(self, prompt, sampling_params, max_new_tokens, stop_token_ids=()):
        self.prompts.append(list(prompt))
        record = {"messages": [{"role": "user", "content": "?"}, self._replies.pop(0)]}
        question = encode_prompt(self._tokenizer, parse_conversation(record).prompt())
        whole = encode_prompt(
            self._tokenizer,
            parse_conversation(
                {"messages": [*record["messages"], *self._after(record)]}, answered=False
            ),
        )
        ids = whole[len(question) :]
        ids = ids[: ids.index(self._tokenizer.end_of_turn) + 1]
        request_id = len(self.prompts)
        reasons = [None] * (len(ids) - 1) + ["stop"]
        self._pending += [
            Event(request_id, token, -1.0, reason)
            for token, reason in zip(ids, reasons, strict=True)
        ]
        return request_id

    def _after(self, record):
        calls = record["messages"][-1].get("tool_calls", [])
        role = "tool" if calls else "user"
        return [{"role": role, "content": "next"}] * max(len(calls), 1)

    def step(self):
        return [self._pending.pop(0)] if self._pending else []

    def cancel(self, request_id):
        self._pending = [event for event in self._pending if event.request_id != request_id]


@pytest.fixture
def scripted(tokenizer):
    def start(replies):
        engine = CompletionEngine.__new__(CompletionEngine)
        engine.tokenizer, engine.engine, engine._streams = tokenizer, None, {}
        engine.engine = ScriptedEngine(tokenizer, replies)
        return engine

    return start


def assistant(content, *calls):
    return {
        "role": "assistant",
        "content": content,
        **({"tool_calls": list(calls)} if calls else {}),
    }


def test_a_reply_continues_the_whole_conversation(scripted, tokenizer):
    engine = scripted([assistant("one"), assistant("two")])
    session = ChatSession(engine, system="Be brief.")
    assert "".join(session.reply("first", GREEDY, 20)) == "one"
    assert "".join(session.reply("second", GREEDY, 20)) == "two"
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "second"},
    ]
    expected = encode_prompt(tokenizer, parse_conversation({"messages": messages}, answered=False))
    assert engine.engine.prompts[1] == expected
    assert session.record() == {"messages": [*messages, assistant("two")]}
    assert session.undo() == "second"
    assert session.record() == {"messages": messages[:3]}
    assert (session.undo(), session.undo()) == ("first", None)


def test_the_oldest_exchanges_are_trimmed_when_the_context_is_full(engine):
    session = ChatSession(engine, system="Be brief.")
    for index in range(5):
        list(session.reply(f"number {index} " + "x" * 30, WARM, 20))
    assert session.num_trimmed > 0
    assert session.messages[session.num_trimmed]["role"] == "user"
    assert len(session.record()["messages"]) == 11


def test_trimming_keeps_the_system_message_and_room_for_the_reply(scripted, tokenizer):
    engine = scripted([assistant(f"reply {index}") for index in range(9)])
    engine.engine.max_seq_len = 160
    session = ChatSession(engine, system="Be brief.")
    for index in range(9):
        list(session.reply(f"message {index}", GREEDY, 60))
    texts = [tokenizer.decode(prompt) for prompt in engine.engine.prompts]
    assert all(len(prompt) <= 100 for prompt in engine.engine.prompts)
    assert all("Be brief." in text for text in texts)
    assert "message 0" in texts[1]
    assert "message 0" not in texts[-1]
    assert all(f"message {index}" in text for index, text in enumerate(texts))


def test_a_message_longer_than_the_context_raises_and_is_not_recorded(engine):
    session = ChatSession(engine)
    list(session.reply("hello", WARM, 5))
    before = session.record()
    with pytest.raises(UserError, match="context has 200: shorten it"):
        list(session.reply("x" * 3000, WARM, 5))
    assert session.record() == before


def test_the_text_of_an_interrupted_reply_is_kept(engine):
    session = ChatSession(engine)
    increments = session.reply("hello", WARM, 60)
    text = next(increments) + next(increments)
    increments.close()
    assert session.messages[-1] == assistant(text.strip() or EMPTY_REPLY)
    assert not engine.busy


def test_two_sessions_on_one_engine_do_not_mix(engine):
    def talk(session):
        return ["".join(session.reply(text, WARM, 15)) for text in ("hello", "and then?")]

    alone = talk(ChatSession(engine))
    other = ChatSession(engine, system="Something else.").reply("hello", WARM, 60)
    next(other)
    assert talk(ChatSession(engine)) == alone


def call(expression):
    return {"name": "calculator", "arguments": {"expression": expression}}


def test_a_tool_call_is_run_and_its_result_goes_back_to_the_model(scripted, tokenizer):
    engine = scripted([assistant("", call("6*7"), call("1/0")), assistant("42")])
    session = ChatSession(engine, tools=["calculator"])
    output = "".join(session.reply("6 times 7?", GREEDY, 50))
    assert output.endswith("42")
    assert "<tool_response>\n42\n</tool_response>" in output
    record = session.record()
    assert record["tools"] == [TOOL_SPECS["calculator"]]
    roles = [message["role"] for message in record["messages"]]
    assert roles == ["user", "assistant", "tool", "tool", "assistant"]
    assert record["messages"][3]["content"] == "error: division by zero"
    without_reply = record | {"messages": record["messages"][:-1]}
    expected = encode_prompt(tokenizer, parse_conversation(without_reply, answered=False))
    assert engine.engine.prompts[1] == expected
    assert session.undo() == "6 times 7?"
    assert session.messages == []


def test_without_tools_a_call_is_text(scripted):
    engine = scripted([assistant("", call("6*7"))])
    session = ChatSession(engine)
    list(session.reply("6 times 7?", GREEDY, 50))
    assert [message["role"] for message in session.messages] == ["user", "assistant"]
    assert "<tool_call>" in session.messages[1]["content"]


def test_the_last_turn_calls_no_tool(scripted):
    engine = scripted([assistant("", call("1+1"))] * 3)
    session = ChatSession(engine, tools=["calculator"], max_turns=3)
    list(session.reply("count", GREEDY, 50))
    roles = [message["role"] for message in session.messages]
    assert roles == ["user", "assistant", "tool", "assistant", "tool", "assistant"]


def test_a_malformed_call_is_text(scripted):
    engine = scripted([assistant("<tool_call>nonsense</tool_call>")])
    session = ChatSession(engine, tools=["calculator"])
    list(session.reply("6 times 7?", GREEDY, 50))
    assert session.messages[1] == assistant("<tool_call>nonsense</tool_call>")


def test_a_reply_computes_no_gradients(engine):
    assert torch.is_grad_enabled()
    list(ChatSession(engine).reply("hello", WARM, 5))
    assert all(parameter.grad is None for parameter in engine.engine.lm.parameters())
