"""`tinsmith chat`: a conversation in the terminal."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from tinsmith.core.errors import UserError
from tinsmith.core.log import print_line
from tinsmith.core.parse import Config, did_you_mean, parse
from tinsmith.core.yamlfile import parse_yaml
from tinsmith.hub.load import load
from tinsmith.infer.completions import CompletionEngine
from tinsmith.infer.sample import SamplingParams
from tinsmith.infer.session import ChatSession
from tinsmith.text.tools import TOOLS, ToolName
from tinsmith.train.parallel import pick_device
from tinsmith.verbs.export_import import parse_rope_scaling
from tinsmith.verbs.generate import sampling_params

HELP = """ /reset              remove all messages
 /undo               remove the last message and its reply
 /retry              reply to the last message again
 /save FILE          append the conversation to a .jsonl file of chats
 /set KEY=VALUE      temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens, seed,
                     thinking
 /system TEXT        set the system message (nothing: remove it)
 /quit               end; so does Ctrl-D, or Ctrl-C twice"""


@dataclass(frozen=True, kw_only=True)
class Settings(Config):
    """Generation settings that `/set` changes."""

    temperature: float = 0.7
    top_p: float | None = 0.95
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    max_new_tokens: int = 400
    seed: int | None = None
    thinking: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError("--max-new-tokens: at least 1")
        self.sampling_params()

    def sampling_params(self) -> SamplingParams:
        """Return the sampling parameters. Raise UserError for a value out of range."""
        names = [field.name for field in fields(SamplingParams)]
        return sampling_params(**{name: getattr(self, name) for name in names})


class TerminalChat:
    """A chat session in the terminal: prints replies and runs the commands of `/help`."""

    def __init__(self, session: ChatSession, settings: Settings):
        self.session, self.settings = session, settings
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda rest: print_line(HELP),
            "reset": self._reset,
            "undo": self._undo,
            "retry": self._retry,
            "save": self._save,
            "set": self._set,
            "system": self._system,
        }

    def handle(self, line: str) -> None:
        """Run a command or reply to a message. Errors are printed, and the chat goes on."""
        try:
            if line.startswith("/"):
                self._run_command(line)
            else:
                self._reply(line)
        except UserError as error:
            print_line(f" {error}")

    def _reply(self, text: str) -> None:
        """Print a reply while it is generated. Ctrl-C ends it and keeps the text so far."""
        trimmed = self.session.num_trimmed
        increments = self.session.reply(
            text,
            self.settings.sampling_params(),
            self.settings.max_new_tokens,
            thinking=self.settings.thinking,
        )
        try:
            for increment in increments:
                _write(increment)
        except KeyboardInterrupt:
            _write(" ...")
        finally:
            increments.close()
        _write("\n")
        if self.session.num_trimmed > trimmed:
            print_line(
                f" the context is full: the model no longer sees the first "
                f"{self.session.num_trimmed} messages"
            )

    def _run_command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        if name not in self._commands:
            hint = did_you_mean(name, list(self._commands)) or "; /help lists all"
            raise UserError(f"/{name} is unknown{hint}")
        self._commands[name](rest.strip())

    def _reset(self, rest: str) -> None:
        self.session.reset()
        print_line(" all messages are removed")

    def _undo(self, rest: str) -> None:
        removed = self.session.undo()
        print_line(" nothing to undo" if removed is None else " the last message is removed")

    def _retry(self, rest: str) -> None:
        message = self.session.undo()
        if message is None:
            raise UserError("nothing to retry")
        self._reply(message)

    def _save(self, rest: str) -> None:
        if not rest:
            raise UserError("/save FILE")
        try:
            with Path(rest).expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.session.record(), ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{rest}: {error.strerror}") from None
        print_line(f" appended to {rest}")

    def _set(self, rest: str) -> None:
        key, equals, text = rest.partition("=")
        names = [field.name for field in fields(Settings)]
        if not equals or key not in names:
            raise UserError(f"/set KEY=VALUE, with KEY one of {', '.join(names)}")
        current = {name: getattr(self.settings, name) for name in names}
        self.settings = parse(Settings, current | {key: parse_yaml(text, f"/set {key}")}, "/set")
        print_line(f" {key} is {getattr(self.settings, key)}")

    def _system(self, rest: str) -> None:
        self.session.system = rest or None
        print_line(" the system message is set" if rest else " the system message is removed")


def chat(
    model: str,
    system: str | None,
    settings: Settings,
    tools: Sequence[str],
    rope_scaling: str | None,
) -> None:
    """Chat with a model in the terminal, or with the lines of standard input."""
    names: list[ToolName] = [_tool_name(tool) for tool in tools]
    lm, tokenizer = load(
        model, device=pick_device("auto"), rope_scaling=parse_rope_scaling(rope_scaling)
    )
    if tokenizer is None:
        raise UserError(f"{model}: has no tokenizer, so it cannot chat")
    engine = CompletionEngine(lm.eval(), tokenizer, max_batch_size=1)
    terminal = TerminalChat(ChatSession(engine, system=system, tools=names), settings)
    interactive = sys.stdin.isatty()
    if interactive:
        print_line(f" {model}: type a message, or /help")
    interrupted = False
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if interrupted:
                return
            interrupted = True
            print_line("\n Ctrl-C again quits")
            continue
        interrupted = False
        if line in ("/quit", "/exit"):
            return
        if line:
            terminal.handle(line)


def _tool_name(name: str) -> ToolName:
    for tool in TOOLS:
        if tool == name:
            return tool
    raise UserError(f"--tool {name}: unknown tool; use {', '.join(TOOLS)}")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
