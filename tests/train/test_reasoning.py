"""T11 for reasoning distillation: answers come to have the form `<think>..</think>..<answer>..`."""

from pathlib import Path
from typing import Any

from tinsmith.config import from_dict
from tinsmith.data.loader.loader import open_dataset
from tinsmith.data.prepare.prepare import prepare
from tinsmith.evals.format import FormatRate, evaluate_format
from tinsmith.hub.load import load
from tinsmith.train.trainer import train

LAYER = {
    "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2},
    "feed_forward": {"kind": "swiglu", "hidden_dim": 128},
}
MODEL = {"vocab_size": 400, "dim": 64, "depth": 2, "max_seq_len": 128, "pattern": [LAYER]}
DATA = {"kind": "tasks", "tasks": ["copy"], "count": 2000, "length": 3}
ROOM = 96
HELD_BACK = 60


def run(name: str, **section: Any) -> Path:
    length = {"seq_len": ROOM, "batch_size": 16, "precision": "fp32"}
    never = {"save_every": 10_000, "eval_every": 10_000, "sample_every": 10_000}
    rates = {"matrices": {"kind": "muon", "lr": 0.02}, "others": {"kind": "adamw", "lr": 3e-3}}
    schedule = {"kind": "wsd", "warmup": 5, "decay": 0.4}
    optim = rates | {"schedule": schedule}
    train_section = {"train": {"steps": section.pop("steps")} | length | never}
    return train(from_dict(section | train_section | {"optim": optim}), name)


def rate(folder: Path, place: Path) -> FormatRate:
    """Of greedy answers to prompts that are held back."""
    lm, tokenizer = load(folder / "final")
    assert tokenizer is not None
    reported = {"init_from": str(folder), "data": DATA, "objective": {"kind": "grpo"}}
    config = from_dict(reported)
    made = prepare(config.data, tokenizer, "prompts", place, print, seq_len=ROOM)
    source = open_dataset(made.folder, "prompts", "validation", ROOM, 0)
    prompts = [source.get_prompts(number, 1)[0] for number in range(HELD_BACK)]
    return evaluate_format(lm, tokenizer, prompts, max_new_tokens=64, batch_size=HELD_BACK)


def test_T11_weighted_tags_raise_the_share_of_answers_of_the_right_form(tmp_path, monkeypatch):
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path / "runs"))
    plain = run(
        "plain",
        model=MODEL,
        tokenizer={"train": {"vocab_size": 400}},
        data=DATA | {"reasoning": False},
        objective={"kind": "sft"},
        steps=40,
    )
    before = rate(plain, tmp_path / "exam")
    taught = run(
        "taught",
        init_from=str(plain),
        data=DATA | {"answer_tags": True},
        objective={"kind": "sft", "weights": {"think": 10, "answer": 10}},
        steps=100,
    )
    after = rate(taught, tmp_path / "exam")
    assert before.num_well_formed <= 0.1 * HELD_BACK
    assert after.num_well_formed >= 0.9 * HELD_BACK
