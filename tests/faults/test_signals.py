"""T7: SIGTERM and SIGINT save one checkpoint and exit with 75; SIGUSR1 saves and continues."""

import signal
import time

import pytest


def wait_for(process, word: str, deadline: float = 120) -> str:
    """Read lines until one contains `word` and return all output read."""
    output = ""
    end = time.monotonic() + deadline
    for line in process.stdout:
        output += line
        if word in line:
            return output
        assert time.monotonic() < end, output
    raise AssertionError(output)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_T7_a_stop_signal_saves_once_and_exits_with_75(signal_number, workspace, recipe):
    rare = dict.fromkeys(("save_every", "eval_every"), 90_000)  # a best evaluation saves too
    long = recipe | {"train": recipe["train"] | {"steps": 100_000} | rare}
    process = workspace.start("train", workspace.write("stop", long), "--name", "stop")
    wait_for(process, " step ")
    process.send_signal(signal_number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert len(output.split(" saved ")) == 2, output
    assert "--resume" in output
    newest = sorted((workspace.runs / "stop" / "checkpoints").glob("step-*"))[-1]
    assert (newest / "manifest.json").exists()


def test_T7_stopped_and_resumed_run_ends_in_the_same_bits(shared_workspace, recipe, reference):
    """The signal arrives before the first evaluation, which runs after the resume."""
    process = shared_workspace.start(
        "train", shared_workspace.write("halted", recipe), "--name", "halted"
    )
    wait_for(process, " step      2/10")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    if process.returncode == 75:
        code, output = shared_workspace.train(recipe, "halted", "--resume")
        assert code == 0, output
    else:
        assert process.returncode == 0
    assert shared_workspace.result("halted")["model.safetensors"] == reference["model.safetensors"]
    assert shared_workspace.result("halted")["metrics"] == reference["metrics"]


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("in step", 4),
        ("in evaluate", 1),
        ("in sample", 3),
        ("model.safetensors", 2),
        ("renamed", 1),
    ],
)
def test_T7_a_run_stopped_anywhere_resumes_to_the_same_bits(
    where, number, shared_workspace, recipe, reference
):
    """Stopped at the `number`th event of that name: in a step, an evaluation, a sample, a save."""
    indices = [index for index, name in enumerate(reference["events"], 1) if name.startswith(where)]
    name = f"stopped-{where.replace(' ', '-')}"
    code, output = shared_workspace.train(
        recipe, name, TINSMITH_KILL_AT=str(indices[number - 1]), TINSMITH_KILL_BY="SIGTERM"
    )
    assert code == 75, output
    stopped = sorted((shared_workspace.runs / name / "checkpoints").glob("step-*"))
    assert all((folder / "manifest.json").exists() for folder in stopped)
    assert f"step-{output.split('stopped at step ')[1].split(';')[0]:>08}" == stopped[-1].name
    code, output = shared_workspace.train(recipe, name, "--resume")
    assert code == 0, output
    found = shared_workspace.result(name)
    for key in ("model.safetensors", "optim.safetensors", "rng-00000.safetensors", "metrics"):
        assert found[key] == reference[key], key


def test_T7_a_second_interrupt_quits_at_once(workspace, recipe):
    long = recipe | {
        "train": recipe["train"] | {"steps": 100_000, "batch_size": 256, "seq_len": 64}
    }
    process = workspace.start("train", workspace.write("quit", long), "--name", "quit")
    wait_for(process, "  run ")
    process.send_signal(signal.SIGINT)
    wait_for(process, "again to quit now")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode in (75, 130)


def test_T7_sigusr1_saves_and_continues(workspace, recipe):
    long = recipe | {"train": recipe["train"] | {"steps": 100_000, "save_every": 90_000}}
    process = workspace.start("train", workspace.write("usr1", long), "--name", "usr1")
    wait_for(process, " step ")
    wait_for(process, " saved ")  # the best evaluation so far
    process.send_signal(signal.SIGUSR1)
    wait_for(process, " saved ")
    wait_for(process, " step ")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
