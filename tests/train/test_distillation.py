"""T11 for distillation: the student comes nearer to its teacher, which stays as it was."""

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
    """A fine-tuned run; its folder."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINSMITH_RUNS", str(root))
        own = {"model": MODEL, "tokenizer": {"train": {"vocab_size": 320}}}
        length = {"steps": 60, "eval_every": 60}
        recipe = COMMON | own | {"objective": {"kind": "sft"}, "train": TRAIN | length}
        yield train(from_dict(recipe), "teacher")


def rows(folder: Path, kind: str) -> list[dict]:
    return [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == kind]


def distilled(teacher: Path, name: str, **objective: object) -> Path:
    """A student of one layer, half as wide, after 60 steps."""
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
def test_T11_divergence_from_the_teacher_goes_down(loss, teacher):
    folder = distilled(teacher, loss, kind="kd", loss=loss, teacher_weights="int8")
    found = [row["divergence"] for row in rows(folder, "train")]
    assert found[-1] < 0.6 * found[0]
    assert rows(folder, "eval")[-1]["loss"] < rows(folder, "eval")[0]["loss"]


def test_T11_divergence_at_own_answers_goes_down(teacher):
    keys = {"max_new_tokens": 16, "on_policy_fraction": {"begin": 0, "end": 1, "over": 40}}
    folder = distilled(teacher, "own", kind="on_policy_kd", **keys)
    output = [row["on_policy_fraction"] for row in rows(folder, "train")]
    found = [row["divergence"] for row in rows(folder, "eval")]
    assert output[0] < 0.5
    assert output[-1] == 1
    assert found[-1] < 0.7 * found[0]
