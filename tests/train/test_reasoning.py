"""T11 for reasoning SFT: weighted tags teach completions `<think>..</think>..<answer>..`."""

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
SEQ_LEN = 96
NUM_HELD_OUT = 60


def run(name: str, **section: Any) -> Path:
    length = {"seq_len": SEQ_LEN, "batch_size": 16, "precision": "fp32"}
    never = {"save_every": 10_000, "eval_every": 10_000, "sample_every": 10_000}
    rates = {"matrices": {"kind": "muon", "lr": 0.02}, "others": {"kind": "adamw", "lr": 3e-3}}
    schedule = {"kind": "wsd", "warmup": 5, "decay": 0.4}
    optim = rates | {"schedule": schedule}
    train_section = {"train": {"steps": section.pop("steps")} | length | never}
    return train(from_dict(section | train_section | {"optim": optim}), name)


def format_rate(folder: Path, cache: Path) -> FormatRate:
    """Return the share of well-formed greedy completions of held-out prompts."""
    lm, tokenizer = load(folder / "final")
    assert tokenizer is not None
    recipe = {"init_from": str(folder), "data": DATA, "objective": {"kind": "grpo"}}
    config = from_dict(recipe)
    prepared = prepare(config.data, tokenizer, "prompts", cache, print, seq_len=SEQ_LEN)
    source = open_dataset(prepared.folder, "prompts", "validation", SEQ_LEN, 0)
    prompts = [source.get_prompts(index, 1)[0] for index in range(NUM_HELD_OUT)]
    return evaluate_format(lm, tokenizer, prompts, max_new_tokens=64, batch_size=NUM_HELD_OUT)


def test_T11_weighted_tags_raise_the_share_of_well_formed_completions(tmp_path, monkeypatch):
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path / "runs"))
    plain = run(
        "plain",
        model=MODEL,
        tokenizer={"train": {"vocab_size": 400}},
        data=DATA | {"reasoning": False},
        objective={"kind": "sft"},
        steps=40,
    )
    before = format_rate(plain, tmp_path / "eval")
    tagged = run(
        "tagged",
        init_from=str(plain),
        data=DATA | {"answer_tags": True},
        objective={"kind": "sft", "weights": {"think": 10, "answer": 10}},
        steps=100,
    )
    after = format_rate(tagged, tmp_path / "eval")
    assert before.num_well_formed <= 0.1 * NUM_HELD_OUT
    assert after.num_well_formed >= 0.9 * NUM_HELD_OUT
