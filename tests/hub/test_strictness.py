"""Folders with wrong contents: each gives one line, and no file outside of them is read."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinsmith.core.errors import UserError
from tinsmith.hub.hf import export_folder, import_folder


@pytest.fixture
def folder(tmp_path, model):
    export_folder(model(), None, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path, model):
    export_folder(model(tie_embeddings=False), None, tmp_path / "sharded", max_shard_bytes=9000)
    return tmp_path / "sharded"


def refused(folder):
    with pytest.raises(UserError) as caught:
        import_folder(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def retensor(folder, change):
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def reindex(folder, change):
    path = folder / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    change(data["weight_map"])
    path.write_text(json.dumps(data))


def test_a_missing_tensor_is_named(folder):
    retensor(folder, lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    assert "tensor model.layers.1.mlp.up_proj.weight is missing" in refused(folder)


def test_an_unexpected_tensor_is_named(folder):
    name = "model.layers.0.self_attn.q_proj.bias"
    retensor(folder, lambda state: state.update({name: torch.zeros(32)}))
    assert f"tensor {name} is not part of this model" in refused(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder):
    name = "model.layers.2.self_attn.k_proj.weight"
    retensor(folder, lambda state: state.update({name: torch.zeros(8, 32)}))
    assert f"tensor {name} is [8, 32]; the config asks for [16, 32]" in refused(folder)


def test_a_config_of_another_size_is_refused(folder, edit):
    edit(folder, intermediate_size=40)
    assert "mlp.gate_proj.weight is [48, 32]; the config asks for [40, 32]" in refused(folder)
    edit(folder, intermediate_size=48, num_hidden_layers=4)
    assert "tensor model.layers.3." in refused(folder)
    edit(folder, num_hidden_layers=2)
    assert "tensor model.layers.2." in refused(folder)


def test_excessive_sizes_are_refused_before_allocation(folder, edit):
    edit(folder, hidden_size=2**20, intermediate_size=2**20, head_dim=2**20, vocab_size=2**28)
    assert "the config asks for [268435456, 1048576]" in refused(folder)


def test_untied_weights_without_a_head_are_refused(folder, edit):
    edit(folder, tie_word_embeddings=False)
    assert "tensor lm_head.weight is missing" in refused(folder)


def test_a_copy_of_tied_weights_and_old_rotary_buffers_are_ignored(folder, ids):
    wanted, _ = import_folder(folder)

    def add(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        state["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        state["model.rotary_emb.inv_freq"] = torch.zeros(4)

    retensor(folder, add)
    got, _ = import_folder(folder)
    assert torch.equal(got(ids).logits, wanted(ids).logits)
    assert got.head.weight is got.embed.weight
    retensor(folder, lambda state: state["lm_head.weight"][3].add_(1))
    assert "tensor lm_head.weight differs from the embedding" in refused(folder)


def test_quantised_weights_are_refused(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    retensor(folder, lambda state: state.update({name: torch.zeros(48, 32, dtype=torch.int8)}))
    assert f"{name} is I8; quantised weights cannot be read" in refused(folder)


def test_mixed_dtypes_of_a_file_are_kept(folder, ids):
    name = "model.layers.0.mlp.up_proj.weight"
    retensor(folder, lambda state: state.update({name: state[name].bfloat16()}))
    lm, _ = import_folder(folder)
    kinds = {name: parameter.dtype for name, parameter in lm.named_parameters()}
    assert kinds.pop("blocks.0.feed.up_proj.weight") == torch.bfloat16
    assert set(kinds.values()) == {torch.float32}
    lm, _ = import_folder(folder, dtype=torch.float64)
    assert {parameter.dtype for parameter in lm.parameters()} == {torch.float64}


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 5000, -1])
def test_truncated_weights_are_refused(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "model.safetensors: not a complete safetensors file" in refused(folder)


def test_a_header_that_claims_to_be_huge_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes((10**15).to_bytes(8, "little") + path.read_bytes()[8:])
    assert "not a complete safetensors file" in refused(folder)


class Trap:
    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


def test_pickled_weights_are_never_opened(folder):
    raw = pickle.dumps(Trap())
    (folder / "model.safetensors").write_bytes(raw)
    assert "not a complete safetensors file" in refused(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(raw)
    output = refused(folder)
    assert "has only pickled weights (pytorch_model.bin)" in output
    assert "save_pretrained" in output


def test_a_folder_without_weights_or_config_names_what_is_missing(folder):
    (folder / "model.safetensors").unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in refused(folder)
    (folder / "config.json").write_text("{")
    assert "config.json: not valid JSON" in refused(folder)
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refused(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "sub/../../outside.safetensors",
        "{parent}/outside.safetensors",
        "link/outside.safetensors",
        "direct.safetensors",
        "/etc/passwd",
        "model.bin",
        "",
        "a\0.safetensors",
    ],
)
def test_a_shard_outside_of_the_folder_is_never_opened(sharded, name):
    """Lexically, absolutely and through links; the file is there and would even be valid."""
    outside = sharded.parent / "outside.safetensors"
    shutil.copy(next(iter(sharded.glob("model-00001*"))), outside)
    (sharded / "link").symlink_to(sharded.parent)
    (sharded / "direct.safetensors").symlink_to(outside)
    (sharded / "sub").mkdir()
    hostile = name.replace("{parent}", str(sharded.parent))
    reindex(sharded, lambda places: places.update({"model.embed_tokens.weight": hostile}))
    output = refused(sharded)
    assert "leads out of the folder" in output or "is not a safetensors file" in output


def test_a_snapshot_in_the_hub_cache_may_link_into_its_blobs(sharded, tmp_path, ids):
    """There every file is a link to ../../blobs; links further out are refused all the same."""
    wanted, _ = import_folder(sharded)
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "ab"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in sharded.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    got, _ = import_folder(snapshot)
    assert torch.equal(got(ids).logits, wanted(ids).logits)
    first = sorted(snapshot.glob("model-00001*"))[0]
    first.unlink()
    first.symlink_to(sharded / first.name)
    assert "leads out of" in refused(snapshot)


def test_a_damaged_index_gives_one_line(sharded):
    index = sharded / "model.safetensors.index.json"
    whole = index.read_text()
    for text, output in (
        ("{", "not valid JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {"a": 7}}', "'7' is not a safetensors file"),
    ):
        index.write_text(text)
        assert output in refused(sharded)
    index.write_text(whole)
    first = sorted(sharded.glob("model-00001*"))[0]
    first.rename(sharded / "elsewhere.safetensors")
    assert f"names {first.name}, which is missing" in refused(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    first, second = sorted(sharded.glob("model-0000[12]*"))
    state = load_file(second) | load_file(first)
    save_file(state, second, metadata={"format": "pt"})
    assert "is also in" in refused(sharded)


def test_loading_changes_no_random_state_and_keeps_no_memory_map(folder, ids):
    before = torch.get_rng_state()
    lm, _ = import_folder(folder)
    assert torch.equal(before, torch.get_rng_state())
    wanted = lm(ids).logits
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff" * (path.stat().st_size - 5000))
    assert torch.equal(lm(ids).logits, wanted)
