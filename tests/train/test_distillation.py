"""T11 for distillation: the divergence from the teacher falls; the teacher does not change."""

import hashlib
from pathlib import Path

import pytest

from tinsmith.config import from_dict
from tinsmith.core.log import read_metrics
from tinsmith.train.trainer import train

LAYER = {
    "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2},
    "feed_forward": {"kind": "swiglu", "hidden_dim": 96},
}
MODEL = {"vocab_size": 320, "dim": 48, "depth": 2, "max_seq_len": 128, "pattern": [LAYER]}
COMMON = {
    "data": {"kind": "tasks", "tasks": ["copy"], "count": 300, "length": 4},
    "optim": {"schedule": {"kind": "wsd", "warmup": 4}},
    "eval": {"max_samples": 16, "max_new_tokens": 4},
}
TRAIN = {
    "seq_len": 96,
    "batch_size": 8,
    "precision": "fp32",
    "save_every": 500,
    "sample_every": 500,
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Folder of a fine-tuned run."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINSMITH_RUNS", str(root))
        own = {"model": MODEL, "tokenizer": {"train": {"vocab_size": 320}}}
        length = {"steps": 60, "eval_every": 60}
        recipe = COMMON | own | {"objective": {"kind": "sft"}, "train": TRAIN | length}
        yield train(from_dict(recipe), "teacher")


def records(folder: Path, kind: str) -> list[dict]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == kind]


def distill(teacher: Path, name: str, **objective: object) -> Path:
    """Train a narrower student of one layer for 60 steps and return the run's folder."""
    weights = teacher / "final" / "model.safetensors"
    before = hashlib.sha256(weights.read_bytes()).hexdigest()
    recipe = COMMON | {
        "model": MODEL | {"dim": 32, "depth": 1},
        "tokenizer": {"path": str(teacher / "final")},
        "objective": {"teacher": str(teacher), **objective},
        "train": TRAIN | {"steps": 60, "eval_every": 20},
        "log": {"every": 10},
    }
    folder = train(from_dict(recipe), name)
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == before
    return folder


@pytest.mark.parametrize("loss", ["forward", "reverse", "jsd"])
def test_T11_divergence_from_the_teacher_falls(loss, teacher):
    folder = distill(teacher, loss, kind="kd", loss=loss, teacher_weights="int8")
    divergence = [record["divergence"] for record in records(folder, "train")]
    assert divergence[-1] < 0.6 * divergence[0]
    assert records(folder, "eval")[-1]["loss"] < records(folder, "eval")[0]["loss"]


def test_T11_divergence_on_the_students_own_completions_falls(teacher):
    keys = {"max_new_tokens": 16, "on_policy_fraction": {"begin": 0, "end": 1, "over": 40}}
    folder = distill(teacher, "own", kind="on_policy_kd", **keys)
    fraction = [record["on_policy_fraction"] for record in records(folder, "train")]
    divergence = [record["divergence"] for record in records(folder, "eval")]
    assert fraction[0] < 0.5
    assert fraction[-1] == 1
    assert divergence[-1] < 0.7 * divergence[0]
