"""Expert statistics of a run: means of known sums, the picture, resume."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from tinsmith import load
from tinsmith.config import from_dict
from tinsmith.core.log import read_metrics
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.train.expert_stats import ExpertStats, format_line
from tinsmith.train.plots.experts import draw_experts
from tinsmith.train.plots.history import History
from tinsmith.train.report import plot_run
from tinsmith.train.trainer import train
from tinsmith.verbs.evaluate import EvalOptions, evaluate

HEADS = {"kind": "dyn_heads", "heads": 4, "experts": 3}
FEEDS = {
    "deepseek_moe": {"kind": "deepseek_moe", "experts": 4, "top_k": 2, "hidden_dim": 12},
    "dyn_moe": {"kind": "dyn_moe", "experts": 4, "hidden_dim": 12, "router_grad": "both"},
}


def section(feed, mixer=HEADS):
    sizes = {"vocab_size": 320, "dim": 32, "depth": 2, "max_seq_len": 64}
    return sizes | {"pattern": [{"mixer": mixer, "feed_forward": feed}]}


@pytest.fixture
def lm():
    torch.manual_seed(0)
    lm = LM(ModelConfig.from_dict(section(FEEDS["deepseek_moe"])))
    with torch.no_grad():
        lm.blocks[0].mixer.gate.thresholds.copy_(torch.tensor([0.1, -0.2, 0.0]))
    return lm


def layer_sums(load, tokens, **more):
    """Return the sums that a layer reports for one forward pass."""
    sums = {"load": torch.tensor(load), "tokens": torch.tensor(tokens)}
    return sums | {name: torch.tensor(value) for name, value in more.items()}


def stats(**layers):
    """Return the statistics of a model; the argument `0_mixer` is layer `0.mixer`."""
    return {
        f"{layer.replace('_', '.')}.{name}": value
        for layer, sums in layers.items()
        for name, value in sums.items()
    }


def test_means_are_total_sums_over_total_tokens(lm):
    meter = ExpertStats()
    meter.add(stats(**{"0_mixer": layer_sums([6, 0, 0], 8, entropy=4.0, fallback=2)}))
    meter.add(stats(**{"0_mixer": layer_sums([0, 26, 0], 24, entropy=0.0, fallback=0)}))
    meter.add(stats(**{"1_feed": layer_sums([1, 1, 1, 1], 2, balance=3.0)}))
    metrics = meter.pop_metrics(lm)
    mixer, feed = metrics["layers"]["0.mixer"], metrics["layers"]["1.feed"]
    assert mixer["load"] == [6 / 32, 26 / 32, 0]
    assert (mixer["active"], mixer["dead"]) == (1.0, 1)
    assert mixer["max_load_ratio"] == pytest.approx(26 / (32 / 3), rel=1e-4)
    assert (mixer["entropy"], mixer["fallback"]) == (4 / 32, 2 / 32)
    assert mixer["thresholds"] == [0.1, -0.2, 0.0]
    assert mixer["drift"] == pytest.approx(0.1)
    assert feed["load"] == [0.5] * 4
    assert (feed["active"], feed["balance"], feed["bias"]) == (2.0, 1.5, [0.0] * 4)
    assert (metrics["experts"], metrics["dead"], metrics["max_load_ratio"]) == (
        7,
        1,
        mixer["max_load_ratio"],
    )
    assert (metrics["active"], metrics["entropy"]) == (1.5, 4 / 32)
    assert meter.pop_metrics(lm) == {}
    assert format_line(metrics).startswith("active 1.50  dead 1/7  peak 2.4  entropy 0.12")
    assert "fallback 6.2 %" in format_line(metrics)
    assert len(format_line(metrics)) < 80


def test_surprise_is_averaged_over_pairs_and_not_over_tokens(lm):
    meter = ExpertStats()
    sums = layer_sums(
        [4, 4, 0],
        8,
        surprise=3.0,
        pairs=6,
        inactive_fraction=1,
        compared=4,
        surprise_norm_corr=-2.0,
    )
    meter.add(stats(**{"0_mixer": sums | {"unrouted": torch.ones(32)}}))
    layer = meter.pop_metrics(lm)["layers"]["0.mixer"]
    assert (layer["surprise"], layer["inactive_fraction"], layer["surprise_norm_corr"]) == (
        0.5,
        0.25,
        -0.5,
    )
    assert not {"pairs", "compared", "unrouted", "tokens"} & layer.keys()
    json.dumps(layer)


def test_no_tokens_give_no_metrics_and_no_pairs_give_no_surprise(lm):
    meter = ExpertStats()
    assert meter.pop_metrics(lm) == {}
    meter.add(stats(**{"0_mixer": layer_sums([0, 0, 0], 0)}))
    assert meter.pop_metrics(lm) == {}
    meter.add(stats(**{"0_mixer": layer_sums([0, 0, 0], 5, surprise=0.0, pairs=0)}))
    layer = meter.pop_metrics(lm)["layers"]["0.mixer"]
    assert (layer["dead"], layer["active"], layer["max_load_ratio"]) == (3, 0, 0)
    assert "surprise" not in layer


def test_sums_survive_a_checkpoint_to_the_bit(lm):
    meter, other = ExpertStats(), ExpertStats()
    meter.add(stats(**{"0_mixer": layer_sums([1, 2, 0], 7, entropy=1 / 3)}))
    other.load_state(json.loads(json.dumps(meter.state())), torch.device("cpu"))
    for each in (meter, other):
        each.add(stats(**{"0_mixer": layer_sums([1, 1, 1], 7, entropy=0.1)}))
    assert meter.pop_metrics(lm) == other.pop_metrics(lm)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train a small model with experts in mixer and feed-forward and return the run's folder."""
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path))

    def train_model(feed, name="run", resume=False, **changes):
        data = {"kind": "tasks", "count": 300, "digits": 2, "length": 4}
        recipe = {
            "model": section(FEEDS[feed]),
            "tokenizer": {"train": {"vocab_size": 320}},
            "data": [data | {"tasks": [task]} for task in ("arithmetic", "sort")],
            "objective": {"kind": "pretrain"},
            "train": {
                **{
                    "steps": 7,
                    "seq_len": 48,
                    "batch_size": 4,
                    "grad_accum_steps": 2,
                    "precision": "fp32",
                },
                **{"save_every": 2, "eval_every": 7, "sample_every": 7},
            }
            | changes,
            "eval": {"max_samples": 8, "max_new_tokens": 4},
            "log": {"every": 3},
        }
        return train(from_dict(recipe), name, resume=resume)

    return train_model


def of_kind(folder, kind):
    return [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == kind]


@pytest.mark.parametrize("feed", FEEDS)
def test_T2_a_resumed_run_logs_the_same_expert_statistics(feed, run, capsys):
    whole = run(feed, "whole")
    torn = run(feed, "torn")
    shutil.rmtree(torn / "checkpoints" / "step-00000007")
    shutil.rmtree(torn / "checkpoints" / "step-00000006")
    run(feed, "torn", resume=True)
    for kind in ("routing", "specialisation"):
        assert of_kind(torn, kind) == of_kind(whole, kind) != []
    records = of_kind(whole, "routing")
    assert [record["step"] for record in records] == [3, 6, 7]
    for record in records:
        assert set(record["layers"]) == {"0.mixer", "0.feed", "1.mixer", "1.feed"}
        for name, layer in record["layers"].items():
            assert len(layer["load"]) == (3 if name.endswith("mixer") else 4)
            assert sum(layer["load"]) == pytest.approx(layer["active"], rel=1e-3)
            assert ("surprise" in layer) == (feed == "dyn_moe" and name.endswith("feed"))
    (specialisation,) = of_kind(whole, "specialisation")
    assert set(specialisation["layers"]) == {"0.mixer", "0.feed", "1.mixer", "1.feed", "all"}
    assert 0 <= specialisation["layers"]["all"]["normalized_mi"] <= 1
    assert 0 <= specialisation["layers"]["all"]["jaccard"] <= 1
    for path in (whole, whole / "checkpoints" / "step-00000007"):
        lm, _ = load(path, dtype="bfloat16")
        gate = lm.get_submodule("blocks.0.mixer.gate")
        assert not gate.window.load.is_meta
        assert int(gate.window.tokens) == 0, "a loaded model starts a new usage window"
    output = capsys.readouterr().out
    evaluate(str(whole), "routing", EvalOptions(None, None, 8), "cpu", None, True)
    again = json.loads(capsys.readouterr().out)
    for name, layer in specialisation["layers"].items():
        assert again[f"routing {name}"] == pytest.approx(layer)
    assert " experts active" in output
    assert " experts carry" in output
    assert (whole / "experts.png").stat().st_size > 10_000
    assert (whole / "final" / "experts.png").exists()


def test_micro_batches_give_the_same_expert_load(run):
    records = [
        of_kind(
            run("deepseek_moe", f"r{size}", batch_size=size, grad_accum_steps=8 // size), "routing"
        )[0]
        for size in (8, 2)
    ]
    for name, layer in records[0]["layers"].items():
        other = records[1]["layers"][name]
        for key in ("active", "entropy"):
            assert layer[key] == pytest.approx(other[key], rel=1e-3), (name, key)
        assert layer["load"] == pytest.approx(other["load"], abs=0.02)


def routing_records(layers, steps=(10, 20, 30)):
    def load(layer, step):
        rng = np.random.default_rng(hash((layer, step)) % 2**32)
        shares = rng.dirichlet(np.ones(8))
        return [0.0 if e == 5 and step > 10 else float(s) for e, s in enumerate(shares)]

    totals = {
        "experts": 8 * layers,
        "dead": layers,
        "active": 1.0,
        "max_load_ratio": 2.0,
        "entropy": 1.5,
    }
    return [
        {"step": step, "kind": "routing"}
        | totals
        | {"layers": {f"{i}.feed": {"load": load(i, step)} for i in range(layers)}}
        for step in steps
    ]


def test_the_heat_map_shows_each_load_relative_to_uniform():
    records = routing_records(2)
    figure = draw_experts(History("a run", records))
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    for name in ("0.feed", "1.feed"):
        (mesh,) = panels[name].collections
        drawn = mesh.get_array().reshape(8, 3)
        loads = np.array([record["layers"][name]["load"] for record in records])
        even = loads.mean(1, keepdims=True)
        for e, t in np.ndindex(8, 3):
            if loads[t, e] == 0:
                assert drawn.mask[e, t], "masked, drawn in red: no token"
            else:
                expected = np.clip(math.log2(loads[t, e] / even[t, 0]), -3, 3)
                assert drawn[e, t] == pytest.approx(expected)
        assert drawn.mask.sum() == 2
    curve = panels["Experts per token"].lines[0]
    assert curve.get_xydata().tolist() == [[10, 1.0], [20, 1.0], [30, 1.0]]


def test_drift_and_surprise_are_drawn_if_they_are_logged():
    records = routing_records(2)
    titles = {axes.get_title(loc="left") for axes in draw_experts(History("a run", records)).axes}
    assert not titles & {"Surprise", "Drift of the gates", "Tokens in the dark room"}
    values = {"drift": 0.2, "surprise": 0.5, "inactive_fraction": 0.25}
    figure = draw_experts(History("a run", [record | values for record in records]))
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    drawn = ("Drift of the gates", "Surprise", "Tokens in the dark room")
    for title, value in zip(drawn, values.values(), strict=True):
        assert panels[title].lines[0].get_ydata().tolist() == [value] * 3


@pytest.mark.parametrize(("layers", "steps"), [(1, (5,)), (3, (5, 10)), (14, (5, 10, 15))])
@pytest.mark.filterwarnings("error")
def test_any_number_of_layers_is_drawn_and_equal_metrics_give_identical_files(
    tmp_path, layers, steps
):
    files = []
    for name in ("a", "b"):
        folder = tmp_path / name / "run"
        folder.mkdir(parents=True)
        lines = "".join(json.dumps(line) + "\n" for line in routing_records(layers, steps))
        (folder / "metrics.jsonl").write_text(lines)
        plot_run(folder)
        files.append([(folder / f"experts.{kind}").read_bytes() for kind in ("png", "svg")])
    assert files[0] == files[1]


def test_a_run_without_experts_has_no_experts_png(tmp_path):
    plot_run(tmp_path)
    assert not (tmp_path / "experts.png").exists()
