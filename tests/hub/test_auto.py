import pytest
import torch
import torch.nn.functional as F
import transformers

import tinsmith.hub.auto
from tinsmith import load
from tinsmith.hub.hf import export_folder

STRANGE = {
    "sinks": ({"sinks": True, "value_residual": True}, {}),
    "learned places, layer norm": ({}, {"positions": "learned", "norm": "layer"}),
    "native sparse attention": (
        {
            **{"kind": "nsa", "compress_block": 4, "compress_stride": 2, "window": 5},
            **{"select_block": 8, "select_count": 3},
        },
        {},
    ),
    "experts": ({"kind": "dyn_heads", "experts": 3}, {}),
    "untied": ({"window": 5, "bias": "all"}, {"tie_embeddings": False}),
}


@pytest.fixture(params=STRANGE)
def pair(request, tmp_path, model):
    mixer, changes = STRANGE[request.param]
    ours = model(mixer, **changes)
    assert export_folder(ours, None, tmp_path / "x", max_shard_bytes=9000).family == "tinsmith"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert isinstance(theirs, tinsmith.hub.auto.TinsmithForCausalLM)
    return ours, theirs


def test_a_tinsmith_model_loads_in_transformers_with_equal_logits(pair, ids):
    ours, theirs = pair
    assert torch.equal(theirs(ids).logits, ours(ids).logits)
    for name, counter in ours.named_buffers():
        assert torch.equal(theirs.lm.get_buffer(name), counter), name
    tied = theirs.lm.head.weight is theirs.lm.embed.weight
    assert tied == ours.config.tie_embeddings


def test_the_attention_mask_marks_padding(pair, ids):
    ours, theirs = pair
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    got = theirs(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[0, 7:], ours(ids[:1, 7:]).logits[0], atol=1e-5, rtol=0)


def test_generate_gives_the_greedy_ids(pair, ids):
    ours, theirs = pair
    sequence = ids[:, :6]
    output = theirs.generate(sequence, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for _ in range(8):
        sequence = torch.cat((sequence, ours(sequence).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(output, sequence)


def test_the_loss_is_the_mean_over_shifted_labels(pair, ids):
    ours, theirs = pair
    labels = ids.clone()
    labels[:, :4] = -100
    logits = ours(ids).logits[:, 3:-1]
    wanted = F.cross_entropy(logits.flatten(0, 1), ids[:, 4:].flatten())
    torch.testing.assert_close(theirs(ids, labels=labels).loss, wanted)


def test_a_folder_saved_by_transformers_loads_again(pair, tmp_path):
    ours, theirs = pair
    theirs.save_pretrained(tmp_path / "theirs")
    back, _ = load(tmp_path / "theirs")
    assert back.config == ours.config
    wanted = ours.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in back.state_dict().items())
