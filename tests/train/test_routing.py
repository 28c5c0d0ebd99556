"""What a run says of its experts: sums with planted values, the picture, resumes."""

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


def planted(load, tokens, **more):
    reported = {"load": torch.tensor(load), "tokens": torch.tensor(tokens)}
    return reported | {name: torch.tensor(value) for name, value in more.items()}


def stats(**layers):
    return {
        f"{place.replace('_', '.')}.{name}": value
        for place, layer in layers.items()
        for name, value in layer.items()
    }


def test_means_are_formed_once_of_all_sums(lm):
    meter = ExpertStats()
    meter.add(stats(**{"0_mixer": planted([6, 0, 0], 8, entropy=4.0, fallback=2)}))
    meter.add(stats(**{"0_mixer": planted([0, 26, 0], 24, entropy=0.0, fallback=0)}))
    meter.add(stats(**{"1_feed": planted([1, 1, 1, 1], 2, balance=3.0)}))
    found = meter.pop_metrics(lm)
    mixer, feed = found["layers"]["0.mixer"], found["layers"]["1.feed"]
    assert mixer["load"] == [6 / 32, 26 / 32, 0]
    assert (mixer["active"], mixer["dead"]) == (1.0, 1)
    assert mixer["max_load_ratio"] == pytest.approx(26 / (32 / 3), rel=1e-4)
    assert (mixer["entropy"], mixer["fallback"]) == (4 / 32, 2 / 32)
    assert mixer["thresholds"] == [0.1, -0.2, 0.0]
    assert mixer["drift"] == pytest.approx(0.1)
    assert feed["load"] == [0.5] * 4
    assert (feed["active"], feed["balance"], feed["bias"]) == (2.0, 1.5, [0.0] * 4)
    assert (found["experts"], found["dead"], found["max_load_ratio"]) == (
        7,
        1,
        mixer["max_load_ratio"],
    )
    assert (found["active"], found["entropy"]) == (1.5, 4 / 32)
    assert meter.pop_metrics(lm) == {}
    assert format_line(found).startswith("active 1.50  dead 1/7  peak 2.4  entropy 0.12")
    assert "fallback 6.2 %" in format_line(found)
    assert len(format_line(found)) < 80


def test_surprise_is_over_what_it_was_counted_for(lm):
    meter = ExpertStats()
    output = planted(
        [4, 4, 0],
        8,
        surprise=3.0,
        pairs=6,
        inactive_fraction=1,
        compared=4,
        surprise_norm_corr=-2.0,
    )
    meter.add(stats(**{"0_mixer": output | {"unrouted": torch.ones(32)}}))
    layer = meter.pop_metrics(lm)["layers"]["0.mixer"]
    assert (layer["surprise"], layer["inactive_fraction"], layer["surprise_norm_corr"]) == (
        0.5,
        0.25,
        -0.5,
    )
    assert not {"pairs", "compared", "unrouted", "tokens"} & layer.keys()
    json.dumps(layer)


def test_nothing_is_reported_of_nothing(lm):
    meter = ExpertStats()
    assert meter.pop_metrics(lm) == {}
    meter.add(stats(**{"0_mixer": planted([0, 0, 0], 0)}))
    assert meter.pop_metrics(lm) == {}
    meter.add(stats(**{"0_mixer": planted([0, 0, 0], 5, surprise=0.0, pairs=0)}))
    layer = meter.pop_metrics(lm)["layers"]["0.mixer"]
    assert (layer["dead"], layer["active"], layer["max_load_ratio"]) == (3, 0, 0)
    assert "surprise" not in layer


def test_sums_survive_a_checkpoint_to_the_bit(lm):
    meter, other = ExpertStats(), ExpertStats()
    meter.add(stats(**{"0_mixer": planted([1, 2, 0], 7, entropy=1 / 3)}))
    other.load_state(json.loads(json.dumps(meter.state())), torch.device("cpu"))
    for each in (meter, other):
        each.add(stats(**{"0_mixer": planted([1, 1, 1], 7, entropy=0.1)}))
    assert meter.pop_metrics(lm) == other.pop_metrics(lm)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train a small model with experts in both slots; the run's folder."""
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path))

    def go(feed, name="run", resume=False, **changes):
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

    return go


def of_kind(folder, kind):
    return [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == kind]


@pytest.mark.parametrize("feed", FEEDS)
def test_T2_a_resumed_run_says_the_same_of_its_experts(feed, run, capsys):
    whole = run(feed, "whole")
    torn = run(feed, "torn")
    shutil.rmtree(torn / "checkpoints" / "step-00000007")
    shutil.rmtree(torn / "checkpoints" / "step-00000006")
    run(feed, "torn", resume=True)
    for kind in ("routing", "specialisation"):
        assert of_kind(torn, kind) == of_kind(whole, kind) != []
    lines = of_kind(whole, "routing")
    assert [line["step"] for line in lines] == [3, 6, 7]
    for line in lines:
        assert set(line["layers"]) == {"0.mixer", "0.feed", "1.mixer", "1.feed"}
        for name, layer in line["layers"].items():
            assert len(layer["load"]) == (3 if name.endswith("mixer") else 4)
            assert sum(layer["load"]) == pytest.approx(layer["active"], rel=1e-3)
            assert ("surprise" in layer) == (feed == "dyn_moe" and name.endswith("feed"))
    (found,) = of_kind(whole, "specialisation")
    assert set(found["layers"]) == {"0.mixer", "0.feed", "1.mixer", "1.feed", "all"}
    assert 0 <= found["layers"]["all"]["normalized_mi"] <= 1
    assert 0 <= found["layers"]["all"]["jaccard"] <= 1
    for place in (whole, whole / "checkpoints" / "step-00000007"):
        lm, _ = load(place, dtype="bfloat16")
        gate = lm.get_submodule("blocks.0.mixer.gate")
        assert not gate.window.load.is_meta
        assert int(gate.window.tokens) == 0, "a model of its own, not in the middle of a window"
    output = capsys.readouterr().out
    evaluate(str(whole), "routing", EvalOptions(None, None, 8), "cpu", None, True)
    again = json.loads(capsys.readouterr().out)
    for name, layer in found["layers"].items():
        assert again[f"routing {name}"] == pytest.approx(layer)
    assert " experts active" in output
    assert " experts carry" in output
    assert (whole / "experts.png").stat().st_size > 10_000
    assert (whole / "final" / "experts.png").exists()


def test_how_a_batch_is_split_changes_no_load(run):
    lines = [
        of_kind(
            run("deepseek_moe", f"r{rows}", batch_size=rows, grad_accum_steps=8 // rows), "routing"
        )[0]
        for rows in (8, 2)
    ]
    for name, layer in lines[0]["layers"].items():
        other = lines[1]["layers"][name]
        for key in ("active", "entropy"):
            assert layer[key] == pytest.approx(other[key], rel=1e-3), (name, key)
        assert layer["load"] == pytest.approx(other["load"], abs=0.02)


def routing(layers, steps=(10, 20, 30)):
    def load(layer, step):
        rng = np.random.default_rng(hash((layer, step)) % 2**32)
        shares = rng.dirichlet(np.ones(8))
        return [0.0 if e == 5 and step > 10 else float(s) for e, s in enumerate(shares)]

    whole = {
        "experts": 8 * layers,
        "dead": layers,
        "active": 1.0,
        "max_load_ratio": 2.0,
        "entropy": 1.5,
    }
    return [
        {"step": step, "kind": "routing"}
        | whole
        | {"layers": {f"{i}.feed": {"load": load(i, step)} for i in range(layers)}}
        for step in steps
    ]


def test_the_heat_map_holds_every_load_against_an_even_share():
    lines = routing(2)
    figure = draw_experts(History("a run", lines))
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    for name in ("0.feed", "1.feed"):
        (mesh,) = panels[name].collections
        drawn = mesh.get_array().reshape(8, 3)
        loads = np.array([line["layers"][name]["load"] for line in lines])
        even = loads.mean(1, keepdims=True)
        for e, t in np.ndindex(8, 3):
            if loads[t, e] == 0:
                assert drawn.mask[e, t], "red: none"
            else:
                wanted = np.clip(math.log2(loads[t, e] / even[t, 0]), -3, 3)
                assert drawn[e, t] == pytest.approx(wanted)
        assert drawn.mask.sum() == 2
    curve = panels["Experts per token"].lines[0]
    assert curve.get_xydata().tolist() == [[10, 1.0], [20, 1.0], [30, 1.0]]


def test_drift_and_surprise_are_drawn_where_they_are_reported():
    lines = routing(2)
    titles = {axes.get_title(loc="left") for axes in draw_experts(History("a run", lines)).axes}
    assert not titles & {"Surprise", "Drift of the gates", "Tokens in the dark room"}
    reported = {"drift": 0.2, "surprise": 0.5, "inactive_fraction": 0.25}
    figure = draw_experts(History("a run", [line | reported for line in lines]))
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    drawn = ("Drift of the gates", "Surprise", "Tokens in the dark room")
    for title, value in zip(drawn, reported.values(), strict=True):
        assert panels[title].lines[0].get_ydata().tolist() == [value] * 3


@pytest.mark.parametrize(("layers", "steps"), [(1, (5,)), (3, (5, 10)), (14, (5, 10, 15))])
@pytest.mark.filterwarnings("error")
def test_any_number_of_layers_is_drawn_and_equal_metrics_give_equal_files(tmp_path, layers, steps):
    files = []
    for name in ("a", "b"):
        folder = tmp_path / name / "run"
        folder.mkdir(parents=True)
        lines = "".join(json.dumps(line) + "\n" for line in routing(layers, steps))
        (folder / "metrics.jsonl").write_text(lines)
        plot_run(folder)
        files.append([(folder / f"experts.{kind}").read_bytes() for kind in ("png", "svg")])
    assert files[0] == files[1]


def test_a_run_without_experts_has_no_picture_of_them(tmp_path):
    plot_run(tmp_path)
    assert not (tmp_path / "experts.png").exists()
