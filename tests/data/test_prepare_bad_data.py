import pytest
import tokenizers

from tinsmith.core.errors import UserError
from tinsmith.data.sources import ChatsData, StdlibData, TextData
from tinsmith.text.chat import BadRecord, encode_chat
from tinsmith.text.tokenizer import Tokenizer


def objects(texts):
    return [{"text": text} for text in texts]


def chat(question, answer):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def test_T9_bad_lines_are_rejected_and_counted(
    prepared, write_lines, rejects_of, texts_of, stories
):
    lines = [
        *objects(stories[:3]),
        *(b'{"text": "\xff"}', b"{broken", b"[1]", {"body": "x"}, {"text": 3}, {"text": " "}),
        *({"text": "a\0b"}, {"text": "x" * 10_000_001}, {"text": stories[3]}),
    ]
    prepared_data = prepared(TextData(path=str(write_lines("s.jsonl", lines)), validation=0))
    assert texts_of(prepared_data, "train") == stories[:4]
    assert prepared_data.report["sources"][0]["rejected"] == 8
    assert [(name, line) for name, line, _ in rejects_of(prepared_data)] == [
        ("s.jsonl", line) for line in range(4, 12)
    ]
    assert [reason.split(" (")[0].split(":")[0] for _, _, reason in rejects_of(prepared_data)] == [
        *("not UTF-8", "not JSON", "not an object but a list", "no field 'text'"),
        *("field 'text' is a number, not text", "field 'text' is empty", "holds a NUL character"),
        "longer than 10 MB",
    ]


@pytest.mark.parametrize(
    "bad", [b'{"text": "\xff"}', b"{broken", b"[1]", {"body": "x"}, {"text": 3}, {"text": ""}]
)
def test_T9_with_on_bad_line_fail_the_first_bad_line_is_an_error(
    prepared, write_lines, stories, bad, tmp_path
):
    path = write_lines("s.jsonl", [*objects(stories[:3]), bad])
    with pytest.raises(UserError, match=r"s\.jsonl:4: ") as caught:
        prepared(TextData(path=str(path), on_bad_line="fail"))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "data").iterdir()) == []


CHAT_FAULTS = {
    "wrong role order": {"messages": [{"role": "assistant", "content": "a"}]},
    "two users": {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
    "unknown role": {"messages": [{"role": "cat", "content": "a"}]},
    "missing field": {"text": "x"},
    "wrong type": {"messages": "hello"},
    "empty answer": chat("a", ""),
    "NUL": chat("a", "b\0"),
    "nobody answers": {"messages": [{"role": "user", "content": "a"}]},
}


@pytest.mark.parametrize("fault", CHAT_FAULTS)
def test_T9_bad_chats_are_rejected_or_fail_by_setting(prepared, write_lines, rejects_of, fault):
    path = write_lines("c.jsonl", [chat("x", "y"), CHAT_FAULTS[fault], chat("u", "v")])
    prepared_data = prepared(ChatsData(path=str(path), validation=0), "chats")
    assert [(name, line) for name, line, _ in rejects_of(prepared_data)] == [("c.jsonl", 2)]
    assert prepared_data.report["sources"][0]["train"]["documents"] == 2
    with pytest.raises(UserError, match=r"c\.jsonl:2: "):
        prepared(ChatsData(path=str(path), on_bad_line="fail"), "chats")


@pytest.mark.parametrize("on_bad_line", ["reject", "fail"])
def test_T9_a_chat_that_the_template_rejects_is_a_bad_line(
    prepared, write_lines, rejects_of, on_bad_line, monkeypatch
):
    from tinsmith.data.formats import base

    def refuse(tokenizer, conversation):
        if conversation.messages[0].content == "bad":
            raise BadRecord("no such thing")
        return encode_chat(tokenizer, conversation)

    monkeypatch.setattr(base, "encode_chat", refuse)
    path = write_lines("c.jsonl", [chat("x", "y"), chat("bad", "z")])
    config = ChatsData(path=str(path), validation=0, on_bad_line=on_bad_line)
    if on_bad_line == "fail":
        with pytest.raises(UserError, match=r"c\.jsonl:2: no such thing"):
            prepared(config, "chats")
    else:
        prepared_data = prepared(config, "chats")
        assert rejects_of(prepared_data) == [("c.jsonl", 2, "no such thing")]
        assert prepared_data.report["sources"][0]["rejected"] == 1


@pytest.mark.parametrize("lines", [[], [b""], [b"{broken"], [{"text": ""}]])
def test_T9_data_without_a_usable_document_is_a_one_line_error(
    prepared, write_lines, lines, tmp_path
):
    path = write_lines("s.jsonl", lines)
    with pytest.raises(UserError, match=r"nothing in '.*s\.jsonl' can be used") as caught:
        prepared(TextData(path=str(path)))
    assert "\n" not in str(caught.value)
    if lines not in ([], [b""]):
        assert "s.jsonl:1: " in str(caught.value)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_missing_file_or_an_unsupported_file_is_a_one_line_error(prepared, tmp_path, write_lines):
    with pytest.raises(UserError, match=r"data\.path: .*nothing\.jsonl does not exist"):
        prepared(TextData(path=str(tmp_path / "nothing.jsonl")))
    existing = str(write_lines("s.jsonl", []))
    with pytest.raises(UserError, match=r"data\.1\.validation: .* does not exist"):
        prepared((StdlibData(), TextData(path=existing, validation="nothing.jsonl")))
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(UserError, match=r"x\.txt: chats are read from \.jsonl"):
        prepared(ChatsData(path=str(tmp_path / "x.txt")), "chats")
    with pytest.raises(UserError, match=r"data\.kind: 'text' has no chats"):
        prepared(TextData(path=str(tmp_path / "x.txt")), "chats")
    with pytest.raises(UserError, match="data: the list is empty"):
        prepared(())


def ascii_tokenizer():
    """A vocabulary of printable ASCII characters, without bytes."""
    pieces = [*map(chr, range(32, 127)), "\n", "<unk>"]
    model = tokenizers.models.WordLevel({c: i for i, c in enumerate(pieces)}, "<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(made.to_str())


@pytest.mark.parametrize("on_bad_line", ["reject", "fail"])
def test_D9_a_text_that_the_vocabulary_cannot_write_is_a_bad_line(
    prepared, write_lines, rejects_of, texts_of, on_bad_line
):
    texts = [f"line {number}" for number in range(60)]
    path = write_lines("s.jsonl", objects([*texts[:30], "caf\u00e9", *texts[30:]]))
    config = TextData(path=str(path), validation=0, on_bad_line=on_bad_line)
    if on_bad_line == "fail":
        with pytest.raises(UserError, match=r"s\.jsonl:31: .*cannot represent"):
            prepared(config, tokenizer=ascii_tokenizer())
        return
    found = prepared(config, tokenizer=ascii_tokenizer())
    assert texts_of(found, "train") == texts
    ((name, line, reason),) = rejects_of(found)
    assert (name, line) == ("s.jsonl", 31)
    assert "cannot represent" in reason
    assert found.report["sources"][0]["rejected"] == 1
    assert found.report["sources"][0]["train"]["bytes"] == sum(map(len, texts))


def test_D9_a_bad_piece_of_a_long_text_does_not_join_two_documents(
    prepared, texts_of, rejects_of, tmp_path, monkeypatch
):
    monkeypatch.setattr("tinsmith.data.files.CHUNK_CHARS", 16)
    lines = ["a" * 15, "b" * 15, "c" * 14 + "\u00e9", "<|endoftext|>", "second document"]
    (tmp_path / "x.txt").write_text("\n".join(lines), encoding="utf-8")
    config = TextData(path=str(tmp_path / "x.txt"), validation=0)
    found = prepared(config, tokenizer=ascii_tokenizer())
    assert texts_of(found, "train") == ["a" * 15 + "\n" + "b" * 15 + "\n", "second document"]
    assert len(rejects_of(found)) == 1


ANSWERED_OTHERWISE = (
    "{% for m in messages %}{% if m.role == 'user' and loop.last %}LAST {% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("on_bad_line", ["reject", "fail"])
def test_D9_a_chat_without_a_loss_mask_is_a_bad_line(
    prepared, write_lines, rejects_of, on_bad_line, tokenizer
):
    template = ANSWERED_OTHERWISE.replace("loop.last", "'LAST' in m.content and loop.last")
    own = Tokenizer(tokenizer.to_json(), chat_template=template)
    path = write_lines("c.jsonl", [chat("x", "y"), chat("LAST", "z"), chat("u", "v")])
    config = ChatsData(path=str(path), validation=0, on_bad_line=on_bad_line)
    if on_bad_line == "fail":
        with pytest.raises(UserError, match=r"c\.jsonl:2: the chat template"):
            prepared(config, "chats", tokenizer=own)
        return
    found = prepared(config, "chats", tokenizer=own)
    ((name, line, reason),) = rejects_of(found)
    assert (name, line) == ("c.jsonl", 2)
    assert "so there is no mask" in reason
    assert found.report["sources"][0]["train"]["documents"] == 2


def test_D9_a_source_without_one_encodable_record_names_the_first_reason(
    prepared, write_lines, tokenizer
):
    own = Tokenizer(tokenizer.to_json(), chat_template=ANSWERED_OTHERWISE)
    path = write_lines("c.jsonl", [chat("x", "y"), chat("u", "v")])
    with pytest.raises(UserError, match=r"left to train on; the first bad line is .*c\.jsonl:1: "):
        prepared(ChatsData(path=str(path), validation=0), "chats", tokenizer=own)
