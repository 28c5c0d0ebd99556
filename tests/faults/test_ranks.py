"""T3 and T4: how a batch is split never matters, over micro-batches, rows or processes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import ranks_environment
from tinsmith.train import checkpoint

STEPS = 20


@pytest.fixture(scope="session")
def plain_recipe(recipe, steady_model) -> dict:
    """With AdamW, since Muon's bf16 products enlarge the last bits in which sums of another order
    differ (test_muon_* below).
    """
    train = {
        **recipe["train"],
        "steps": STEPS,
        "batch_size": 4,
        "grad_accum_steps": 2,
        "save_every": 50,
    }
    matrices = {"kind": "adamw", "lr": 3.0e-3}
    optim = {"matrices": matrices, "schedule": {"kind": "wsd", "warmup": 2}}
    return recipe | {"model": steady_model, "train": train, "optim": optim, "log": {"every": 1}}


def changed(data: dict, section: str, **values: object) -> dict:
    return data | {section: {**data.get(section, {}), **values}}


def torchrun(place, data: dict, name: str, kind: str) -> tuple[int, str]:
    """As the README says, everything imported anew."""
    port = ranks_environment(2)[0]["MASTER_PORT"]
    path = place.write(name, data | {"parallel": {"kind": kind}})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", port, "-m", "tinsmith", "train", str(path), "--name", name]
    done = subprocess.run(
        command,
        env=place.environment(),
        cwd=place.folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


def losses(place, name: str) -> list[float]:
    return [row["loss"] for row in place.metrics(name) if row["kind"] == "train"]


@pytest.fixture(scope="session")
def one_process(shared_place, plain_recipe) -> list[float]:
    code, output = shared_place.train(plain_recipe, "one")
    assert code == 0, output
    found = losses(shared_place, "one")
    assert len(found) == STEPS
    return found


def assert_same(found: list[float], expected: list[float], bound: float = 1e-5) -> None:
    """Equal to the bound, and no drift to one side."""
    assert len(found) == len(expected)
    residuals = [a - b for a, b in zip(found, expected, strict=True)]
    assert max(map(abs, residuals)) < bound
    assert abs(sum(residuals)) / len(residuals) < bound / 2


def beside_one(place, data: dict, name: str, kind: str, bound: float = 1e-5) -> None:
    """The run `name-kind` of two ranks has the losses of the run `name` of one process."""
    if not (place.runs / name).exists():
        code, output = place.train(data, name)
        assert code == 0, output
    code, output = place.train_pair(data, f"{name}-{kind}", kind)
    assert code == 0, output
    assert_same(losses(place, f"{name}-{kind}"), losses(place, name), bound)


@pytest.mark.parametrize(("rows", "accumulate"), [(8, 1), (2, 4), (1, 8)])
def test_T4_split_into_micro_batches_changes_nothing(
    rows, accumulate, shared_place, plain_recipe, one_process
):
    data = changed(plain_recipe, "train", batch_size=rows, grad_accum_steps=accumulate)
    code, output = shared_place.train(data, f"split-{rows}")
    assert code == 0, output
    assert_same(losses(shared_place, f"split-{rows}"), one_process)


def test_T4_checkpointing_changes_nothing(shared_place, plain_recipe, one_process):
    code, output = shared_place.train(
        changed(plain_recipe, "train", activation_checkpointing=True), "recompute"
    )
    assert code == 0, output
    assert losses(shared_place, "recompute") == one_process


@pytest.mark.slow
def test_T4_compile_changes_nothing(shared_place, plain_recipe, one_process):
    code, output = shared_place.train(changed(plain_recipe, "train", compile=True), "compiled")
    assert code == 0, output
    assert_same(losses(shared_place, "compiled"), one_process)


@pytest.mark.slow
def test_T4_compile_changes_nothing_where_gates_learn_from_surprise(shared_place, plain_recipe):
    feed = {"kind": "dyn_moe", "experts": 4, "hidden_dim": 16, "router_grad": "both"}
    layers = [layer | {"feed_forward": feed} for layer in plain_recipe["model"]["pattern"]]
    data = changed(changed(plain_recipe, "model", pattern=layers), "train", steps=4)
    for name, compiled in (("smk", False), ("smk-compiled", True)):
        code, output = shared_place.train(changed(data, "train", compile=compiled), name)
        assert code == 0, output
    assert_same(losses(shared_place, "smk-compiled"), losses(shared_place, "smk"), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_T3_two_ranks_train_routed_mixers_as_one_process_does(kind, shared_place, plain_recipe):
    lora = {"kind": "dyn_lora", "base": {"kind": "gqa", "heads": 4}, "experts": 4, "rank": 2}
    mixers = ({"kind": "dyn_heads", "experts": 4, "heads": 4}, lora)
    layer = plain_recipe["model"]["pattern"][0]
    layers = [layer | {"mixer": mixer | {"reset_interval": 4}} for mixer in mixers]
    data = changed(changed(plain_recipe, "model", pattern=layers), "train", steps=6)
    beside_one(shared_place, data, "mixers", kind, 1e-4)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_T3_two_ranks_see_the_same_samples_and_reach_the_same_losses(
    kind, shared_place, plain_recipe, one_process
):
    code, output = torchrun(shared_place, plain_recipe, f"two-{kind}", kind)
    assert code == 0, output
    assert_same(losses(shared_place, f"two-{kind}"), one_process)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_T3_two_ranks_train_the_same_adapters_and_leave_the_base(kind, shared_place, plain_recipe):
    section = {"rank": 2, "alpha": 4}
    data = changed(plain_recipe, "train", steps=6) | {"lora": section}
    beside_one(shared_place, data, "lora", kind)
    one, two = (
        checkpoint.load(shared_place.runs / name / "checkpoints" / "step-00000006").model
        for name in ("lora", f"lora-{kind}")
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if ".lora." in name:
            torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
        else:
            assert torch.equal(two[name], tensor), name


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_T3_a_run_may_change_its_world_size(kind, shared_place, plain_recipe, one_process):
    name = f"elastic-{kind}"
    begun = changed(plain_recipe, "train", save_every=7)
    process = shared_place.start(
        "train", shared_place.write(name, begun), "--name", name, TINSMITH_KILL_AT="90"
    )
    process.communicate(timeout=120)
    code, output = shared_place.train_pair(begun, name, kind, "--resume")
    assert code == 0, output
    assert "from" in output
    assert_same(losses(shared_place, name), one_process)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_T3_the_bias_of_experts_moves_on_the_load_of_all_ranks(kind, shared_place, plain_recipe):
    """To the bit: it moves by whole steps on counts of the global batch."""
    feed = {"kind": "deepseek_moe", "experts": 4, "top_k": 2, "hidden_dim": 16}
    feed |= {"bias_update_speed": 0.01, "balance_weight": 0.0}
    layers = [layer | {"feed_forward": feed} for layer in plain_recipe["model"]["pattern"]]
    data = changed(changed(plain_recipe, "model", pattern=layers), "train", steps=6)
    beside_one(shared_place, data, "routed", kind, 1e-4)
    expected, found = (
        load_file(shared_place.runs / name / "checkpoints" / "step-00000006" / "model.safetensors")
        for name in ("routed", f"routed-{kind}")
    )
    for layer in range(2):
        bias = expected[f"blocks.{layer}.feed.bias"]
        assert bias.abs().max() >= 0.01
        assert torch.equal(found[f"blocks.{layer}.feed.bias"], bias)


def test_muon_reaches_the_same_losses_on_two_ranks(shared_place, plain_recipe):
    data = plain_recipe | {"optim": {"schedule": {"kind": "wsd", "warmup": 2}}}
    beside_one(shared_place, data, "muon", "fsdp", 1e-3)


@pytest.mark.parametrize(
    ("where", "kind"), [("loss", "ddp"), ("gradient", "ddp"), ("gradient", "fsdp")]
)
def test_T8_not_finite_on_one_rank_is_skipped_by_both(where, kind, shared_place, plain_recipe):
    keep = {"last": 20, "best": False}
    data = changed(plain_recipe, "train", steps=4, save_every=1, keep=keep)
    name = f"spoilt-{where}-{kind}"
    program = (Path(__file__).with_name("poisoned.py"), where)
    code, output = shared_place.train_pair(data, name, kind, program=program)
    assert code == 0, output
    run = shared_place.runs / name
    saved = [checkpoint.load(run / "checkpoints" / f"step-{step:08d}").model for step in (2, 3, 4)]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])
    assert any(not torch.equal(saved[1][key], saved[2][key]) for key in saved[0])
    assert all(bool(torch.isfinite(value).all()) for value in saved[2].values())
    bad = [row for row in shared_place.metrics(name) if row["kind"] == "nonfinite_step"]
    assert bad == [{"step": 3, "kind": "nonfinite_step", "first_sample": 16, "end_sample": 24}]


def test_T7_a_signal_to_one_rank_stops_both(shared_place, plain_recipe):
    long = changed(plain_recipe, "train", steps=100_000)
    first, second = shared_place.start_pair(long, "pair", "ddp")
    end = time.monotonic() + 120
    for line in first.stdout:
        assert time.monotonic() < end
        if " step " in line:
            break
    second.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=60)
    second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (75, 75), output
    assert (shared_place.runs / "pair" / "checkpoints" / "LATEST").exists()


def test_rows_that_the_world_size_does_not_divide_are_refused(shared_place, plain_recipe):
    data = changed(plain_recipe, "train", batch_size=3)
    pair = shared_place.start_pair(data, "odd", "ddp")
    output = [process.communicate(timeout=120)[0] for process in pair]
    assert all(process.returncode == 2 for process in pair), output
    assert "train.batch_size: 3 must be a multiple of the world size 2" in output[0]
