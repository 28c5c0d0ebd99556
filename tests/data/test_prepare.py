import errno
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

from tinsmith.core.errors import Stopped, UserError
from tinsmith.data import stdlib
from tinsmith.data.config import Chats, Stdlib, Tasks, Text
from tinsmith.data.prepare import prepare
from tinsmith.data.prepared import open_prepared
from tinsmith.data.sources import open_source
from tinsmith.text.chat import BadRecord, encode_chat
from tinsmith.text.config import TokenizerConfig, TrainTokenizerConfig
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


def spaced_tokenizer():
    """One that writes a space as `▁`, and puts one before every text, as Llama's does."""
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
    ]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    model = tokenizers.models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    spaces = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    made.normalizer = tokenizers.normalizers.Sequence(spaces)
    return Tokenizer(made.to_str())


@pytest.fixture
def story_file(write_lines, stories):
    return write_lines("stories.jsonl", objects(stories))


def test_every_document_is_in_exactly_one_part_and_comes_back_exactly(
    prepared, texts_of, story_file, stories
):
    found = prepared(Text(path=str(story_file), validation=0.2))
    train, validation = texts_of(found, "train"), texts_of(found, "validation")
    assert sorted(train + validation) == sorted(stories)
    assert train == [text for text in stories if text in train]
    assert not set(train) & set(validation)
    assert 5 <= len(validation) <= 25


def test_equal_documents_never_straddle_the_split(prepared, texts_of, write_lines, stories):
    found = prepared(Text(path=str(write_lines("s.jsonl", objects(stories * 3))), validation=0.3))
    train, validation = texts_of(found, "train"), texts_of(found, "validation")
    assert len(train) + len(validation) == 3 * len(stories)
    assert not set(train) & set(validation)


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_neither_part_is_empty_where_there_are_two_documents(
    prepared, texts_of, write_lines, stories, fraction, count
):
    path = write_lines("s.jsonl", objects(stories[:count]))
    found = prepared(Text(path=str(path), validation=fraction))
    assert texts_of(found, "train")
    assert texts_of(found, "validation")


def test_a_lone_text_file_is_cut_in_two_at_the_end_of_a_line(prepared, texts_of, tmp_path, stories):
    text = "".join(stories)
    (tmp_path / "input.txt").write_text(text)
    found = prepared(Text(path=str(tmp_path / "input.txt"), validation=0.1))
    (train,), (validation,) = texts_of(found, "train"), texts_of(found, "validation")
    assert train + validation == text
    assert train.endswith("\n")
    assert 0.05 < len(validation) / len(text) < 0.15


def test_a_long_text_in_pieces_is_still_one_document(
    prepared, texts_of, tmp_path, stories, monkeypatch
):
    monkeypatch.setattr("tinsmith.data.files.PIECE", 300)
    text = "".join(stories)
    (tmp_path / "input.txt").write_text(text)
    (tmp_path / "more.txt").write_text("<|endoftext|>\n".join(stories[:4]))
    found = prepared(Text(path=str(tmp_path / "input.txt"), validation=0.1))
    (train,), (validation,) = texts_of(found, "train"), texts_of(found, "validation")
    assert train + validation == text
    assert 0.05 < len(validation) / len(text) < 0.15
    found = prepared(Text(path=str(tmp_path), validation=0.2))
    both = texts_of(found, "train") + texts_of(found, "validation")
    assert sorted(both) == sorted([text, *stories[:4]])


def test_no_space_comes_between_the_pieces_of_a_long_text(
    prepared, texts_of, tmp_path, stories, monkeypatch
):
    monkeypatch.setattr("tinsmith.data.files.PIECE", 300)
    text = "".join(stories)
    (tmp_path / "input.txt").write_text(text)
    found = prepared(
        Text(path=str(tmp_path / "input.txt"), validation=0), tokenizer=spaced_tokenizer()
    )
    assert texts_of(found, "train") == [text]


def test_without_a_fraction_nothing_is_held_back(prepared, story_file, texts_of, stories):
    found = prepared(Text(path=str(story_file), validation=0))
    assert texts_of(found, "train") == stories
    with pytest.raises(UserError, match="validation"):
        open_source(found.folder, "documents", "validation", 8, 0)


def test_validation_may_be_a_file_of_its_own(prepared, write_lines, texts_of, stories):
    held_back = write_lines("held.jsonl", objects(stories[:7]))
    path = write_lines("rest.jsonl", objects(stories[7:]))
    found = prepared(Text(path=str(path), validation=str(held_back)))
    assert texts_of(found, "train") == stories[7:]
    assert texts_of(found, "validation") == stories[:7]


def test_a_folder_with_train_and_valid_files_is_split_by_them(
    prepared, tmp_path, texts_of, stories
):
    folder = tmp_path / "own"
    folder.mkdir()
    for name, texts in (("train", stories[9:]), ("valid", stories[3:9]), ("test", stories[:3])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(o) + "\n" for o in objects(texts)))
    found = prepared(Text(path=str(folder)))
    assert texts_of(found, "train") == stories[9:]
    assert texts_of(found, "validation") == stories[3:9]
    assert found.report["sources"][0]["name"] == "own"


def test_every_kind_of_file_is_read_alike(prepared, texts_of, tmp_path, stories):
    import gzip

    lines = "".join(json.dumps(o) + "\n" for o in objects(stories[:10]))
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table = pyarrow.Table.from_pylist(objects(stories[:10]))
    pyarrow.parquet.write_table(table, folder / "c.parquet")
    (folder / "d.txt").write_text("<|endoftext|>\n".join(stories[:10]))
    found = prepared(Text(path=str(folder), validation=0))
    assert texts_of(found, "train") == stories[:10] * 4


def test_the_limit_takes_the_first_documents(prepared, texts_of, story_file, stories):
    found = prepared(Text(path=str(story_file), validation=0, limit=5))
    assert texts_of(found, "train") == stories[:5]
    assert len(texts_of(prepared(Stdlib(validation=0, limit=7), "chats"), "train")) == 7


def test_T9_bad_lines_are_rejected_counted_and_named(
    prepared, write_lines, rejects_of, texts_of, stories
):
    lines = [
        *objects(stories[:3]),
        *(b'{"text": "\xff"}', b"{broken", b"[1]", {"body": "x"}, {"text": 3}, {"text": " "}),
        *({"text": "a\0b"}, {"text": "x" * 10_000_001}, {"text": stories[3]}),
    ]
    found = prepared(Text(path=str(write_lines("s.jsonl", lines)), validation=0))
    assert texts_of(found, "train") == stories[:4]
    assert found.report["sources"][0]["rejected"] == 8
    assert [(name, line) for name, line, _ in rejects_of(found)] == [
        ("s.jsonl", line) for line in range(4, 12)
    ]
    assert [reason.split(" (")[0].split(":")[0] for _, _, reason in rejects_of(found)] == [
        *("not UTF-8", "not JSON", "not an object but a list", "no field 'text'"),
        *("field 'text' is a number, not text", "field 'text' is empty", "holds a NUL character"),
        "longer than 10 MB",
    ]


@pytest.mark.parametrize(
    "bad", [b'{"text": "\xff"}', b"{broken", b"[1]", {"body": "x"}, {"text": 3}, {"text": ""}]
)
def test_T9_with_on_bad_line_fail_the_first_bad_line_ends_everything(
    prepared, write_lines, stories, bad, tmp_path
):
    path = write_lines("s.jsonl", [*objects(stories[:3]), bad])
    with pytest.raises(UserError, match=r"s\.jsonl:4: ") as caught:
        prepared(Text(path=str(path), on_bad_line="fail"))
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
    found = prepared(Chats(path=str(path), validation=0), "chats")
    assert [(name, line) for name, line, _ in rejects_of(found)] == [("c.jsonl", 2)]
    assert found.report["sources"][0]["train"]["documents"] == 2
    with pytest.raises(UserError, match=r"c\.jsonl:2: "):
        prepared(Chats(path=str(path), on_bad_line="fail"), "chats")


@pytest.mark.parametrize("on_bad_line", ["reject", "fail"])
def test_T9_a_chat_that_the_template_refuses_is_a_bad_line(
    prepared, write_lines, rejects_of, on_bad_line, monkeypatch
):
    from tinsmith.data import encode

    def refuse(tokenizer, conversation):
        if conversation.messages[0].content == "bad":
            raise BadRecord("no such thing")
        return encode_chat(tokenizer, conversation)

    monkeypatch.setattr(encode, "encode_chat", refuse)
    path = write_lines("c.jsonl", [chat("x", "y"), chat("bad", "z")])
    config = Chats(path=str(path), validation=0, on_bad_line=on_bad_line)
    if on_bad_line == "fail":
        with pytest.raises(UserError, match=r"c\.jsonl:2: no such thing"):
            prepared(config, "chats")
    else:
        found = prepared(config, "chats")
        assert rejects_of(found) == [("c.jsonl", 2, "no such thing")]
        assert found.report["sources"][0]["rejected"] == 1


@pytest.mark.parametrize("lines", [[], [b""], [b"{broken"], [{"text": ""}]])
def test_T9_data_without_one_usable_document_is_one_line(prepared, write_lines, lines, tmp_path):
    path = write_lines("s.jsonl", lines)
    with pytest.raises(UserError, match=r"nothing in '.*s\.jsonl' can be used") as caught:
        prepared(Text(path=str(path)))
    assert "\n" not in str(caught.value)
    if lines not in ([], [b""]):
        assert "s.jsonl:1: " in str(caught.value)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_missing_file_and_the_wrong_kind_of_file_are_one_line(prepared, tmp_path, write_lines):
    with pytest.raises(UserError, match=r"data\.path: .*nothing\.jsonl does not exist"):
        prepared(Text(path=str(tmp_path / "nothing.jsonl")))
    there = str(write_lines("s.jsonl", []))
    with pytest.raises(UserError, match=r"data\.1\.validation: .* does not exist"):
        prepared((Stdlib(), Text(path=there, validation="nothing.jsonl")))
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(UserError, match=r"x\.txt: chats are read from \.jsonl"):
        prepared(Chats(path=str(tmp_path / "x.txt")), "chats")
    with pytest.raises(UserError, match=r"data\.kind: 'text' has no chats"):
        prepared(Text(path=str(tmp_path / "x.txt")), "chats")
    with pytest.raises(UserError, match="data: the list is empty"):
        prepared(())


def test_data_is_found_again_and_made_anew_when_anything_changes(
    prepared, story_file, write_lines, stories, tokenizer
):
    config = Text(path=str(story_file))
    first = prepared(config)
    written = (first.folder / "report.json").stat().st_mtime_ns
    again = prepared(config)
    assert again.folder == first.folder
    assert (again.folder / "report.json").stat().st_mtime_ns == written
    assert again.tokenizer.fingerprint() == tokenizer.fingerprint()
    train = TokenizerConfig(train=TrainTokenizerConfig(vocab_size=300))
    others = [
        prepared(Text(path=str(story_file), validation=0.3)).folder,
        prepared(config, tokenizer=train).folder,
        prepared((config, config)).folder,
    ]
    write_lines("stories.jsonl", objects([*stories, "One more."]))
    others.append(prepared(config).folder)
    assert len({first.folder, *others}) == 5


def test_found_data_is_announced_and_damaged_data_is_made_again(
    tmp_path, story_file, tokenizer, texts_of, stories
):
    said = []
    config = Text(path=str(story_file), validation=0)

    def run():
        return prepare(config, tokenizer, "documents", tmp_path / "data", said.append)

    first = run()
    said.clear()
    run()
    assert said == [f" prepare   found {first.folder}"]
    (first.folder / "0" / "train" / "00000.tokens").write_bytes(b"short")
    assert texts_of(run(), "train") == stories
    assert "damaged" in said[1]


def test_two_preparations_of_the_same_data_give_equal_files(tmp_path, story_file):
    train = TokenizerConfig(train=TrainTokenizerConfig(vocab_size=400))
    data = (Text(path=str(story_file)), Tasks(count=300))
    folders = [
        prepare(data, train, "documents", tmp_path / name, lambda line: None).folder
        for name in ("one", "two")
    ]
    names = [sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in folders]
    assert names[0] == names[1]
    for name in names[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_a_tokenizer_is_trained_on_the_train_part_only(prepared, write_lines, stories):
    held_back = write_lines("held.jsonl", objects(["zqxzqxzqx " * 500]))
    path = write_lines("rest.jsonl", objects(stories))
    train = TokenizerConfig(train=TrainTokenizerConfig(vocab_size=500))
    found = prepared(Text(path=str(path), validation=str(held_back)), tokenizer=train)
    assert len(found.tokenizer.encode("zqxzqxzqx")) == 9
    assert len(found.tokenizer.encode("Once there was a")) <= 5


def test_a_tokenizer_sees_at_most_max_bytes_spread_over_everything(
    prepared, write_lines, stories, monkeypatch
):
    seen = []

    def watch(texts, vocab_size):
        seen.extend(texts)
        return tokenizer_of(seen)

    from tinsmith.text.bpe import train_bpe as tokenizer_factory

    def tokenizer_of(texts):
        return tokenizer_factory(texts, 300)

    monkeypatch.setattr("tinsmith.data.vocabulary.train_bpe", watch)
    texts = [f"{number} {story}" for number in range(30) for story in stories]
    path = write_lines("s.jsonl", objects(texts))
    settings = TrainTokenizerConfig(vocab_size=300, max_bytes=20_000)
    prepared(Text(path=str(path), validation=0), tokenizer=TokenizerConfig(train=settings))
    assert 12_000 < sum(len(text.encode()) for text in seen) <= 20_000
    quarters = Counter(int(text.split()[0]) * 4 // 30 for text in seen)
    assert min(quarters[q] for q in range(4)) > 0.5 * len(seen) / 4


def test_chats_given_to_pretraining_become_documents(prepared, texts_of, write_lines):
    path = write_lines("c.jsonl", [chat("why", "because"), chat("who", "me")])
    found = prepared(Chats(path=str(path), validation=0), "documents")
    (first, _) = texts_of(found, "train")
    assert first.startswith("<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n")
    assert "because<|im_end|>" in first
    (source,) = found.report["sources"]
    names = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    text = "".join(texts_of(found, "train"))
    for name in names:
        text = text.replace(name, "")
    assert source["train"]["bytes"] == len(text)


@pytest.mark.parametrize("data", [Tasks(count=200), Stdlib(limit=100)])
def test_generated_data_serves_both_shapes_with_parts_that_share_nothing(prepared, texts_of, data):
    for shape in ("documents", "chats"):
        found = prepared(data, shape)
        train, validation = set(texts_of(found, "train")), set(texts_of(found, "validation"))
        assert train
        assert validation
        assert not train & validation


def test_the_same_sum_in_other_words_stays_on_one_side(prepared, texts_of):
    found = prepared(Tasks(tasks=("arithmetic",), count=3000, digits=1, validation=0.3))
    sides = [
        {text.split("\n", 1)[1] for text in texts_of(found, part)}
        for part in ("train", "validation")
    ]
    assert len(sides[1]) > 20
    assert not sides[0] & sides[1]


def test_a_function_that_two_modules_share_is_taken_once(prepared, texts_of, monkeypatch):
    source = "".join(
        f'def f{n}(x):\n    """Return {n}, a number."""\n    return {n}\n' for n in range(5)
    )
    modules = [stdlib.Module(f"{name}.py", source) for name in "abcdef"]
    monkeypatch.setattr(stdlib, "read", lambda paths: iter(modules))
    found = prepared(Stdlib(validation=0.5), "chats")
    assert found.report["sources"][0]["train"]["documents"] == 5


def test_several_sources_keep_their_own_shards_and_names(prepared, story_file):
    found = prepared(
        (Text(path=str(story_file), weight=3), Text(path=str(story_file)), Tasks(count=50))
    )
    names = ["stories", "stories-2", "tasks"]
    assert [source["name"] for source in found.report["sources"]] == names
    source = open_source(found.folder, "documents", "train", 32, 0)
    assert source.names == names
    counts = np.bincount(source.rows(0, 1000).source.numpy(), minlength=3)
    assert counts.tolist() == [600, 200, 200]


def test_real_chats_use_99_percent_of_positions(real_data, prepared):
    folder = real_data / "llamafactory_sft"
    for config in (Chats(path=str(folder)), Stdlib(limit=600), Tasks(count=1000)):
        found = prepared(config, "chats")
        for context in (256, 512, 2048):
            source = open_source(found.folder, "chats", "train", context, 0)
            assert source.used >= 0.99 - 0.5 / source.size, (config.kind, context)


def test_real_stories_come_back_exactly(real_data, prepared, texts_of):
    path = real_data / "tinystories_sample" / "train.txt"
    found = prepared(Text(path=str(path)))
    stories = [text for text in path.read_text().split("<|endoftext|>\n") if text.strip()]
    both = texts_of(found, "train") + texts_of(found, "validation")
    assert Counter(both) == Counter(stories)


def test_a_full_disk_is_noticed_before_anything_is_written(
    prepared, story_file, monkeypatch, tmp_path
):
    monkeypatch.setattr("tinsmith.data.prepare.free_space", lambda path: 1000)
    with pytest.raises(UserError, match=r"no space: shards need about .* 1 kB are free"):
        prepared(Text(path=str(story_file)))
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("call", [0, 1, 2, 5])
def test_a_disk_that_fills_up_leaves_nothing_half_written(
    prepared, story_file, monkeypatch, tmp_path, call
):
    from tinsmith.data import shards

    earlier = prepared(Tasks(count=20)).folder
    calls = iter(range(10**9))
    write = shards._HashedFile.write

    def full(self, data):
        if next(calls) >= call:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(shards._HashedFile, "write", full)
    with pytest.raises(UserError, match="the disk is full"):
        prepared(Text(path=str(story_file)))
    assert list((tmp_path / "data").iterdir()) == [earlier]
    monkeypatch.undo()
    open_prepared(earlier, verify=True)
    prepared(Text(path=str(story_file)))


def test_a_folder_that_cannot_be_written_is_one_line(story_file, tokenizer, tmp_path, monkeypatch):
    def refuse(self, *arguments, **more):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(UserError, match=r"Permission denied") as caught:
        prepare(Text(path=str(story_file)), tokenizer, "documents", tmp_path / "data", print)
    assert "\n" not in str(caught.value)


def test_a_stop_request_ends_it_soon_and_leaves_nothing(prepared, story_file, tmp_path):
    polls = iter([False] * 20 + [True] * 100)
    with pytest.raises(Stopped) as caught:
        prepared(Text(path=str(story_file)), stop=lambda: next(polls))
    assert caught.value.code == 75
    assert list((tmp_path / "data").iterdir()) == []


SCRIPT = """
import sys
from pathlib import Path
from tinsmith.data.config import Text
from tinsmith.data.prepare import prepare
from tinsmith.text.chat import BadRecord, encode_chat
from tinsmith.text.config import TokenizerConfig, TrainTokenizerConfig
tokenizer = TokenizerConfig(train=TrainTokenizerConfig(vocab_size=300))
prepare(Text(path=sys.argv[1]), tokenizer, "documents", Path(sys.argv[2]))
"""


def test_a_preparation_killed_at_any_moment_leaves_nothing_behind_after_the_next(
    story_file, tmp_path
):
    def run(root, **environment):
        command = [sys.executable, "-c", SCRIPT, str(story_file), str(root)]
        return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)

    events = tmp_path / "events"
    whole = run(tmp_path / "whole", TINSMITH_COUNT_EVENTS=str(events))
    assert whole.returncode == 0, whole.stderr
    (expected,) = (tmp_path / "whole").iterdir()
    count = len(events.read_text().splitlines())
    assert count >= 10
    for kill_at in (1, count // 2, count - 1, count):
        root = tmp_path / f"killed-{kill_at}"
        assert run(root, TINSMITH_KILL_AT=str(kill_at)).returncode == -9
        visible = [path for path in root.iterdir() if not path.name.startswith(".")]
        assert len(visible) == (kill_at == count)
        assert run(root).returncode == 0
        assert [path.name for path in root.iterdir()] == [expected.name]
        for path in expected.rglob("*.*"):
            if path.is_file():
                assert (
                    root / expected.name / path.relative_to(expected)
                ).read_bytes() == path.read_bytes()


def test_preparing_does_not_import_torch():
    code = "import sys; import tinsmith.data.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
