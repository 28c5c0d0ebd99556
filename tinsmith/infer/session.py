"""A conversation with a model: history, trimming to the context length, tools, undo and retry."""

import json
from collections.abc import Generator, Sequence
from typing import Any

from tinsmith.core.errors import UserError
from tinsmith.infer.completions import Completion, CompletionEngine
from tinsmith.infer.sample import SamplingParams
from tinsmith.text.chat import BadRecord, encode_prompt, parse_conversation
from tinsmith.text.tools import (
    TOOL_SPECS,
    TOOLS,
    ToolName,
    parse_tool_calls,
    run_tool_call,
)

EMPTY_REPLY = "..."
"""Content of a reply without text: chat records may not have empty messages."""


class ChatSession:
    """The messages of one conversation. Several sessions can share an engine.

    `tools`: names of built-in tools that the model may call. `max_turns`: assistant turns per
    reply; the model cannot call a tool in the last one.
    """

    def __init__(
        self,
        engine: CompletionEngine,
        *,
        system: str | None = None,
        tools: Sequence[ToolName] = (),
        max_turns: int = 4,
    ):
        self.system, self.tools, self.max_turns = system, tuple(tools), max_turns
        self.messages: list[dict[str, Any]] = []
        """Messages in OpenAI's format, without the system message."""
        self.num_trimmed = 0
        """How many of the oldest messages were left out of the newest prompt."""
        self._engine = engine

    def record(self) -> dict[str, Any]:
        """Return the whole conversation as a chat record, as `tinsmith train` reads it."""
        return self._record(start=0)

    def reply(
        self,
        text: str,
        sampling_params: SamplingParams,
        max_new_tokens: int,
        *,
        thinking: bool = False,
        stop: Sequence[str] = (),
    ) -> Generator[str, None, None]:
        """Add a user message and yield the model's reply in increments.

        The oldest messages are left out of the prompt when the context is too short for it and
        `max_new_tokens` tokens (or for half of the context, if that is less). If the generator is
        closed or interrupted, the text so far is kept as the reply. `thinking` opens `<think>` in
        the prompt. Raise UserError, and leave the conversation as it was, if the message alone does
        not fit.
        """
        self.messages.append({"role": "user", "content": text})
        for turn in range(self.max_turns):
            try:
                prompt = self._encode_prompt(max_new_tokens, thinking)
            except UserError:
                if turn == 0:
                    self.messages.pop()
                raise
            stream = self._engine.add(prompt, sampling_params, max_new_tokens, stop)
            calls: list[str] = []
            try:
                yield from stream.text()
            finally:
                calls = self._append_reply(stream.completion(), turn)
            if not calls:
                return
            for call in calls:
                result = run_tool_call({name: TOOLS[name] for name in self.tools}, call)
                self.messages.append({"role": "tool", "content": result})
                yield f"\n<tool_response>\n{result}\n</tool_response>\n"

    def undo(self) -> str | None:
        """Remove the last user message and its reply, and return the text of that message."""
        starts = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not starts:
            return None
        text = self.messages[starts[-1]]["content"]
        del self.messages[starts[-1] :]
        self.num_trimmed = 0
        return text

    def reset(self) -> None:
        """Remove all messages. The system message stays."""
        self.messages.clear()
        self.num_trimmed = 0

    def _record(self, start: int) -> dict[str, Any]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        record: dict[str, Any] = {"messages": system + self.messages[start:]}
        return record | ({"tools": [TOOL_SPECS[name] for name in self.tools]} if self.tools else {})

    def _encode_prompt(self, max_new_tokens: int, thinking: bool) -> list[int]:
        """Encode the conversation, without the oldest exchanges if it is too long."""
        limit = self._engine.engine.max_seq_len
        longest = limit - min(max_new_tokens, limit // 2)
        starts = [
            index
            for index, message in enumerate(self.messages)
            if message["role"] == "user" and index >= self.num_trimmed
        ]
        ids: list[int] = []
        for start in starts:
            conversation = parse_conversation(self._record(start), answered=False)
            ids = encode_prompt(self._engine.tokenizer, conversation, thinking=thinking or None)
            self.num_trimmed = start
            if len(ids) <= longest:
                return ids
        if len(ids) >= limit:
            raise UserError(
                f"the message has {len(ids)} tokens with its template, and the model's context has "
                f"{limit}: shorten it"
            )
        return ids

    def _append_reply(self, completion: Completion, turn: int) -> list[str]:
        """Append the assistant message of a completion, and return the tool calls to run."""
        text = completion.text.strip()
        if self.tools and completion.finish_reason == "stop" and turn + 1 < self.max_turns:
            calls = parse_tool_calls(self._engine.tokenizer, completion.token_ids)
            content = text.partition("<tool_call>")[0].strip()
            message = {"role": "assistant", "content": content, "tool_calls": calls}
            if calls and _is_valid(message):
                self.messages.append(message | {"tool_calls": [json.loads(call) for call in calls]})
                return calls
        self.messages.append({"role": "assistant", "content": text or EMPTY_REPLY})
        return []


def _is_valid(message: dict[str, Any]) -> bool:
    """Return True if the tool calls of an assistant message can be read."""
    question = {"role": "user", "content": "?"}
    try:
        parse_conversation({"messages": [question, message]})
    except BadRecord:
        return False
    return True
