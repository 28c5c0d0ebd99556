"""Sources and formats are variants: a new one is one class and one name."""

from dataclasses import dataclass
from typing import Literal, get_args

import pytest

from tinsmith.core.errors import UserError
from tinsmith.core.parse import to_plain
from tinsmith.data.documents import Document, limit_documents
from tinsmith.data.formats import FORMATS, FormatName
from tinsmith.data.formats.answers import Answers
from tinsmith.data.formats.base import EncodedSequence
from tinsmith.data.loader.loader import open_dataset
from tinsmith.data.sources import AnySource, ChatsData, SourceContext, open_source
from tinsmith.data.sources.base import DataSource, SourceConfig

REQUIRED = {"text": {"path": "x"}, "chats": {"path": "x"}, "hub": {"name": "x"}}


@pytest.mark.parametrize("name", get_args(FormatName))
def test_every_format_is_registered_under_its_name(name):
    assert FORMATS[name].name == name
    assert len(FORMATS) == len(get_args(FormatName))


@pytest.mark.parametrize("data_format", get_args(FormatName))
def test_every_format_has_at_least_two_sources(data_format):
    assert sum(source_type.supports(data_format) for source_type in get_args(AnySource)) >= 2


@pytest.mark.parametrize("source", get_args(AnySource), ids=lambda source: source.kind)
def test_an_unsupported_format_is_an_error_that_names_the_sources_which_support_it(source):
    config = source(**REQUIRED.get(source.kind, {}))
    for data_format in FORMATS:
        if source.supports(data_format):
            continue
        with pytest.raises(UserError) as error:
            open_source(config, data_format, SourceContext("data.2"))
        line = str(error.value)
        assert line.startswith(f"data.2.kind: '{source.kind}' has no {data_format}; use "), line
        names = line.partition("; use ")[2].replace(" or ", ", ").split(", ")
        assert names == [
            source_type.kind
            for source_type in get_args(AnySource)
            if source_type.supports(data_format)
        ]


@dataclass(frozen=True, kw_only=True)
class CountingData(SourceConfig):
    """A source of numbers as text."""

    kind: Literal["counting"] = "counting"
    count: int = 20

    formats = ("documents",)

    def open(self, data_format, context):
        def read():
            for number in range(self.count):
                text = f"number {number}"
                yield Document(text, text.encode(), "counting", number)

        return DataSource("counting", self, to_plain(self), limit_documents(read, self.limit))


def test_a_new_source_is_one_class(prepared):
    prepared_data = prepared(CountingData(limit=12), "documents")
    (source,) = prepared_data.report["sources"]
    assert (source["name"], source["kind"]) == ("counting", "counting")
    assert source["train"]["documents"] + source["validation"]["documents"] == 12


class UserTurns(Answers):
    """A format in which the user's tokens are trained, not the assistant's."""

    name = "user_turns"

    def encode(self, content, tokenizer, seq_len):
        (sequence,) = super().encode(content, tokenizer, seq_len)
        return [EncodedSequence(sequence.ids, [not learned for learned in sequence.mask])]


def test_a_new_format_is_one_class_and_one_name(prepared, monkeypatch, write_lines):
    records = [{"question": f"Hi {index}", "answer": "!"} for index in range(20)]
    source = ChatsData(path=str(write_lines("c.jsonl", records)))
    monkeypatch.setitem(FORMATS, "user_turns", UserTurns())
    batches = {}
    for name in ("answers", "user_turns"):
        folder = prepared(source, name, seq_len=64).folder
        dataset = open_dataset(folder, name, "train", 64, 0)
        batches[name] = dataset.get_batch(0, dataset.size)
    answers_batch, user_batch = batches["answers"], batches["user_turns"]
    assert (answers_batch.ids == user_batch.ids).all()
    next_exists = (answers_batch.segments[:, 1:] >= 0).int()
    assert ((answers_batch.mask[:, :-1].int() + user_batch.mask[:, :-1].int()) == next_exists).all()
