import json
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

from tinsmith.core.errors import UserError
from tinsmith.data.loader.loader import open_dataset
from tinsmith.data.prepare.prepare import prepare
from tinsmith.data.sources import ChatsData, StdlibData, TasksData, TextData, stdlib
from tinsmith.text.bpe import train_bpe
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


def metaspace_tokenizer():
    """One that writes a space as `▁`, and puts one before every text, as Llama's does."""
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
    ]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    model = tokenizers.models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>")
    hf_tokenizer = tokenizers.Tokenizer(model)
    spaces = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    hf_tokenizer.normalizer = tokenizers.normalizers.Sequence(spaces)
    return Tokenizer(hf_tokenizer.to_str())


def test_every_document_is_in_exactly_one_split_unchanged(prepared, texts_of, story_file, stories):
    prepared_data = prepared(TextData(path=str(story_file), validation=0.2))
    train, validation = texts_of(prepared_data, "train"), texts_of(prepared_data, "validation")
    assert sorted(train + validation) == sorted(stories)
    assert train == [text for text in stories if text in train]
    assert not set(train) & set(validation)
    assert 5 <= len(validation) <= 25


def test_equal_documents_are_in_the_same_split(prepared, texts_of, write_lines, stories):
    prepared_data = prepared(
        TextData(path=str(write_lines("s.jsonl", objects(stories * 3))), validation=0.3)
    )
    train, validation = texts_of(prepared_data, "train"), texts_of(prepared_data, "validation")
    assert len(train) + len(validation) == 3 * len(stories)
    assert not set(train) & set(validation)


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_neither_split_is_empty_with_at_least_two_documents(
    prepared, texts_of, write_lines, stories, fraction, count
):
    path = write_lines("s.jsonl", objects(stories[:count]))
    prepared_data = prepared(TextData(path=str(path), validation=fraction))
    assert texts_of(prepared_data, "train")
    assert texts_of(prepared_data, "validation")


def test_a_single_text_file_is_split_at_the_end_of_a_line(prepared, texts_of, tmp_path, stories):
    text = "".join(stories)
    (tmp_path / "input.txt").write_text(text)
    prepared_data = prepared(TextData(path=str(tmp_path / "input.txt"), validation=0.1))
    (train,), (validation,) = (
        texts_of(prepared_data, "train"),
        texts_of(prepared_data, "validation"),
    )
    assert train + validation == text
    assert train.endswith("\n")
    assert 0.05 < len(validation) / len(text) < 0.15


def test_a_long_text_read_in_pieces_is_one_document(
    prepared, texts_of, tmp_path, stories, monkeypatch
):
    monkeypatch.setattr("tinsmith.data.files.CHUNK_CHARS", 300)
    text = "".join(stories)
    (tmp_path / "input.txt").write_text(text)
    (tmp_path / "more.txt").write_text("<|endoftext|>\n".join(stories[:4]))
    prepared_data = prepared(TextData(path=str(tmp_path / "input.txt"), validation=0.1))
    (train,), (validation,) = (
        texts_of(prepared_data, "train"),
        texts_of(prepared_data, "validation"),
    )
    assert train + validation == text
    assert 0.05 < len(validation) / len(text) < 0.15
    prepared_data = prepared(TextData(path=str(tmp_path), validation=0.2))
    all_texts = texts_of(prepared_data, "train") + texts_of(prepared_data, "validation")
    assert sorted(all_texts) == sorted([text, *stories[:4]])


def test_no_space_is_inserted_between_the_pieces_of_a_long_text(
    prepared, texts_of, tmp_path, stories, monkeypatch
):
    monkeypatch.setattr("tinsmith.data.files.CHUNK_CHARS", 300)
    text = "".join(stories)
    (tmp_path / "input.txt").write_text(text)
    prepared_data = prepared(
        TextData(path=str(tmp_path / "input.txt"), validation=0), tokenizer=metaspace_tokenizer()
    )
    assert texts_of(prepared_data, "train") == [text]


def test_validation_0_means_no_validation_split(prepared, story_file, texts_of, stories):
    prepared_data = prepared(TextData(path=str(story_file), validation=0))
    assert texts_of(prepared_data, "train") == stories
    with pytest.raises(UserError, match="validation"):
        open_dataset(prepared_data.folder, "documents", "validation", 8, 0)


def test_validation_may_be_a_separate_file(prepared, write_lines, texts_of, stories):
    validation_file = write_lines("held.jsonl", objects(stories[:7]))
    path = write_lines("rest.jsonl", objects(stories[7:]))
    prepared_data = prepared(TextData(path=str(path), validation=str(validation_file)))
    assert texts_of(prepared_data, "train") == stories[7:]
    assert texts_of(prepared_data, "validation") == stories[:7]


def test_a_folder_with_train_and_valid_files_is_split_by_them(
    prepared, tmp_path, texts_of, stories
):
    folder = tmp_path / "own"
    folder.mkdir()
    for name, texts in (("train", stories[9:]), ("valid", stories[3:9]), ("test", stories[:3])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(o) + "\n" for o in objects(texts)))
    prepared_data = prepared(TextData(path=str(folder)))
    assert texts_of(prepared_data, "train") == stories[9:]
    assert texts_of(prepared_data, "validation") == stories[3:9]
    assert prepared_data.report["sources"][0]["name"] == "own"


def test_all_file_formats_give_the_same_documents(prepared, texts_of, tmp_path, stories):
    import gzip

    lines = "".join(json.dumps(o) + "\n" for o in objects(stories[:10]))
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table = pyarrow.Table.from_pylist(objects(stories[:10]))
    pyarrow.parquet.write_table(table, folder / "c.parquet")
    (folder / "d.txt").write_text("<|endoftext|>\n".join(stories[:10]))
    prepared_data = prepared(TextData(path=str(folder), validation=0))
    assert texts_of(prepared_data, "train") == stories[:10] * 4


def test_the_limit_takes_the_first_documents(prepared, texts_of, story_file, stories):
    prepared_data = prepared(TextData(path=str(story_file), validation=0, limit=5))
    assert texts_of(prepared_data, "train") == stories[:5]
    assert len(texts_of(prepared(StdlibData(validation=0, limit=7), "chats"), "train")) == 7


def test_prepared_data_is_reused_and_prepared_again_after_any_change(
    prepared, story_file, write_lines, stories, tokenizer
):
    config = TextData(path=str(story_file))
    first = prepared(config)
    written = (first.folder / "report.json").stat().st_mtime_ns
    again = prepared(config)
    assert again.folder == first.folder
    assert (again.folder / "report.json").stat().st_mtime_ns == written
    assert again.tokenizer.fingerprint() == tokenizer.fingerprint()
    train = TokenizerConfig(train=TrainTokenizerConfig(vocab_size=300))
    others = [
        prepared(TextData(path=str(story_file), validation=0.3)).folder,
        prepared(config, tokenizer=train).folder,
        prepared((config, config)).folder,
    ]
    write_lines("stories.jsonl", objects([*stories, "One more."]))
    others.append(prepared(config).folder)
    assert len({first.folder, *others}) == 5


def test_reused_data_is_announced_and_damaged_data_is_prepared_again(
    tmp_path, story_file, tokenizer, texts_of, stories
):
    output = []
    config = TextData(path=str(story_file), validation=0)

    def run():
        return prepare(config, tokenizer, "documents", tmp_path / "data", output.append)

    first = run()
    output.clear()
    run()
    assert output == [f" prepare   found {first.folder}"]
    (first.folder / "0" / "train" / "00000.tokens").write_bytes(b"short")
    assert texts_of(run(), "train") == stories
    assert "damaged" in output[1]


def test_preparation_is_deterministic(tmp_path, story_file):
    train = TokenizerConfig(train=TrainTokenizerConfig(vocab_size=400))
    data = (TextData(path=str(story_file)), TasksData(count=300))
    folders = [
        prepare(data, train, "documents", tmp_path / name, lambda line: None).folder
        for name in ("one", "two")
    ]
    names = [sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in folders]
    assert names[0] == names[1]
    for name in names[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_a_tokenizer_is_trained_on_the_train_split_only(prepared, write_lines, stories):
    validation_file = write_lines("held.jsonl", objects(["zqxzqxzqx " * 500]))
    path = write_lines("rest.jsonl", objects(stories))
    train = TokenizerConfig(train=TrainTokenizerConfig(vocab_size=500))
    prepared_data = prepared(
        TextData(path=str(path), validation=str(validation_file)), tokenizer=train
    )
    assert len(prepared_data.tokenizer.encode("zqxzqxzqx")) == 9
    assert len(prepared_data.tokenizer.encode("Once there was a")) <= 5


def test_a_tokenizer_is_trained_on_at_most_max_bytes_sampled_evenly(
    prepared, write_lines, stories, monkeypatch
):
    sampled = []

    def watch(texts, vocab_size):
        sampled.extend(texts)
        return tokenizer_of(sampled)

    from tinsmith.text.bpe import train_bpe as tokenizer_factory

    def tokenizer_of(texts):
        return tokenizer_factory(texts, 300)

    monkeypatch.setattr("tinsmith.data.prepare.tokenizer.train_bpe", watch)
    texts = [f"{number} {story}" for number in range(30) for story in stories]
    path = write_lines("s.jsonl", objects(texts))
    settings = TrainTokenizerConfig(vocab_size=300, max_bytes=20_000)
    prepared(TextData(path=str(path), validation=0), tokenizer=TokenizerConfig(train=settings))
    assert 12_000 < sum(len(text.encode()) for text in sampled) <= 20_000
    quarters = Counter(int(text.split()[0]) * 4 // 30 for text in sampled)
    assert min(quarters[q] for q in range(4)) > 0.5 * len(sampled) / 4


@pytest.mark.parametrize("num_documents", [1, 2, 8, 100])
@pytest.mark.parametrize("seed", range(4))
def test_D13_long_documents_are_sampled_in_pieces(
    prepared, write_lines, stories, monkeypatch, num_documents, seed
):
    sampled = []

    def watch(texts, vocab_size):
        sampled.extend(texts)
        return train_bpe(sampled, vocab_size)

    monkeypatch.setattr("tinsmith.data.prepare.tokenizer.train_bpe", watch)
    size = 200_000 // num_documents
    books = [(f"{seed} {n} " + "".join(stories) * 50)[:size] for n in range(num_documents)]
    path = write_lines("books.jsonl", objects(books))
    settings = TrainTokenizerConfig(vocab_size=300, max_bytes=20_000)
    prepared(TextData(path=str(path), validation=0), tokenizer=TokenizerConfig(train=settings))
    assert 10_000 < sum(len(text.encode()) for text in sampled) <= 20_000


def test_chats_as_documents_are_rendered_with_the_chat_template(prepared, texts_of, write_lines):
    path = write_lines("c.jsonl", [chat("why", "because"), chat("who", "me")])
    prepared_data = prepared(ChatsData(path=str(path), validation=0), "documents")
    (first, _) = texts_of(prepared_data, "train")
    assert first.startswith("<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n")
    assert "because<|im_end|>" in first
    (source,) = prepared_data.report["sources"]
    names = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    text = "".join(texts_of(prepared_data, "train"))
    for name in names:
        text = text.replace(name, "")
    assert source["train"]["bytes"] == len(text)


@pytest.mark.parametrize("data", [TasksData(count=200), StdlibData(limit=100)])
def test_generated_data_has_disjoint_splits_in_both_formats(prepared, texts_of, data):
    for data_format in ("documents", "chats"):
        prepared_data = prepared(data, data_format)
        train, validation = (
            set(texts_of(prepared_data, "train")),
            set(texts_of(prepared_data, "validation")),
        )
        assert train
        assert validation
        assert not train & validation


def test_rephrased_questions_about_the_same_sum_are_in_the_same_split(prepared, texts_of):
    prepared_data = prepared(TasksData(tasks=("arithmetic",), count=3000, digits=1, validation=0.3))
    splits = [
        {text.split("\n", 1)[1] for text in texts_of(prepared_data, split)}
        for split in ("train", "validation")
    ]
    assert len(splits[1]) > 20
    assert not splits[0] & splits[1]


def test_duplicate_functions_are_left_out(prepared, texts_of, monkeypatch):
    source = "".join(
        f'def f{n}(x):\n    """Return {n}, a number."""\n    return {n}\n' for n in range(5)
    )
    modules = [stdlib.StdlibModule(f"{name}.py", source) for name in "abcdef"]
    monkeypatch.setattr(stdlib, "read_modules", lambda paths: iter(modules))
    prepared_data = prepared(StdlibData(validation=0.5), "chats")
    assert prepared_data.report["sources"][0]["train"]["documents"] == 5


def test_several_sources_have_separate_shards_and_unique_names(prepared, story_file):
    prepared_data = prepared(
        (
            TextData(path=str(story_file), weight=3),
            TextData(path=str(story_file)),
            TasksData(count=50),
        )
    )
    names = ["stories", "stories-2", "tasks"]
    assert [dataset["name"] for dataset in prepared_data.report["sources"]] == names
    dataset = open_dataset(prepared_data.folder, "documents", "train", 32, 0)
    assert dataset.names == names
    counts = np.bincount(dataset.get_batch(0, 1000).source.numpy(), minlength=3)
    assert counts.tolist() == [600, 200, 200]


def test_packing_efficiency_of_chats_is_99_percent_if_short_ones_fill_the_gaps(real_data, prepared):
    """Chats are never cut, so many of half a row or more leave padding (T3)."""
    real, code = ChatsData(path=str(real_data / "llamafactory_sft")), StdlibData(limit=600)
    for config, bound in ((real, 0.99), (code, 0.95), (TasksData(count=1000), 0.96)):
        prepared_data = prepared(config, "chats")
        for seq_len in (256, 512, 2048):
            source = open_dataset(prepared_data.folder, "chats", "train", seq_len, 0)
            assert source.packing_efficiency >= bound - 0.5 / source.size, (config.kind, seq_len)


def test_real_stories_are_prepared_without_loss(real_data, prepared, texts_of):
    path = real_data / "tinystories_sample" / "train.txt"
    prepared_data = prepared(TextData(path=str(path)))
    stories = [text for text in path.read_text().split("<|endoftext|>\n") if text.strip()]
    all_texts = texts_of(prepared_data, "train") + texts_of(prepared_data, "validation")
    assert Counter(all_texts) == Counter(stories)
