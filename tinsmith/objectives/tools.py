"""Turns of a conversation with tools: ids in, ids out.

What a tool says is appended to the ids that are there, as the chat template would write it after
an assistant's turn. Nothing is rendered or encoded again, so ids that were sampled stay as they
are. A call is what stands between the ids of `<tool_call>` and `</tool_call>`; the same characters
spelled out are text.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from tinsmith.objectives.calculator import BadExpression, calculate
from tinsmith.objectives.rollout import Episode
from tinsmith.text.chat import Call, Conversation, Message, encode_chat, encode_prompt
from tinsmith.text.tokenizer import Tokenizer

ToolName = Literal["calculator"]
Tool = Callable[[Mapping[str, Any]], str]
"""Arguments to an answer; ValueError, with a few words for the model, where there is none."""


def calculator(arguments: Mapping[str, Any]) -> str:
    """`{"expression": "12 * (3 + 4)"}` -> `84`."""
    expression = arguments.get("expression")
    if not isinstance(expression, str):
        raise BadExpression("expression must be text")
    return calculate(expression)


TOOLS: dict[ToolName, Tool] = {"calculator": calculator}


class Tools:
    """Answers the calls of a policy, for as many turns as an episode may have."""

    def __init__(self, tokenizer: Tokenizer, names: Sequence[ToolName], turns: int):
        self._tokenizer, self._turns = tokenizer, turns
        self._tools: dict[str, Tool] = {name: TOOLS[name] for name in names}
        self._opening, self._closing = map(tokenizer.special, ("<tool_call>", "</tool_call>"))

    def reply(self, episode: Episode) -> list[int]:
        """Ids of what the tools say to an episode's newest turn, up to the header of the next one;
        none where nothing was called, or no turn is left.
        """
        calls = self.calls(episode.newest)
        if not calls or episode.turns >= self._turns:
            return []
        return self.heard([self.answer(call) for call in calls])

    def calls(self, ids: Sequence[int]) -> list[str]:
        """What stands between the tags of every call in a turn, as text."""
        found: list[str] = []
        start: int | None = None
        for place, token in enumerate(ids):
            if token == self._opening:
                start = place + 1
            elif token == self._closing and start is not None:
                found.append(self._tokenizer.decode(list(ids[start:place])))
                start = None
        return found

    def answer(self, call: str) -> str:
        """What a tool says to a call, or what is wrong with the call."""
        try:
            asked = json.loads(call)
        except (ValueError, RecursionError):
            return "error: a call is a JSON object"
        if not isinstance(asked, dict) or not isinstance(asked.get("arguments"), dict):
            return "error: a call has a name and arguments"
        tool = self._tools.get(str(asked.get("name")))
        if tool is None:
            return f"error: there is no such tool; there is {', '.join(self._tools)}"
        try:
            return tool(asked["arguments"])
        except ValueError as error:
            return f"error: {error}"

    def heard(self, results: Sequence[str]) -> list[int]:
        """What follows the end of an assistant's turn: the results, and the header of the next
        turn.
        """
        call = Call(name="calculator", arguments={})
        asked = Message(role="user", content="?")
        said = Message(role="assistant", content="", calls=(call,) * len(results))
        told = [Message(role="tool", content=result) for result in results]
        before = encode_chat(self._tokenizer, Conversation(messages=(asked, said)))
        turn = len(before.mask) - before.mask[::-1].index(True)
        whole = encode_prompt(self._tokenizer, Conversation(messages=(asked, said, *told)))
        assert whole[:turn] == before.ids[:turn], "a template never changes what was said"
        return whole[turn:]
