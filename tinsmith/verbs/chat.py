"""`tinsmith chat`: a conversation in the terminal."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from tinsmith.core.errors import UserError
from tinsmith.core.log import print_line
from tinsmith.core.parse import Config, did_you_mean, parse
from tinsmith.hub.load import load
from tinsmith.infer.generate import stream
from tinsmith.infer.sample import SamplingParams
from tinsmith.nn.model import LM
from tinsmith.text.chat import encode_prompt
from tinsmith.text.records import parse_conversation
from tinsmith.text.tokenizer import Tokenizer
from tinsmith.train.parallel import pick_device
from tinsmith.verbs.export_import import parse_rope_scaling
from tinsmith.verbs.generate import sampling

HELP = """ /reset              forget the conversation
 /undo               take back the last question and its answer
 /retry              answer the last question again
 /save FILE          write the conversation as one line of a .jsonl of chats
 /set KEY=VALUE      temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens, seed,
                     thinking
 /system TEXT        set the system message (nothing: remove it)
 /quit               end; so does Ctrl-D, or Ctrl-C twice"""


@dataclass(frozen=True, kw_only=True)
class Settings(Config):
    """What `/set` changes."""

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
        self.sampling()

    def sampling(self) -> SamplingParams:
        """What the sampler takes."""
        names = [field.name for field in fields(SamplingParams)]
        return sampling(**{name: getattr(self, name) for name in names})


class Session:
    """Messages so far, and the model that answers them."""

    def __init__(self, lm: LM, tokenizer: Tokenizer, system: str | None, settings: Settings):
        self.lm, self.tokenizer, self.system, self.settings = lm, tokenizer, system, settings
        self.messages: list[dict[str, str]] = []

    def record(self) -> dict[str, Any]:
        """The conversation as a chat record."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return {"messages": first + self.messages}

    def ask(self, text: str, write: Callable[[str], object]) -> None:
        """Answer `text` through `write`, bit by bit; Ctrl-C ends the answer and keeps what was
        said.
        """
        self.messages.append({"role": "user", "content": text})
        thinking = True if self.settings.thinking else None
        ids = encode_prompt(
            self.tokenizer, parse_conversation(self.record(), answered=False), thinking=thinking
        )
        room = self.lm.config.max_seq_len - len(ids)
        if room < 1:
            self.messages.pop()
            raise UserError(f"the conversation is full ({len(ids)} tokens): /reset or /undo")
        chosen = self.settings
        output: list[str] = []
        pieces = stream(
            self.lm,
            self.tokenizer,
            ids,
            sampling_params=chosen.sampling(),
            max_new_tokens=min(chosen.max_new_tokens, room),
        )
        try:
            for piece in pieces:
                output.append(piece)
                write(piece)
        except KeyboardInterrupt:
            write(" ...")
        finally:
            pieces.close()
        answer = "".join(output).strip()
        self.messages.append({"role": "assistant", "content": answer or "..."})

    def undo(self) -> str | None:
        """Take back the last question and its answer; the question."""
        if len(self.messages) < 2:
            return None
        question = self.messages[-2]["content"]
        del self.messages[-2:]
        return question


def chat(model: str, system: str | None, settings: Settings, rope_scaling: str | None) -> None:
    """Read, answer, repeat."""
    lm, tokenizer = load(
        model, device=pick_device("auto"), rope_scaling=parse_rope_scaling(rope_scaling)
    )
    if tokenizer is None:
        raise UserError(f"{model}: has no tokenizer, so it cannot talk")
    session = Session(lm, tokenizer, system, settings)
    interactive = sys.stdin.isatty()
    if interactive:
        print_line(f" {model}: say something, or /help")
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
            _answer(session, line)


def _answer(session: Session, line: str) -> None:
    try:
        if line.startswith("/"):
            _command(session, line)
        else:
            _say_answer(session, line)
    except UserError as error:
        print_line(f" {error}")


def _say_answer(session: Session, text: str) -> None:
    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    session.ask(text, write)
    write("\n")


def _command(session: Session, line: str) -> None:
    name, _, rest = line[1:].partition(" ")
    commands: dict[str, Callable[[Session, str], None]] = {
        "help": lambda s, text: print_line(HELP),
        "reset": _reset,
        "undo": _undo,
        "retry": _retry,
        "save": _save,
        "set": _set,
        "system": _system,
    }
    if name not in commands:
        raise UserError(
            f"/{name} is unknown{did_you_mean(name, list(commands)) or '; /help lists all'}"
        )
    commands[name](session, rest.strip())


def _reset(session: Session, rest: str) -> None:
    session.messages.clear()
    print_line(" forgotten")


def _undo(session: Session, rest: str) -> None:
    print_line(" taken back" if session.undo() is not None else " nothing to take back")


def _retry(session: Session, rest: str) -> None:
    question = session.undo()
    if question is None:
        raise UserError("nothing to answer again")
    _say_answer(session, question)


def _save(session: Session, rest: str) -> None:
    if not rest:
        raise UserError("/save FILE")
    try:
        with Path(rest).expanduser().open("a", encoding="utf-8") as file:
            file.write(json.dumps(session.record(), ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{rest}: {error.strerror}") from None
    print_line(f" added to {rest}")


def _set(session: Session, rest: str) -> None:
    key, equals, text = rest.partition("=")
    names = [field.name for field in fields(Settings)]
    if not equals or key not in names:
        raise UserError(f"/set KEY=VALUE, with KEY one of {', '.join(names)}")
    current = {name: getattr(session.settings, name) for name in names}
    session.settings = parse(Settings, current | {key: yaml.safe_load(text)}, "/set")
    print_line(f" {key} is {getattr(session.settings, key)}")


def _system(session: Session, rest: str) -> None:
    session.system = rest or None
    print_line(" the system message is set" if rest else " no system message")
