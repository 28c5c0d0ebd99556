"""T6 and T8: a full disk, and losses or gradients that are not finite."""

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch

from tinsmith.config import from_dict
from tinsmith.core.errors import Failure
from tinsmith.objectives.pretrain import CrossEntropy
from tinsmith.train import checkpoint, hooks
from tinsmith.train.guard import TooManyNonfiniteSteps
from tinsmith.train.trainer import train


@pytest.fixture
def run_here(tmp_path, monkeypatch, recipe):
    """Train in this process, under `tmp_path`."""
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path))

    def run(name: str = "run", **changes: object) -> Path:
        data = {**recipe, "train": {**recipe["train"], **changes}}
        return train(from_dict(data), name)

    return run


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_T8_a_nonfinite_step_is_skipped_counted_and_logged(where, run_here, monkeypatch):
    original = CrossEntropy.loss
    calls = {"count": 0}

    def nonfinite_loss(self, policy, batch):
        calls["count"] += 1
        loss = original(self, policy, batch)
        if calls["count"] != 6:  # the second micro-batch of step 3
            return loss
        if where == "loss":
            bad = {"loss": loss.metrics["loss"]._replace(total=torch.tensor(math.inf))}
            return loss._replace(total=loss.total * math.inf, metrics=bad)
        return loss._replace(total=loss.total * torch.tensor(math.nan).abs())

    states = {}

    def record_weights(run):
        states[run.state.step] = {k: v.clone() for k, v in run.policy.state_dict().items()}
        hooks.log(run)

    monkeypatch.setitem(hooks.HOOKS, "log", record_weights)
    monkeypatch.setattr(CrossEntropy, "loss", nonfinite_loss)
    folder = run_here(save_every=1, keep={"last": 20}, steps=4)
    before, after, later = (states[step] for step in (2, 3, 4))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], later[name]) for name in after)
    assert all(bool(torch.isfinite(value).all()) for value in later.values())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    skipped = [record for record in records if record["kind"] == "nonfinite_step"]
    assert skipped == [{"step": 3, "kind": "nonfinite_step", "first_sample": 16, "end_sample": 24}]
    assert [r["nonfinite_steps"] for r in records if r["kind"] == "train"][-1] == 1


def test_T8_too_many_nonfinite_steps_stop_the_run_and_name_the_last_good_checkpoint(
    run_here, monkeypatch
):
    original = CrossEntropy.loss
    calls = {"count": 0}

    def nonfinite_loss(self, policy, batch):
        calls["count"] += 1
        loss = original(self, policy, batch)
        return loss if calls["count"] <= 8 else loss._replace(total=loss.total * math.nan)

    monkeypatch.setattr(CrossEntropy, "loss", nonfinite_loss)
    with pytest.raises(
        TooManyNonfiniteSteps, match=r"last good checkpoint with --resume-from .*step-00000004"
    ) as caught:
        run_here(max_nonfinite_steps=2, steps=50, save_every=1, keep={"last": 2})
    assert "\n" not in str(caught.value)
    root = Path(os.environ["TINSMITH_RUNS"]) / "run" / "checkpoints"
    assert sorted(path.name for path in root.glob("step-*"))[-1] == "step-00000004"
    assert checkpoint.latest_until(root, 3).name == "step-00000003"


@pytest.mark.parametrize("at", ["model", "state", "manifest"])
def test_T6_a_full_disk_leaves_earlier_checkpoints_and_training_continues(
    at, run_here, monkeypatch, capsys
):
    calls = {"count": 0}
    real_write, real_manifest = checkpoint._write, checkpoint.write_manifest
    full = OSError(errno.ENOSPC, "No space left on device")

    def write(folder, snapshot, config, tokenizer):
        calls["count"] += 1
        if calls["count"] == 2 and at != "manifest":
            (folder / "model.safetensors").write_bytes(b"half" if at == "state" else b"")
            raise full
        real_write(folder, snapshot, config, tokenizer)

    def manifest(folder, extra):
        if calls["count"] == 2 and at == "manifest":
            raise full
        real_manifest(folder, extra)

    monkeypatch.setattr(checkpoint, "_write", write)
    monkeypatch.setattr(checkpoint, "write_manifest", manifest)
    folder = run_here(keep={"last": 20, "best": False})
    printed = capsys.readouterr().out
    assert printed.count("could not be saved") == 1
    assert "free" in printed
    names = sorted(path.name for path in (folder / "checkpoints").glob("*"))
    assert names == ["LATEST", "step-00000003", "step-00000009", "step-00000010"]
    assert checkpoint.load(folder / "checkpoints" / "step-00000003").state["step"] == 3
    assert (folder / "final" / "config.json").exists()


def test_T6_two_failed_saves_in_a_row_end_the_run_and_leave_earlier_checkpoints(
    run_here, monkeypatch
):
    calls = {"count": 0}
    original = checkpoint._write

    def write(folder, snapshot, config, tokenizer):
        calls["count"] += 1
        if calls["count"] > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(folder, snapshot, config, tokenizer)

    monkeypatch.setattr(checkpoint, "_write", write)
    with pytest.raises(Failure, match="two checkpoints in a row"):
        run_here(keep={"last": 20, "best": False})


def test_T6_too_little_free_space_is_an_error_before_writing(
    run_here, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(checkpoint, "free_space", lambda path: 1000)
    with pytest.raises(Failure):
        run_here(keep={"last": 20, "best": False})
    assert "1 kB free" in capsys.readouterr().out
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
