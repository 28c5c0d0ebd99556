import json
from pathlib import Path

import pytest

from tinsmith.core.manifest import MANIFEST, newest_valid, step_name, steps, verify, write_manifest


def save(folder: Path, content: str = "weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(content * 100)
    (folder / "config.yaml").write_text("model: {}\n")
    (folder / "inner").mkdir()
    (folder / "inner" / "state.json").write_text("{}")
    write_manifest(folder, {"step": 7})
    return folder


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path / "step-00000007")


def edit(folder: Path, **changes):
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_manifest_lists_every_file_with_size_and_hash_and_carries_extras(saved):
    manifest = json.loads((saved / MANIFEST).read_text())
    assert manifest["schema"] == 1
    assert manifest["step"] == 7
    assert list(manifest["files"]) == ["config.yaml", "inner/state.json", "model.safetensors"]
    assert manifest["files"]["model.safetensors"]["bytes"] == 700
    assert verify(saved) is None
    assert verify(saved, hashes=True, required=["model.safetensors"]) is None


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def flip_a_bit(folder):
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[350] ^= 1
    path.write_bytes(raw)


def remove_a_file(folder):
    (folder / "inner" / "state.json").unlink()


def remove_the_manifest(folder):
    (folder / MANIFEST).unlink()


def break_the_json(folder):
    path = folder / MANIFEST
    path.write_text(path.read_text()[:-20])


def empty_the_manifest(folder):
    (folder / MANIFEST).write_text("")


def make_the_manifest_a_list(folder):
    (folder / MANIFEST).write_text("[]")


def nest_the_manifest_deeply(folder):
    (folder / MANIFEST).write_text("[" * 200000)


def another_schema(folder):
    edit(folder, schema=2)


def no_files(folder):
    edit(folder, files={})


def a_size_that_is_a_string(folder):
    edit(folder, files={"config.yaml": {"bytes": "10", "sha256": "x"}})


def a_path_outside_the_folder(folder):
    (folder.parent / "outside").write_text("x")
    edit(folder, files={"../outside": {"bytes": 1, "sha256": "x"}})


def a_folder_in_place_of_a_file(folder):
    (folder / "config.yaml").unlink()
    (folder / "config.yaml").mkdir()


MUTATIONS = {
    truncate: "model.safetensors has 699 bytes instead of 700",
    empty: "model.safetensors has 0 bytes instead of 700",
    flip_a_bit: "model.safetensors was changed after saving (its SHA-256 differs)",
    remove_a_file: "inner/state.json is missing",
    remove_the_manifest: "manifest.json is missing (saving was interrupted)",
    break_the_json: "manifest.json: not valid JSON",
    empty_the_manifest: "manifest.json: not valid JSON",
    make_the_manifest_a_list: "manifest.json: not a JSON object",
    nest_the_manifest_deeply: "manifest.json: not valid JSON",
    another_schema: "manifest.json has schema 2, and this version reads 1",
    no_files: "manifest.json lists no files",
    a_size_that_is_a_string: "manifest.json has no size and SHA-256 for config.yaml",
    a_path_outside_the_folder: "'../outside' leads out of",
    a_folder_in_place_of_a_file: "config.yaml is missing",
}


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_T5_every_damage_gives_one_line_and_the_checkpoint_before_is_used(tmp_path, mutate):
    older = save(tmp_path / step_name(5))
    newer = save(tmp_path / step_name(10))
    assert newest_valid(tmp_path) == (newer, [])
    mutate(newer)
    reason = verify(newer, hashes=True)
    assert reason is not None
    assert MUTATIONS[mutate] in reason
    assert "\n" not in reason
    assert newest_valid(tmp_path) == (older, [f"step-00000010: {reason}"])


def test_T5_sizes_are_compared_even_without_hashes_and_contents_only_with_them(saved):
    flip_a_bit(saved)
    assert verify(saved) is None
    truncate(saved)
    assert "699 bytes" in (verify(saved) or "")


def test_T5_a_required_file_must_be_listed(saved):
    assert (
        verify(saved, required=["optim.safetensors"])
        == "manifest.json does not list optim.safetensors"
    )


def test_T5_incomplete_and_unrelated_folders_are_not_checkpoints(tmp_path):
    for name in (".step-00000099.tmp-12", "step-99", "best", "step-00000050.old"):
        save(tmp_path / name)
    (tmp_path / step_name(60)).write_text("a file")
    (tmp_path / "LATEST").write_text(step_name(60))
    assert newest_valid(tmp_path) == (None, [])
    good = save(tmp_path / step_name(3))
    assert newest_valid(tmp_path) == (good, [])


def test_T5_without_a_valid_checkpoint_newest_valid_returns_none(tmp_path):
    assert newest_valid(tmp_path / "absent") == (None, [])
    for step in (1, 2):
        truncate(save(tmp_path / step_name(step)))
    newest, skipped = newest_valid(tmp_path)
    assert newest is None
    assert [line.split(":")[0] for line in skipped] == ["step-00000002", "step-00000001"]


def test_checkpoints_are_ordered_by_step_number(tmp_path):
    for step in (9, 123456789, 10):
        save(tmp_path / step_name(step))
    assert [path.name for path in steps(tmp_path)] == [
        "step-123456789",
        "step-00000010",
        "step-00000009",
    ]
