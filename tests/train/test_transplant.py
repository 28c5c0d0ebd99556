"""H4, H5 and H7: distillation of a transplanted model trains its experts and nothing else."""

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


def transplant(source: Path, out: Path, *overrides: str) -> Path:
    """Run `tinsmith transplant` and return the folder `out`."""
    arguments = ["transplant", str(source), str(out), *overrides]
    typer.main.get_command(app).main(arguments, standalone_mode=False)
    return out


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Folder of a trained dense model, the teacher and the base of the transplants."""
    root = tmp_path_factory.mktemp("dense")
    own = {"model": MODEL, "tokenizer": {"train": {"vocab_size": 320}}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINSMITH_RUNS", str(root))
        return train(
            from_dict(COMMON | own | {"objective": {"kind": "sft"}, "train": TRAIN}), "run"
        )


@pytest.fixture(scope="module")
def sparse(dense, tmp_path_factory):
    """Folders of transplants of the dense model, by the names of FEEDS."""
    root = tmp_path_factory.mktemp("sparse")
    return {name: transplant(dense, root / name, *keys) for name, keys in FEEDS.items()}


@pytest.fixture
def distil(dense, sparse, tmp_path, monkeypatch):
    """Distil a transplant and return its checkpoints. With `torn`, delete the checkpoints from
    step 4 on first and resume.
    """
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path))

    def train_and_load(
        feed: str, name: str, *, torn: bool = False, matrices: str = "muon", **changes: Any
    ):
        folder = tmp_path / name / "checkpoints"
        for step in range(4, 7) if torn else ():
            shutil.rmtree(folder / f"step-{step:08d}", ignore_errors=True)
        train(recipe(dense, sparse[feed], matrices, **changes), name, resume=torn)
        return {path.name: checkpoint.load(path) for path in sorted(folder.glob("step-*"))}

    return train_and_load


def recipe(dense: Path, start: Path, matrices: str = "muon", **changes: Any):
    objective = {"kind": "kd", "teacher": str(dense), "teacher_weights": "nf4"}
    own = {"init_from": str(start), "objective": objective, "train": TRAIN | changes}
    own["optim"] = COMMON["optim"] | {"matrices": {"kind": matrices}}
    return from_dict(COMMON | own)


@pytest.mark.parametrize("feed", FEEDS)
def test_H4_frozen_tensors_stay_the_same_to_the_bit_and_have_no_optimizer_state(
    feed, distil, sparse
):
    start = dict(load(sparse[feed])[0].named_parameters())
    checkpoints = list(distil(feed, "run").values())
    assert len(checkpoints) == 3
    trained = {name for name in start if ".feed." in name}
    for saved_step in checkpoints:
        assert {name.partition("|")[0] for name in saved_step.optim} == trained
        for name in start.keys() - trained:
            assert torch.equal(saved_step.model[name], start[name]), name
    unchanged = {name for name in trained if torch.equal(checkpoints[-1].model[name], start[name])}
    assert not unchanged


def test_the_model_card_names_frozen_parts(dense, sparse, tmp_path):
    normed = transplant(dense, tmp_path / "normed", "experts=8", "--train-norms")
    cards = [(out / "README.md").read_text(encoding="utf-8") for out in (sparse["task"], normed)]
    assert ["head of its base, except for its norms" in card for card in cards] == [False, True]
    assert all("in the frozen attention, embedding and head of its base" in card for card in cards)


@pytest.mark.parametrize("matrices", ["adamw8bit", "adafactor"])
def test_H4_low_memory_optimizers_keep_state_of_trainable_tensors_only(distil, matrices):
    if matrices == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    for saved in distil("task", "run", matrices=matrices).values():
        counters = ".gate.window."  # buffers that count the use of experts
        trained = {name for name in saved.model if ".feed." in name and counters not in name}
        assert {name.partition("|")[0] for name in saved.optim} == trained


def test_H4_frozen_tensors_have_no_gradient(dense, sparse):
    lm = load(sparse["both"])[0].train()
    objective, batch = kd_objective(load(dense)[0]), random_batch(lm, 12)
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
    """With resets of dead experts, which clear rows of the optimizer state, between the steps."""
    if matrices == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    whole = distil(feed, "whole", matrices=matrices)
    distil(feed, "torn", matrices=matrices)
    resumed = distil(feed, "torn", torn=True, matrices=matrices)
    assert whole.keys() == resumed.keys()
    for name, saved in whole.items():
        for group in ("model", "optim", "objective"):
            expected, found = getattr(saved, group), getattr(resumed[name], group)
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[key], found[key]) for key in expected), (name, group)
        assert saved.rng == resumed[name].rng


@pytest.mark.parametrize("feed", ["smk", "topk_moe"])
def test_H7_activation_checkpointing_changes_no_bit(feed, distil):
    stored = distil(feed, "stored")
    recomputed = distil(feed, "recomputed", activation_checkpointing=True)
    for name, saved in stored.items():
        for key, tensor in saved.model.items():
            assert torch.equal(tensor, recomputed[name].model[key]), (name, key)


@pytest.mark.parametrize("router", ["task", "smk", "both"])
def test_H7_activation_checkpointing_gives_the_same_gradients_and_router_statistics(router):
    torch.manual_seed(1)
    dense = LM(ModelConfig.from_dict(MODEL)).double()
    lm = build_transplant(dense, TransplantPlan({"experts": 8, "router_grad": router})).train()
    objective, batch = kd_objective(dense), random_batch(lm, 24)
    results = []
    for lm.activation_checkpointing in (False, True):
        lm.zero_grad()
        output = objective.loss(lm, batch)
        output.total.backward()
        probe_stats = lm.after_backward(output.grad_probes)
        gradients = {n: p.grad for n, p in lm.named_parameters() if p.grad is not None}
        results.append(output.stats | probe_stats | gradients)
    assert results[0].keys() == results[1].keys()
    assert (router == "task") == (not any(name.endswith("surprise") for name in results[0]))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_trainable_patterns_are_kept_in_checkpoints_in_final_and_in_the_next_run(
    distil, dense, tmp_path, capsys
):
    distil("smk", "first")
    first = tmp_path / "first"
    for path in (first / "checkpoints" / "step-00000004", first):
        assert load(path)[0].config.trainable == ("blocks.*.feed",)
    counts = f"{count_parameters(load(first)[0])}"
    train(recipe(dense, first, steps=2), "second")
    assert f"frozen     {counts}" in (tmp_path / "second" / "log.txt").read_text(encoding="utf-8")
    one, two = (dict(load(tmp_path / name)[0].named_parameters()) for name in ("first", "second"))
    same = {name for name in one if torch.equal(one[name], two[name])}
    assert same == {name for name in one if ".feed." not in name}
    capsys.readouterr()
    dry_run(recipe(dense, first), "third")
    assert f"frozen    {counts}" in capsys.readouterr().out


def test_a_model_section_overrides_trainable_of_init_from(dense, sparse, tmp_path, monkeypatch):
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path))
    start = load(sparse["task"])[0]
    section = start.config.to_dict() | {"trainable": ["*"]}
    data = {"init_from": str(sparse["task"]), "model": section, "train": TRAIN | {"steps": 2}}
    objective = {"kind": "kd", "teacher": str(dense)}
    run = train(from_dict(COMMON | data | {"objective": objective}), "all")
    trained, _ = load(run)
    assert trained.config.trainable == ("*",)
    before = dict(start.named_parameters())
    assert not any(torch.equal(tensor, before[name]) for name, tensor in trained.named_parameters())
    data["model"] = section | {"norm_eps": 0.1}
    with pytest.raises(UserError, match="differs from that of init_from"):
        train(from_dict(COMMON | data | {"objective": objective}), "other")


def test_T11_the_divergence_of_a_transplant_from_its_teacher_falls(distil, tmp_path):
    distil("task", "longer", steps=40)
    metrics = read_metrics(tmp_path / "longer" / "metrics.jsonl")
    divergence = [record["divergence"] for record in metrics if record["kind"] == "train"]
    assert divergence[-1] < 0.5 * divergence[0]


def kd_objective(teacher: LM):
    """Return the objective `kd` with this teacher."""
    objective = KD(teacher="unused").build()
    objective.frozen_models = {"teacher": teacher.eval().requires_grad_(False)}
    return objective


def random_batch(lm: LM, tokens: int) -> Batch:
    ids = torch.randint(lm.config.vocab_size, (2, tokens + 1))
    positions = torch.arange(tokens).expand(2, tokens)
    loss_mask, segments = torch.ones(2, tokens, dtype=torch.bool), torch.zeros_like(positions)
    return Batch(ids[:, :-1], ids[:, 1:], loss_mask, positions, segments, torch.zeros(2).long())


def test_H5_a_student_equal_to_its_teacher_has_zero_loss_and_gradient():
    dense = LM(ModelConfig.from_dict(MODEL)).double()
    lm = build_transplant(dense, TransplantPlan({"experts": 8, "combine": "sum"}, "slice")).train()
    with torch.no_grad():
        for block in lm.blocks:
            block.feed.gate.thresholds.fill_(-2)
    batch = random_batch(lm, 10)
    objective = kd_objective(dense)
    out = lm(batch.ids, batch.positions, batch.segments, logits=False)
    teacher_hidden = dense(batch.ids, batch.positions, batch.segments, logits=False).hidden
    total, _ = summed_divergence(
        HeadInputs(out.hidden.flatten(0, 1), lm.head.weight),
        HeadInputs(teacher_hidden.flatten(0, 1), dense.head.weight),
        batch.targets.flatten(),
        torch.ones(20, dtype=torch.float64),
        DistillWeights(beta=0.0, temperature=1.0),
    )
    total.backward()
    assert abs(float(total.detach())) < 1e-12
    gradients = [p.grad for p in lm.parameters() if p.grad is not None]
    assert len(gradients) == 2 * 5
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-12
    output = objective.loss(
        lm, batch
    )  # also the router's own losses, which the divergence does not contain
    assert float(output.metrics["divergence"].total) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("size", [1, 5, 64])
def test_H5_the_chunked_loss_is_soft_cross_entropy_minus_the_teachers_entropy(size, monkeypatch):
    monkeypatch.setattr(chunked_head, "MIN_CHUNK_TOKENS", size)
    monkeypatch.setattr(chunked_head, "MAX_CHUNK_LOGITS", 1)
    hidden = torch.randn(23, 6, dtype=torch.float64, requires_grad=True)
    teacher_hidden, heads = torch.randn(23, 6).double(), torch.randn(2, 40, 6).double()
    total, _ = summed_divergence(
        HeadInputs(hidden, heads[0]),
        HeadInputs(teacher_hidden, heads[1]),
        torch.zeros(23, dtype=torch.long),
        torch.ones(23, dtype=torch.float64),
        DistillWeights(beta=0.0, temperature=1.0),
    )
    p = (teacher_hidden @ heads[1].T).softmax(-1)
    soft = -(p * (hidden @ heads[0].T).log_softmax(-1)).sum()
    entropy = -(p * p.log()).sum()
    torch.testing.assert_close(total, soft - entropy, rtol=1e-12, atol=1e-12)
    one, two = (torch.autograd.grad(each, hidden)[0] for each in (total, soft))
    torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


class PeakMemory(TorchDispatchMode):
    """Measures the peak bytes of tensors created under this mode, in `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        out = func(*args, **(kwargs or {}))
        for tensor in filter(_is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given | self.known:
                self.known.add(storage._cdata)
                self.current += storage.nbytes()
                weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.current)
        return out

    def release(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.current -= size


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


@pytest.mark.parametrize("chunked", [True, False])
def test_with_a_vocabulary_of_151936_the_logits_of_all_tokens_are_never_in_memory(
    chunked, monkeypatch
):
    """Forward and backward of a distillation step. With one chunk of all tokens the measured peak
    is above the size of all logits, so the measurement would show them.
    """
    tokens, vocabulary = 512, 151_936
    if not chunked:
        monkeypatch.setattr(chunked_head, "MIN_CHUNK_TOKENS", tokens)
    dense = LM(ModelConfig.from_dict(MODEL | {"vocab_size": vocabulary, "dim": 8, "depth": 1}))
    lm = build_transplant(dense, TransplantPlan({"experts": 4, "router_grad": "both"})).train()
    objective, batch = kd_objective(dense), random_batch(lm, tokens // 2)
    with PeakMemory() as memory:
        output = objective.loss(lm, batch)
        output.total.backward()
    logits = 4 * tokens * vocabulary
    assert lm.blocks[0].feed.experts.up_proj.weight.grad is not None
    assert (memory.peak < logits) == chunked, memory.peak / logits
