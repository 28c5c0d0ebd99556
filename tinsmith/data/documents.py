"""A document, whatever it holds, and a source of them that can be read again and again."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from tinsmith.data.arc.encoding import ArcExample
from tinsmith.data.config import ArcData, ChatsData, DataConfig, DataFormat, HubData, TextData
from tinsmith.data.files import Reject
from tinsmith.data.pairs import PreferencePair, read_pair
from tinsmith.data.prompts import PromptExample, read_prompt
from tinsmith.text.chat import Conversation, Message, parse_conversation, template_texts

Content = str | Conversation | PreferencePair | PromptExample | ArcExample
READERS: dict[DataFormat, Callable[[Any], Content]] = {
    "documents": parse_conversation,
    "chats": parse_conversation,
    "answers": parse_conversation,
    "pairs": read_pair,
    "prompts": read_prompt,
}
"""What makes of a row what an objective reads."""


class Document(NamedTuple):
    """A text (or a piece of a long one), a conversation, a pair or a prompt, and where it came
    from."""

    content: Content
    split_key: bytes
    """What the split goes by; normally the content itself."""
    file: str
    line: int
    first: bool = True
    last: bool = True

    @property
    def text(self) -> str:
        """The content of a text document."""
        return cast(str, self.content)

    @property
    def bytes(self) -> int:
        """Bytes of its text."""
        return sum(len(text.encode()) for text in self.texts())

    def texts(self) -> list[str]:
        """All that is said in it, none of it empty."""
        content = self.content
        if isinstance(content, str):
            return [content]
        if isinstance(content, ArcExample):
            return [content.text()]
        if isinstance(content, PromptExample):
            return [
                *_output(content.prompt.messages),
                *([content.answer] if content.answer else []),
            ]
        if isinstance(content, PreferencePair):
            return _output([*content.chosen.messages, content.rejected.messages[-1]])
        return _output(content.messages)

    def tokenizer_texts(self) -> list[str]:
        """What a tokenizer learns from. Where there are tools, what a template says of them and of
        calls is longer than what is said beside, and is learned too.
        """
        content = self.content.prompt if isinstance(self.content, PromptExample) else self.content
        if isinstance(content, Conversation) and content.tools:
            return template_texts(content)
        return self.texts()


DocumentStream = Callable[[], Iterator[Document | Reject]]
HubFetcher = Callable[[HubData], Path]
"""Gives the file with the rows of a Hub data set, which it fetches at the first call."""


class DataSource(NamedTuple):
    """One source of a recipe, ready to be read."""

    name: str
    config: DataConfig
    fingerprint: Any
    """Plain data that changes when the content does."""
    train: DocumentStream
    """All documents, or those to train on where `validation` is given."""
    validation: DocumentStream | None = None

    @property
    def display_name(self) -> str:
        """What the recipe names: the path, or else the name."""
        config = self.config
        path = config.path if isinstance(config, TextData | ChatsData | ArcData) else None
        return path or self.name

    @property
    def fails_on_bad_line(self) -> bool:
        """Whether a bad line ends everything instead of being left out."""
        config = self.config
        return (
            isinstance(config, TextData | ChatsData | HubData | ArcData)
            and config.on_bad_line == "fail"
        )


def limit_documents(stream: DocumentStream, limit: int | None) -> DocumentStream:
    """The stream up to the end of its `limit`-th document."""
    if limit is None:
        return stream

    def read() -> Iterator[Document | Reject]:
        left = limit
        for item in stream():
            yield item
            left -= isinstance(item, Document) and item.last
            if not left:
                return

    return read


def _output(messages: Iterable[Message]) -> list[str]:
    return [text for message in messages for text in (message.reasoning, message.content) if text]


def default_split_key(content: Content) -> bytes:
    """Pairs and prompts are split by what they ask, so that no prompt is on both sides."""
    return repr(
        content.prompt if isinstance(content, PreferencePair | PromptExample) else content
    ).encode()
