import json

import pytest
import torch
import transformers

from tinsmith import load
from tinsmith.core.errors import UserError
from tinsmith.hub import hf, tensors
from tinsmith.hub.hf import export_folder, write_folder
from tinsmith.text.tokenizer import Tokenizer


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_model_and_tokenizer_of_a_folder_load_in_transformers(tmp_path, model, tokenizer):
    lm = model(vocab_size=320)
    export_folder(lm, tokenizer, tmp_path / "final")
    assert sorted(path.name for path in (tmp_path / "final").iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    generation = read(tmp_path / "final" / "generation_config.json")
    assert generation == {"bos_token_id": 0, "eos_token_id": [0, 2], "pad_token_id": 0}
    hugging_face = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert hugging_face.generation_config.eos_token_id == [0, 2]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "final")
    ids = theirs("Once upon a time", return_tensors="pt").input_ids
    assert ids[0].tolist() == tokenizer.encode("Once upon a time")
    output = hugging_face.generate(ids, max_new_tokens=9, do_sample=False)
    ours, back = load(tmp_path / "final")
    assert back is not None
    assert back.fingerprint() == tokenizer.fingerprint()
    sequence = ids
    while sequence.shape[1] < output.shape[1]:
        sequence = torch.cat((sequence, ours(sequence).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(sequence, output)


def test_config_json_has_the_keys_of_transformers_4_and_of_5(tmp_path, model, tokenizer):
    scaling = {"kind": "yarn", "factor": 4, "original_max_seq_len": 16}
    lm = model(rope={"theta": 5e5, "scaling": scaling}, vocab_size=320).bfloat16()
    export_folder(lm, tokenizer, tmp_path / "x")
    data = read(tmp_path / "x" / "config.json")
    four = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    four |= {"beta_fast": 32.0, "beta_slow": 1.0}
    assert data["rope_theta"] == 5e5
    assert data["rope_scaling"] == four
    assert data["rope_parameters"] == four | {"rope_theta": 5e5}
    assert data["dtype"] == data["torch_dtype"] == "bfloat16"
    assert data["eos_token_id"] == [0, 2]
    assert "pad_token_id" not in data


def test_without_a_tokenizer_no_special_ids_are_written(tmp_path, model):
    export_folder(model(), None, tmp_path / "x")
    assert read(tmp_path / "x" / "config.json")["eos_token_id"] is None
    assert set(read(tmp_path / "x" / "generation_config.json").values()) == {None}
    assert not list((tmp_path / "x").glob("token*"))
    assert load(tmp_path / "x")[1] is None


def test_tied_weights_are_stored_once_and_shards_stay_within_their_size(tmp_path, model):
    lm = model(tie_embeddings=True)
    done = export_folder(lm, None, tmp_path / "x", max_shard_bytes=10_000)
    index = read(tmp_path / "x" / "model.safetensors.index.json")
    assert "lm_head.weight" not in index["weight_map"]
    assert set(index["weight_map"].values()) == set(done.hashes)
    largest = max(parameter.nbytes for parameter in lm.parameters())
    for name in done.hashes:
        assert (tmp_path / "x" / name).stat().st_size < max(largest, 10_000) + 3000
    assert index["metadata"]["total_size"] == 4 * done.parameters == 4 * lm.parameter_count()


def test_equal_models_give_equal_bytes(tmp_path, model, tokenizer):
    for name in ("a", "b"):
        export_folder(model(vocab_size=320), tokenizer, tmp_path / name / "final")
    for path in (tmp_path / "a" / "final").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "final" / path.name).read_bytes(), path.name


def test_an_existing_folder_is_not_overwritten_unless_requested(tmp_path, model):
    target = tmp_path / "precious"
    target.mkdir()
    export_folder(model(), None, target)
    (target / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists; give the name of a new folder"):
        export_folder(model(), None, target)
    assert (target / "mine.txt").read_text() == "mine"
    export_folder(model(), None, target, overwrite=True)
    assert not (target / "mine.txt").exists()
    (tmp_path / "file").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="exists"):
            export_folder(model(), None, tmp_path / "file", overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "x"


def test_a_full_disk_keeps_the_old_folder_and_leaves_no_partial_one(tmp_path, model, monkeypatch):
    target = tmp_path / "final"
    export_folder(model(), None, target)
    before = (target / "model.safetensors").read_bytes()

    def full(*_, **__):
        raise tensors.SafetensorError("Error: I/O error: No space left (os error 28)")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        export_folder(model(depth=1), None, target, overwrite=True)
    assert caught.value.errno == 28
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (target / "model.safetensors").read_bytes() == before


def test_the_card_is_a_text_or_a_function_of_the_result(tmp_path, model):
    export_folder(model(), None, tmp_path / "a", card="# mine\n")
    assert (tmp_path / "a" / "README.md").read_text() == "# mine\n"
    picture = tmp_path / "loss.png"
    picture.write_bytes(b"png")
    seen = []
    card = lambda done: seen.append(done) or "made"  # noqa: E731
    done = export_folder(
        model({"sinks": True}), None, tmp_path / "b", card=card, extra_files=[picture]
    )
    assert seen == [done]
    assert (done.family, done.reason, done.dtype) == ("tinsmith", "layer 0 has sinks", "float32")
    assert (tmp_path / "b" / "README.md").read_text() == "made"
    assert (tmp_path / "b" / "loss.png").read_bytes() == b"png"
    export_folder(model(), None, tmp_path / "c")
    card_text = (tmp_path / "c" / "README.md").read_text()
    hashes = export_folder(model(), None, tmp_path / "d").hashes
    assert hashes["model.safetensors"] in card_text
    assert "`llama`, a stock class of transformers" in card_text


def test_write_folder_writes_a_given_state_dict(tmp_path, model, ids):
    lm = model(tie_embeddings=False)
    state = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    whole = torch.randn(2, 32)
    state["norm.weight"], state["blocks.0.mix_norm.weight"] = whole[0], whole[1]
    state["head.weight"] = state["embed.weight"]
    write_folder(lm.config, state, None, tmp_path / "x")
    back, _ = load(tmp_path / "x")
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_an_end_of_text_token_without_an_embedding_is_not_exported(tmp_path, model):
    """A vocabulary without an end-of-text token gets one when it is loaded."""
    size = transformers_tokenizer(tmp_path / "source", eos_token=None)
    foreign = Tokenizer.load(tmp_path / "source")
    assert foreign.vocab_size == size + 1
    export_folder(model(vocab_size=size), foreign, tmp_path / "out")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(exported) == size
    assert exported.chat_template is None
    assert not read(tmp_path / "out" / "generation_config.json")["eos_token_id"]
    _, back = load(tmp_path / "out")
    assert back is not None
    assert back.encode("a b") == foreign.encode("a b")
    with pytest.raises(UserError, match="vocab_size=200 is too small for the tokenizer, whose ids"):
        export_folder(model(vocab_size=200), foreign, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def transformers_tokenizer(folder, **roles):
    """Write a foreign byte-level tokenizer of 257 ids with `</s>`; return their number."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Raw

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Raw(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_tokens([AddedToken("</s>", special=True)])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **roles)
    theirs.save_pretrained(folder)
    return 257


def test_the_default_shard_size_is_five_gigabytes():
    assert hf.MAX_SHARD_BYTES == 5 * 10**9
