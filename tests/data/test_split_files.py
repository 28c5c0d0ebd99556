"""Files of a folder are assigned to training, validation or neither by the split words in names."""

import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tinsmith.core.errors import UserError
from tinsmith.data.prepare.prepare import prepare
from tinsmith.data.sources import ChatsData, HubData, TextData
from tinsmith.data.sources.base import find_split_files

LAYOUTS = """
train-00000-of-00001.parquet | validation-00000-of-00001.parquet | test-00000-of-00001.parquet
data/train-00000-of-2.parquet data/train-00001-of-2.parquet | | data/test-00000-of-1.parquet
main/train-0-of-1.parquet socratic/train-0-of-1.parquet | | main/test-0-of-1.parquet
d/train_sft-0.parquet d/train_gen-0.parquet | | d/test_sft-0.parquet d/test_gen-0.parquet
train.jsonl | valid.jsonl | test.jsonl
train.jsonl | val.jsonl |
train.jsonl | dev.jsonl | test.jsonl
train.jsonl | eval.jsonl |
train.jsonl | | test.jsonl
train.jsonl | evaluation.jsonl | tests.jsonl
TRAIN.jsonl | VALID.jsonl | TEST.jsonl
Train.jsonl | Validation.jsonl | Test.jsonl
gsm8k.train.jsonl | gsm8k.val.jsonl | gsm8k.test.jsonl
a.train.jsonl b.train.jsonl | a.val.jsonl b.val.jsonl |
qa.train.jsonl text.train.jsonl | qa.val.jsonl text.val.jsonl | README.txt
mc_eval.train.jsonl | mc_eval.val.jsonl |
mbpp_train.jsonl | mbpp_val.jsonl | mbpp_test.jsonl mbpp_prompt.jsonl
train/0.jsonl train/1.jsonl | validation/0.jsonl | test/0.jsonl
train/x.jsonl | dev/x.jsonl | test/x.jsonl
en/train/x.jsonl zh/train/x.jsonl | en/dev/x.jsonl zh/dev/x.jsonl | en/test/x.jsonl
training/a.txt training/b.txt | evaluation/a.txt |
default/train/0000.parquet | default/validation/0000.parquet | default/test/0000.parquet
splits/train/part-000.jsonl.gz | splits/valid/part-000.jsonl.gz | splits/test/part-000.jsonl.gz
wiki.train.txt | wiki.valid.txt | wiki.test.txt
wikitext-2-raw/train.txt | wikitext-2-raw/valid.txt | wikitext-2-raw/test.txt
TinyStoriesV2-GPT4-train.txt | TinyStoriesV2-GPT4-valid.txt |
2024-01-31-train.jsonl | 2024-01-31-dev.jsonl | 2024-02-01-test.jsonl
train_2023.jsonl train_2024.jsonl | val_2024.jsonl | test_2024.jsonl
train01.jsonl train02.jsonl | dev01.jsonl | test01.jsonl
20240101/train/a.parquet | 20240101/dev/a.parquet | 20240101/test/a.parquet
mnli/train.jsonl | mnli/validation_matched.jsonl | mnli/test_matched.jsonl
train.clean.100.jsonl | dev.clean.jsonl dev-other.jsonl | test.clean.jsonl test-other.jsonl
dataTrain.jsonl | dataVal.jsonl | dataTest.jsonl
trainset.jsonl | devset.jsonl | testset.jsonl
train_data.jsonl | eval_data.jsonl | test_data.jsonl
squad-train-v2.0.jsonl | squad-dev-v2.0.jsonl |
arc/ARC-Easy-Train.jsonl | arc/ARC-Easy-Dev.jsonl | arc/ARC-Easy-Test.jsonl
train.jsonl | held_out.jsonl |
train.jsonl | heldout.jsonl holdout.jsonl |
x-train.jsonl | x-development.jsonl | x-testing.jsonl
flores/train.jsonl | flores/dev.jsonl | flores/devtest.jsonl
a.jsonl b.jsonl | | test.jsonl
a.jsonl b/c.jsonl | validation.jsonl |
part-0.parquet part-1.parquet | | README.txt LICENSE.txt LICENSE.MIT.txt
a.txt b.txt | | LICENCE.txt NOTICE.txt requirements.txt
helpful-base/train.jsonl.gz harmless-base/train.jsonl.gz | | helpful-base/test.jsonl.gz
train.jsonl | val.jsonl | train.test.jsonl extra.jsonl
latest.jsonl contest.jsonl greatest.jsonl devices.jsonl evaluate_me_not.jsonl | | test.jsonl
train-new.jsonl | train-eval.jsonl | train-test.jsonl
a.jsonl | test_dev/b.validation.jsonl | test/train.jsonl
"""
CASES = [[part.split() for part in line.split("|")] for line in LAYOUTS.strip().splitlines()]


def make(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def relative(root: Path, paths: list[Path]) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in paths)


@pytest.mark.parametrize("layout", CASES, ids=lambda layout: layout[0][0])
def test_D1_no_record_of_validation_or_test_is_in_the_training_split(layout, tmp_path):
    train, validation, left_out = layout
    root = tmp_path / "test-of-validation"
    make(root, train + validation + left_out)
    found = find_split_files(str(root), 0.05, "data")
    assert relative(root, found.train) == sorted(train)
    assert relative(root, found.validation) == sorted(validation)
    assert relative(root, found.left_out) == sorted(left_out)


def test_D1_there_are_more_than_40_layouts():
    assert len(CASES) >= 45


def test_D1_split_words_are_found_between_any_separators(tmp_path):
    rng = random.Random(0)
    words = {
        "train": ["train", "training", "Train", "TRAIN"],
        "validation": ["valid", "val", "validation", "dev", "eval", "Validation", "DEV"],
        "test": ["test", "TEST", "Test", "tests"],
    }
    for number in range(300):
        root = tmp_path / str(number)
        expected = {part: [] for part in words}
        for part in ("train", rng.choice(list(words)), rng.choice(list(words))):
            word = rng.choice(words[part])
            before, after = (
                rng.choice(["", *(f"{each}" for each in ("a", "2024", "x-y", "data_v2"))])
                for _ in range(2)
            )
            left, right = rng.choice("-_. /"), rng.choice("-_. /")
            name = f"{before + left if before else ''}{word}{right + after if after else ''}.jsonl"
            make(root, [name])
            expected[part].append(name)
        found = find_split_files(str(root), 0.05, "data")
        for part, paths in zip(words, (found.train, found.validation, found.left_out), strict=True):
            assert relative(root, paths) == sorted(set(expected[part])), expected


@pytest.mark.parametrize(
    "names", [["test.jsonl"], ["a-test-0.jsonl", "dev.jsonl"], ["validation/0.jsonl"]]
)
def test_D1_a_folder_without_a_training_file_is_one_line(names, tmp_path):
    make(tmp_path, names)
    with pytest.raises(UserError, match=r"data\.path: .* no file to train on") as caught:
        find_split_files(str(tmp_path), 0.05, "data")
    assert names[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_D1_a_file_or_folder_that_the_recipe_names_is_read_whatever_its_name(tmp_path):
    make(tmp_path, ["test/test.jsonl", "test/x.jsonl"])
    file = tmp_path / "test" / "test.jsonl"
    assert find_split_files(str(file), 0.05, "data").train == [file]
    held_back = find_split_files(str(tmp_path / "test"), str(file), "data")
    assert relative(tmp_path, held_back.train) == ["test/x.jsonl"]
    assert held_back.validation == [file]
    make(tmp_path, ["a/x.jsonl", "a/y.jsonl"])
    named = find_split_files(str(tmp_path / "a"), str(tmp_path / "a" / "y.jsonl"), "data")
    assert relative(tmp_path, named.train) == ["a/x.jsonl"]


def published(folder: Path) -> Path:
    """A data set as the Hub stores it."""
    (folder / "data").mkdir(parents=True)
    for part, count in (("train", 50), ("validation", 20), ("test", 20)):
        rows = [{"text": f"{part.upper()} document {number}."} for number in range(count)]
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, folder / "data" / f"{part}-00000-of-00001.parquet")
    (folder / "README.txt").write_text("TEST of a readme")
    return folder


def test_D1_a_data_set_of_the_hub_is_prepared_by_its_splits(tmp_path, tokenizer, texts_of):
    output = []
    config = TextData(path=str(published(tmp_path / "set")))
    found = prepare(config, tokenizer, "documents", tmp_path / "data", output.append)
    assert len(texts_of(found, "train")) == 50
    assert len(texts_of(found, "validation")) == 20
    assert all(text.startswith("TRAIN") for text in texts_of(found, "train"))
    assert all(text.startswith("VALIDATION") for text in texts_of(found, "validation"))
    (line,) = [line for line in output if "set: train from" in line]
    assert line == (
        " prepare   set: train from data/train-00000-of-00001.parquet; "
        "validation from data/validation-00000-of-00001.parquet; "
        "not read: README.txt, data/test-00000-of-00001.parquet"
    )
    pytest.importorskip("datasets")
    hub = HubData(name=str(tmp_path / "set"), split="test", validation=0)
    found = prepare(hub, tokenizer, "documents", tmp_path / "data", lambda line: None)
    assert all(text.startswith("TEST") for text in texts_of(found, "train"))


def test_D1_a_readme_does_not_refuse_a_folder_of_chats(tmp_path, prepared):
    roles = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "c.jsonl").write_text(json.dumps({"messages": roles}) + "\n")
    (tmp_path / "own" / "README.txt").write_text("Chats.")
    found = prepared(ChatsData(path=str(tmp_path / "own"), validation=0), "chats")
    assert found.report["sources"][0]["train"]["documents"] == 1


def test_D1_real_folders_keep_their_validation_records_apart(real_data):
    for folder in ("llamafactory_sft", "llamafactory_pref", "cmrc2018_zh", "gsm8k", "mbpp"):
        found = find_split_files(str(real_data / folder), 0.05, "data")
        assert found.train
        assert found.validation
        assert all("train" in path.name for path in found.train)
        assert all("val" in path.name for path in found.validation)
