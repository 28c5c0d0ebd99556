"""T3 and T4: splitting a batch over micro-batches or ranks does not change training."""

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
def plain_recipe(recipe, deterministic_model) -> dict:
    """The recipe with AdamW. Muon's bf16 products enlarge rounding differences of another summation
    order; test_muon_* below allows for them.
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
    return recipe | {
        "model": deterministic_model,
        "train": train,
        "optim": optim,
        "log": {"every": 1},
    }


def changed(data: dict, section: str, **values: object) -> dict:
    return data | {section: {**data.get(section, {}), **values}}


def torchrun(workspace, data: dict, name: str, kind: str) -> tuple[int, str]:
    """Train on two ranks with torchrun, as the README says, in new interpreters."""
    port = ranks_environment(2)[0]["MASTER_PORT"]
    path = workspace.write(name, data | {"parallel": {"kind": kind}})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", port, "-m", "tinsmith", "train", str(path), "--name", name]
    done = subprocess.run(
        command,
        env=workspace.environment(),
        cwd=workspace.folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


def losses(workspace, name: str) -> list[float]:
    return [record["loss"] for record in workspace.metrics(name) if record["kind"] == "train"]


@pytest.fixture(scope="session")
def one_process(shared_workspace, plain_recipe) -> list[float]:
    code, output = shared_workspace.train(plain_recipe, "one")
    assert code == 0, output
    values = losses(shared_workspace, "one")
    assert len(values) == STEPS
    return values


def assert_same(found: list[float], expected: list[float], bound: float = 1e-5) -> None:
    """Assert that losses differ by less than the bound, and half of that on average."""
    assert len(found) == len(expected)
    residuals = [a - b for a, b in zip(found, expected, strict=True)]
    assert max(map(abs, residuals)) < bound
    assert abs(sum(residuals)) / len(residuals) < bound / 2


def assert_same_as_one_process(
    workspace, data: dict, name: str, kind: str, bound: float = 1e-5
) -> None:
    """Assert that the run `name-kind` on two ranks has the losses of the run `name` on one."""
    if not (workspace.runs / name).exists():
        code, output = workspace.train(data, name)
        assert code == 0, output
    code, output = workspace.train_pair(data, f"{name}-{kind}", kind)
    assert code == 0, output
    assert_same(losses(workspace, f"{name}-{kind}"), losses(workspace, name), bound)


@pytest.mark.parametrize(("batch_size", "grad_accum_steps"), [(8, 1), (2, 4), (1, 8)])
def test_T4_split_into_micro_batches_changes_nothing(
    batch_size, grad_accum_steps, shared_workspace, plain_recipe, one_process
):
    data = changed(plain_recipe, "train", batch_size=batch_size, grad_accum_steps=grad_accum_steps)
    code, output = shared_workspace.train(data, f"split-{batch_size}")
    assert code == 0, output
    assert_same(losses(shared_workspace, f"split-{batch_size}"), one_process)


def test_T4_activation_checkpointing_changes_nothing(shared_workspace, plain_recipe, one_process):
    code, output = shared_workspace.train(
        changed(plain_recipe, "train", activation_checkpointing=True), "recompute"
    )
    assert code == 0, output
    assert losses(shared_workspace, "recompute") == one_process


@pytest.mark.slow
def test_T4_compile_changes_nothing(shared_workspace, plain_recipe, one_process):
    code, output = shared_workspace.train(changed(plain_recipe, "train", compile=True), "compiled")
    assert code == 0, output
    assert_same(losses(shared_workspace, "compiled"), one_process)


@pytest.mark.slow
def test_T4_compile_changes_nothing_for_surprise_routers(shared_workspace, plain_recipe):
    feed = {"kind": "dyn_moe", "experts": 4, "hidden_dim": 16, "router_grad": "both"}
    layers = [layer | {"feed_forward": feed} for layer in plain_recipe["model"]["pattern"]]
    data = changed(changed(plain_recipe, "model", pattern=layers), "train", steps=4)
    for name, compiled in (("smk", False), ("smk-compiled", True)):
        code, output = shared_workspace.train(changed(data, "train", compile=compiled), name)
        assert code == 0, output
    assert_same(losses(shared_workspace, "smk-compiled"), losses(shared_workspace, "smk"), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_T3_two_ranks_train_mixers_with_experts_to_the_losses_of_one_process(
    kind, shared_workspace, plain_recipe
):
    lora = {"kind": "dyn_lora", "base": {"kind": "gqa", "heads": 4}, "experts": 4, "rank": 2}
    mixers = ({"kind": "dyn_heads", "experts": 4, "heads": 4}, lora)
    layer = plain_recipe["model"]["pattern"][0]
    layers = [layer | {"mixer": mixer | {"reset_interval": 4}} for mixer in mixers]
    data = changed(changed(plain_recipe, "model", pattern=layers), "train", steps=6)
    assert_same_as_one_process(shared_workspace, data, "mixers", kind, 1e-4)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_T3_two_ranks_see_the_same_samples_and_reach_the_same_losses(
    kind, shared_workspace, plain_recipe, one_process
):
    code, output = torchrun(shared_workspace, plain_recipe, f"two-{kind}", kind)
    assert code == 0, output
    assert_same(losses(shared_workspace, f"two-{kind}"), one_process)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_T3_two_ranks_train_the_same_adapters_and_do_not_change_the_base(
    kind, shared_workspace, plain_recipe
):
    section = {"rank": 2, "alpha": 4}
    data = changed(plain_recipe, "train", steps=6) | {"lora": section}
    assert_same_as_one_process(shared_workspace, data, "lora", kind)
    one, two = (
        checkpoint.load(shared_workspace.runs / name / "checkpoints" / "step-00000006").model
        for name in ("lora", f"lora-{kind}")
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if ".lora." in name:
            torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
        else:
            assert torch.equal(two[name], tensor), name


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_T3_a_run_may_resume_with_another_world_size(
    kind, shared_workspace, plain_recipe, one_process
):
    name = f"elastic-{kind}"
    data = changed(plain_recipe, "train", save_every=7)
    process = shared_workspace.start(
        "train", shared_workspace.write(name, data), "--name", name, TINSMITH_KILL_AT="90"
    )
    process.communicate(timeout=120)
    code, output = shared_workspace.train_pair(data, name, kind, "--resume")
    assert code == 0, output
    assert "from" in output
    assert_same(losses(shared_workspace, name), one_process)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_T3_the_router_bias_follows_the_load_of_all_ranks(kind, shared_workspace, plain_recipe):
    """Equal to the bit: it moves by fixed steps that depend on global counts."""
    feed = {"kind": "deepseek_moe", "experts": 4, "top_k": 2, "hidden_dim": 16}
    feed |= {"bias_update_speed": 0.01, "balance_weight": 0.0}
    layers = [layer | {"feed_forward": feed} for layer in plain_recipe["model"]["pattern"]]
    data = changed(changed(plain_recipe, "model", pattern=layers), "train", steps=6)
    assert_same_as_one_process(shared_workspace, data, "routed", kind, 1e-4)
    expected, found = (
        load_file(
            shared_workspace.runs / name / "checkpoints" / "step-00000006" / "model.safetensors"
        )
        for name in ("routed", f"routed-{kind}")
    )
    for layer in range(2):
        bias = expected[f"blocks.{layer}.feed.bias"]
        assert bias.abs().max() >= 0.01
        assert torch.equal(found[f"blocks.{layer}.feed.bias"], bias)


def test_muon_reaches_the_same_losses_on_two_ranks(shared_workspace, plain_recipe):
    data = plain_recipe | {"optim": {"schedule": {"kind": "wsd", "warmup": 2}}}
    assert_same_as_one_process(shared_workspace, data, "muon", "fsdp", 1e-3)


@pytest.mark.parametrize(
    ("where", "kind"), [("loss", "ddp"), ("gradient", "ddp"), ("gradient", "fsdp")]
)
def test_T8_a_nonfinite_step_of_one_rank_is_skipped_by_both(
    where, kind, shared_workspace, plain_recipe
):
    keep = {"last": 20, "best": False}
    data = changed(plain_recipe, "train", steps=4, save_every=1, keep=keep)
    name = f"nonfinite-{where}-{kind}"
    program = (Path(__file__).with_name("nonfinite_worker.py"), where)
    code, output = shared_workspace.train_pair(data, name, kind, program=program)
    assert code == 0, output
    run = shared_workspace.runs / name
    saved = [checkpoint.load(run / "checkpoints" / f"step-{step:08d}").model for step in (2, 3, 4)]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])
    assert any(not torch.equal(saved[1][key], saved[2][key]) for key in saved[0])
    assert all(bool(torch.isfinite(value).all()) for value in saved[2].values())
    skipped = [
        record for record in shared_workspace.metrics(name) if record["kind"] == "nonfinite_step"
    ]
    assert skipped == [{"step": 3, "kind": "nonfinite_step", "first_sample": 16, "end_sample": 24}]


def test_T7_a_signal_to_one_rank_stops_both(shared_workspace, plain_recipe):
    long = changed(plain_recipe, "train", steps=100_000)
    first, second = shared_workspace.start_pair(long, "pair", "ddp")
    end = time.monotonic() + 120
    for line in first.stdout:
        assert time.monotonic() < end
        if " step " in line:
            break
    second.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=60)
    second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (75, 75), output
    assert (shared_workspace.runs / "pair" / "checkpoints" / "LATEST").exists()


def test_a_batch_size_that_the_world_size_does_not_divide_is_refused(
    shared_workspace, plain_recipe
):
    data = changed(plain_recipe, "train", batch_size=3)
    pair = shared_workspace.start_pair(data, "odd", "ddp")
    output = [process.communicate(timeout=120)[0] for process in pair]
    assert all(process.returncode == 2 for process in pair), output
    assert "train.batch_size: 3 must be a multiple of the world size 2" in output[0]
