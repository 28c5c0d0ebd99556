"""Documents: the unit that sources yield, that the split assigns and that is encoded."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol, cast

from tinsmith.data.files import Reject
from tinsmith.text.chat import Conversation, Message, template_texts


class StructuredContent(Protocol):
    """Content that is neither a text nor a conversation: a pair, a prompt, a puzzle."""

    def texts(self) -> list[str]:
        """Return all texts in it, none of them empty."""
        ...

    def tokenizer_texts(self) -> list[str]:
        """Return the texts that a tokenizer is trained on."""
        ...


Content = str | Conversation | StructuredContent


class Document(NamedTuple):
    """A text (or a piece of a long one), a conversation, a pair, a prompt or a puzzle, with the
    file and line it came from.
    """

    content: Content
    split_key: bytes
    """Key hashed to assign train or validation; by default the content."""
    file: str
    line: int
    first: bool = True
    last: bool = True
    unread: tuple[str, ...] = ()
    """Names of the fields of its record that were not used."""

    @property
    def is_text(self) -> bool:
        """True if the content is a text."""
        return isinstance(self.content, str)

    @property
    def text(self) -> str:
        """The content of a text document."""
        return cast(str, self.content)

    @property
    def bytes(self) -> int:
        """Number of bytes of its texts."""
        return sum(len(text.encode()) for text in self.texts())

    def texts(self) -> list[str]:
        """Return all texts in the document, none of them empty."""
        if isinstance(self.content, str):
            return [self.content]
        if isinstance(self.content, Conversation):
            return message_texts(self.content.messages)
        return self.content.texts()

    def tokenizer_texts(self) -> list[str]:
        """Return the texts that a tokenizer is trained on. With tools, that is the conversation in
        the chat template, which then has many words of its own.
        """
        if isinstance(self.content, str):
            return [self.content]
        if isinstance(self.content, Conversation):
            return template_texts(self.content) if self.content.tools else self.texts()
        return self.content.tokenizer_texts()


DocumentStream = Callable[[], Iterator[Document | Reject]]
"""Reads a source from its beginning."""


def limit_documents(stream: DocumentStream, limit: int | None) -> DocumentStream:
    """Cut a stream after its `limit`-th document."""
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


def message_texts(messages: Iterable[Message]) -> list[str]:
    """Return the reasoning and content of messages, without empty texts."""
    return [text for message in messages for text in (message.reasoning, message.content) if text]
