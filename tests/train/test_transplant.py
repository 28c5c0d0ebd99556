"""H-4, H-5 and H-7: a transplanted model in distillation trains its experts, and nothing else."""

import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinsmith.cli import app
from tinsmith.config import from_dict
from tinsmith.core.errors import UserError
from tinsmith.core.log import read_metrics
from tinsmith.data.loader.batch import Batch
from tinsmith.hub.load import load
from tinsmith.hub.transplant import TransplantPlan, build_transplant
from tinsmith.losses import chunked_head
from tinsmith.losses.divergence import DistillWeights, HeadInputs, summed_divergence
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.nn.parameters import count_parameters
from tinsmith.objectives.kd import KD
from tinsmith.train import checkpoint
from tinsmith.train.dryrun import dry_run
from tinsmith.train.trainer import train

LAYER = {
    "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2, "qk_norm": True},
    "feed_forward": {"kind": "swiglu", "hidden_dim": 48},
}
MODEL = {"vocab_size": 320, "dim": 32, "depth": 2, "max_seq_len": 64, "pattern": [LAYER]}
COMMON: dict[str, Any] = {
    "data": {"kind": "tasks", "count": 300, "digits": 2, "length": 4},
    "optim": {"schedule": {"kind": "wsd", "warmup": 2}},
    "eval": {"max_samples": 4, "max_new_tokens": 4},
    "log": {"every": 1},
}
TRAIN = {
    **{"seq_len": 48, "batch_size": 4, "grad_accum_steps": 2, "precision": "fp32", "steps": 6},
    **{"save_every": 2, "eval_every": 3, "sample_every": 6, "keep": {"last": 9, "best": False}},
}
FEEDS = {
    "task": ["experts=8", "reset_interval=3"],
    "smk": ["experts=8", "router_grad=smk", "reset_interval=3"],
    "sml": ["experts=8", "router_grad=sml", "sml_local=true"],
    "both": ["experts=8", "router_grad=both"],
    "topk_moe": ["kind=topk_moe", "experts=8"],
}


def transplant(source: Path, out: Path, *words: str) -> Path:
    arguments = ["transplant", str(source), str(out), *words]
    typer.main.get_command(app).main(arguments, standalone_mode=False)
    return out


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense model trained here: the teacher, and the skeleton."""
    root = tmp_path_factory.mktemp("dense")
    own = {"model": MODEL, "tokenizer": {"train": {"vocab_size": 320}}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINSMITH_RUNS", str(root))
        return train(
            from_dict(COMMON | own | {"objective": {"kind": "sft"}, "train": TRAIN}), "run"
        )


@pytest.fixture(scope="module")
def sparse(dense, tmp_path_factory):
    """Its transplants, by the names of FEEDS."""
    root = tmp_path_factory.mktemp("sparse")
    return {name: transplant(dense, root / name, *keys) for name, keys in FEEDS.items()}


@pytest.fixture
def distil(dense, sparse, tmp_path, monkeypatch):
    """Distil a transplant; its checkpoints. `torn`: those from step 4 on are lost first."""
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path))

    def go(feed: str, name: str, *, torn: bool = False, matrices: str = "muon", **changes: Any):
        folder = tmp_path / name / "checkpoints"
        for step in range(4, 7) if torn else ():
            shutil.rmtree(folder / f"step-{step:08d}", ignore_errors=True)
        train(recipe(dense, sparse[feed], matrices, **changes), name, resume=torn)
        return {path.name: checkpoint.load(path) for path in sorted(folder.glob("step-*"))}

    return go


def recipe(dense: Path, start: Path, matrices: str = "muon", **changes: Any):
    objective = {"kind": "kd", "teacher": str(dense), "teacher_weights": "nf4"}
    own = {"init_from": str(start), "objective": objective, "train": TRAIN | changes}
    own["optim"] = COMMON["optim"] | {"matrices": {"kind": matrices}}
    return from_dict(COMMON | own)


@pytest.mark.parametrize("feed", FEEDS)
def test_H4_frozen_tensors_stay_the_same_to_the_bit_and_have_no_optimizer_state(
    feed, distil, sparse
):
    begun = dict(load(sparse[feed])[0].named_parameters())
    saved = list(distil(feed, "run").values())
    assert len(saved) == 3
    trained = {name for name in begun if ".feed." in name}
    for each in saved:
        assert {name.partition("|")[0] for name in each.optim} == trained
        for name in begun.keys() - trained:
            assert torch.equal(each.model[name], begun[name]), name
    still = {name for name in trained if torch.equal(saved[-1].model[name], begun[name])}
    assert not still


def test_a_card_says_what_is_frozen(dense, sparse, tmp_path):
    normed = transplant(dense, tmp_path / "normed", "experts=8", "--train-norms")
    cards = [(out / "README.md").read_text(encoding="utf-8") for out in (sparse["task"], normed)]
    assert ["head of its base but for its norms" in card for card in cards] == [False, True]
    assert all("in the frozen attention, embedding and head of its base" in card for card in cards)


@pytest.mark.parametrize("matrices", ["adamw8bit", "adafactor"])
def test_H4_optimizers_that_remember_little_remember_what_trains_alone(distil, matrices):
    if matrices == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    for each in distil("task", "run", matrices=matrices).values():
        counters = ".gate.window."  # buffers, of re-birth
        trained = {name for name in each.model if ".feed." in name and counters not in name}
        assert {name.partition("|")[0] for name in each.optim} == trained


def test_H4_frozen_tensors_have_no_gradient(dense, sparse):
    lm = load(sparse["both"])[0].train()
    objective, batch = taught(load(dense)[0]), random_batch(lm, 12)
    output = objective.loss(lm, batch)
    output.total.backward()
    lm.after_backward(output.grad_probes)
    assert {n for n, p in lm.named_parameters() if p.grad is not None} == {
        name for name, _ in lm.named_parameters() if ".feed." in name
    }


@pytest.mark.parametrize(
    ("feed", "matrices"),
    [("smk", "muon"), ("topk_moe", "adamw"), ("task", "adamw8bit"), ("task", "adafactor")],
)
def test_T2_a_resumed_distillation_ends_in_the_same_bits(feed, matrices, distil):
    """With re-birth, whose rows the optimizer forgets, between the steps."""
    if matrices == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    whole = distil(feed, "whole", matrices=matrices)
    distil(feed, "torn", matrices=matrices)
    again = distil(feed, "torn", torn=True, matrices=matrices)
    assert whole.keys() == again.keys()
    for name, one in whole.items():
        for group in ("model", "optim", "objective"):
            mine, theirs = getattr(one, group), getattr(again[name], group)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine), (name, group)
        assert one.rng == again[name].rng


@pytest.mark.parametrize("feed", ["smk", "topk_moe"])
def test_H7_checkpointing_changes_no_bit(feed, distil):
    kept, again = distil(feed, "kept"), distil(feed, "again", activation_checkpointing=True)
    for name, one in kept.items():
        for key, tensor in one.model.items():
            assert torch.equal(tensor, again[name].model[key]), (name, key)


@pytest.mark.parametrize("router", ["task", "smk", "both"])
def test_H7_checkpointed_gradients_masks_and_surprises_are_the_same(router):
    torch.manual_seed(1)
    whole = LM(ModelConfig.from_dict(MODEL)).double()
    lm = build_transplant(whole, TransplantPlan({"experts": 8, "router_grad": router})).train()
    objective, batch = taught(whole), random_batch(lm, 24)
    found = []
    for lm.activation_checkpointing in (False, True):
        lm.zero_grad()
        output = objective.loss(lm, batch)
        output.total.backward()
        received = lm.after_backward(output.grad_probes)
        gradients = {n: p.grad for n, p in lm.named_parameters() if p.grad is not None}
        found.append(output.stats | received | gradients)
    assert found[0].keys() == found[1].keys()
    assert (router == "task") == (not any(name.endswith("surprise") for name in found[0]))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_what_is_frozen_is_remembered_from_checkpoint_to_final_to_the_next_run(
    distil, dense, tmp_path, capsys
):
    distil("smk", "first")
    first = tmp_path / "first"
    for place in (first / "checkpoints" / "step-00000004", first):
        assert load(place)[0].config.trainable == ("blocks.*.feed",)
    output = f"{count_parameters(load(first)[0])}"
    train(recipe(dense, first, steps=2), "second")
    assert f"frozen     {output}" in (tmp_path / "second" / "log.txt").read_text(encoding="utf-8")
    one, two = (dict(load(tmp_path / name)[0].named_parameters()) for name in ("first", "second"))
    same = {name for name in one if torch.equal(one[name], two[name])}
    assert same == {name for name in one if ".feed." not in name}
    capsys.readouterr()
    dry_run(recipe(dense, first), "third")
    assert f"frozen    {output}" in capsys.readouterr().out


def test_a_recipe_that_repeats_the_model_has_the_last_word_on_what_is_trained(
    dense, sparse, tmp_path, monkeypatch
):
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path))
    start = load(sparse["task"])[0]
    section = start.config.to_dict() | {"trainable": ["*"]}
    data = {"init_from": str(sparse["task"]), "model": section, "train": TRAIN | {"steps": 2}}
    objective = {"kind": "kd", "teacher": str(dense)}
    run = train(from_dict(COMMON | data | {"objective": objective}), "all")
    made, _ = load(run)
    assert made.config.trainable == ("*",)
    old = dict(start.named_parameters())
    assert not any(torch.equal(tensor, old[name]) for name, tensor in made.named_parameters())
    data["model"] = section | {"norm_eps": 0.1}
    with pytest.raises(UserError, match="differs from that of init_from"):
        train(from_dict(COMMON | data | {"objective": objective}), "other")


def test_T11_a_transplant_comes_nearer_to_its_teacher(distil, tmp_path):
    distil("task", "longer", steps=40)
    rows = [r for r in read_metrics(tmp_path / "longer" / "metrics.jsonl") if r["kind"] == "train"]
    assert rows[-1]["divergence"] < 0.5 * rows[0]["divergence"]


def taught(teacher: LM):
    """The objective kd, by this teacher."""
    objective = KD(teacher="nobody").build()
    objective.frozen_models = {"teacher": teacher.eval().requires_grad_(False)}
    return objective


def random_batch(lm: LM, tokens: int) -> Batch:
    ids = torch.randint(lm.config.vocab_size, (2, tokens + 1))
    positions = torch.arange(tokens).expand(2, tokens)
    everything, nowhere = torch.ones(2, tokens, dtype=torch.bool), torch.zeros_like(positions)
    return Batch(ids[:, :-1], ids[:, 1:], everything, positions, nowhere, torch.zeros(2).long())


def test_H5_a_student_that_is_its_teacher_has_no_loss_and_no_gradient():
    dense = LM(ModelConfig.from_dict(MODEL)).double()
    lm = build_transplant(dense, TransplantPlan({"experts": 8, "combine": "sum"}, "slice")).train()
    with torch.no_grad():
        for block in lm.blocks:
            block.feed.gate.thresholds.fill_(-2)
    batch = random_batch(lm, 10)
    objective = taught(dense)
    out = lm(batch.ids, batch.positions, batch.segments, logits=False)
    taught_hidden = dense(batch.ids, batch.positions, batch.segments, logits=False).hidden
    total, _ = summed_divergence(
        HeadInputs(out.hidden.flatten(0, 1), lm.head.weight),
        HeadInputs(taught_hidden.flatten(0, 1), dense.head.weight),
        batch.targets.flatten(),
        torch.ones(20, dtype=torch.float64),
        DistillWeights(beta=0.0, temperature=1.0),
    )
    total.backward()
    assert abs(float(total.detach())) < 1e-12
    gradients = [p.grad for p in lm.parameters() if p.grad is not None]
    assert len(gradients) == 2 * 5
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-12
    output = objective.loss(lm, batch)  # with the gate's own losses, which a teacher does not know
    assert float(output.metrics["divergence"].total) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("size", [1, 5, 64])
def test_H5_the_loss_in_chunks_is_the_soft_cross_entropy_less_the_teachers_entropy(
    size, monkeypatch
):
    monkeypatch.setattr(chunked_head, "MIN_CHUNK_TOKENS", size)
    monkeypatch.setattr(chunked_head, "MAX_CHUNK_LOGITS", 1)
    hidden = torch.randn(23, 6, dtype=torch.float64, requires_grad=True)
    reported, heads = torch.randn(23, 6).double(), torch.randn(2, 40, 6).double()
    total, _ = summed_divergence(
        HeadInputs(hidden, heads[0]),
        HeadInputs(reported, heads[1]),
        torch.zeros(23, dtype=torch.long),
        torch.ones(23, dtype=torch.float64),
        DistillWeights(beta=0.0, temperature=1.0),
    )
    p = (reported @ heads[1].T).softmax(-1)
    soft = -(p * (hidden @ heads[0].T).log_softmax(-1)).sum()
    entropy = -(p * p.log()).sum()
    torch.testing.assert_close(total, soft - entropy, rtol=1e-12, atol=1e-12)
    one, two = (torch.autograd.grad(each, hidden)[0] for each in (total, soft))
    torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


class Meter(TorchDispatchMode):
    """The most bytes of tensors made under it that were there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is(t)}
        out = func(*args, **(kwargs or {}))
        for tensor in filter(_is, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given | self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def gone(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


def _is(value: object) -> bool:
    return isinstance(value, torch.Tensor)


@pytest.mark.parametrize("in_chunks", [True, False])
def test_at_a_vocabulary_of_151936_no_logits_of_all_tokens_are_ever_there(in_chunks, monkeypatch):
    """Forward and backward of a distillation step; one chunk of all tokens shows that it would be
    seen.
    """
    tokens, vocabulary = 512, 151_936
    if not in_chunks:
        monkeypatch.setattr(chunked_head, "MIN_CHUNK_TOKENS", tokens)
    dense = LM(ModelConfig.from_dict(MODEL | {"vocab_size": vocabulary, "dim": 8, "depth": 1}))
    lm = build_transplant(dense, TransplantPlan({"experts": 4, "router_grad": "both"})).train()
    objective, batch = taught(dense), random_batch(lm, tokens // 2)
    with Meter() as meter:
        output = objective.loss(lm, batch)
        output.total.backward()
    logits = 4 * tokens * vocabulary
    assert lm.blocks[0].feed.experts.up_proj.weight.grad is not None
    assert (meter.most < logits) == in_chunks, meter.most / logits
