import builtins
import json

import pytest

from tinsmith.core.errors import UserError
from tinsmith.data.prepare.prepare import prepare
from tinsmith.data.sources import HubData

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def hub_folder(tmp_path, stories):
    """A folder that `datasets` reads as it would read one of the Hub."""
    folder = tmp_path / "tales"
    folder.mkdir()
    records = [
        {"text": text, "instruction": f"Tell story {n}.", "input": "", "output": text}
        for n, text in enumerate(stories)
    ]
    records[4]["text"] = ""
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_dataset_is_streamed_into_shards(prepared, texts_of, hub_folder, stories, rejects_of):
    prepared_data = prepared(HubData(name=str(hub_folder), validation=0))
    assert texts_of(prepared_data, "train") == stories[:4] + stories[5:]
    assert rejects_of(prepared_data) == [("tales:train", 5, "field 'text' is empty")]
    assert prepared_data.report["sources"][0]["name"] == "tales"
    assert not list(prepared_data.folder.parent.glob(".fetched*"))


def test_the_limit_ends_the_stream(prepared, texts_of, hub_folder, stories):
    prepared_data = prepared(HubData(name=str(hub_folder), validation=0, limit=3))
    assert texts_of(prepared_data, "train") == stories[:3]


def test_rows_are_chats_for_fine_tuning_or_without_a_field(prepared, texts_of, hub_folder, stories):
    chats = prepared(HubData(name=str(hub_folder), validation=0), "chats")
    documents = prepared(HubData(name=str(hub_folder), validation=0, field=None), "documents")
    for prepared_data in (chats, documents):
        texts = texts_of(prepared_data, "train")
        assert len(texts) == len(stories)
        assert "Tell story 7." in texts[7]


def test_the_download_is_announced_and_done_once(hub_folder, tokenizer, tmp_path, monkeypatch):
    output, loads = [], []
    load = datasets.load_dataset

    def watch(*arguments, **more):
        loads.append((arguments, more))
        return load(*arguments, **more)

    monkeypatch.setattr(datasets, "load_dataset", watch)
    for _ in range(2):
        prepare(
            HubData(name=str(hub_folder), limit=10),
            tokenizer,
            "documents",
            tmp_path / "data",
            output.append,
        )
    assert loads == [
        ((str(hub_folder), None), {"split": "train", "revision": None, "streaming": True})
    ]
    assert output[0] == f" prepare   fetching {hub_folder}:train through `datasets`, 10 rows"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "nobody/nothing"}, "cannot read the data set 'nobody/nothing': "),
        ({"split": "no"}, "Bad split: no"),
        ({"config": "no"}, "BuilderConfig 'no' not found"),
    ],
)
def test_a_failed_download_is_a_one_line_error(prepared, hub_folder, change, message, tmp_path):
    with pytest.raises(UserError) as caught:
        prepared(HubData(**({"name": str(hub_folder)} | change)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_missing_datasets_package_is_an_error_with_the_pip_command(
    prepared, hub_folder, monkeypatch
):
    real = builtins.__import__

    def missing(name, *more):
        if name == "datasets":
            raise ImportError
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r'pip install "tinsmith\[hub\]"'):
        prepared(HubData(name=str(hub_folder)))


def test_T9_a_damaged_file_of_a_dataset_is_a_one_line_error(prepared, hub_folder):
    (hub_folder / "train.jsonl").write_text('{"text": "a"}\n{broken\n')
    with pytest.raises(UserError, match=r"cannot read the data set"):
        prepared(HubData(name=str(hub_folder)))
