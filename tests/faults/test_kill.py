"""T1: a run killed at any point and resumed ends in the same bits."""

import random

import pytest

KILLS = 14
BETWEEN_STEPS = ("in evaluate", "in sample")
INSIDE_A_SAVE = ("model.safetensors", "optim.safetensors", "state.json", "manifest", "tokenizer")


def kill_points(events: list[str]) -> list[int]:
    """Return indices from 1 of kill points by a fixed seed: six inside saves, two in evaluation or
    samples, six anywhere else.
    """
    generator = random.Random(7)
    inside = [index for index, name in enumerate(events, 1) if name in INSIDE_A_SAVE]
    between = [index for index, name in enumerate(events, 1) if name in BETWEEN_STEPS]
    rest = [index for index in range(1, len(events) + 1) if index not in {*inside, *between}]
    return [*generator.sample(inside, 6), *generator.sample(between, 2), *generator.sample(rest, 6)]


@pytest.mark.parametrize("kill", range(KILLS))
def test_T1_killed_and_resumed_run_ends_in_the_same_bits(kill, shared_workspace, recipe, reference):
    point = kill_points(reference["events"])[kill]
    name = f"killed-{kill}"
    found = shared_workspace.killed(recipe, name, point)
    for key, value in found.items():
        assert value == reference[key], (key, reference["events"][point - 1])


def test_T1_kill_points_lie_in_saves_steps_and_evaluation(reference):
    named = {reference["events"][point - 1] for point in kill_points(reference["events"])}
    assert named & set(INSIDE_A_SAVE)
    assert named & {"step", "micro-step", "in step"}
    assert named & set(BETWEEN_STEPS)


def test_T12_two_identical_runs_leave_identical_files(shared_workspace, reference):
    for key, value in reference["twin"].items():
        assert value == reference[key], key
    one, two = shared_workspace.folder / "twin" / "whole", shared_workspace.runs / "whole"
    files = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
    assert files == {path.relative_to(two) for path in two.rglob("*") if path.is_file()}
    assert len(files) > 20
    timed = {"log.txt", "metrics.jsonl"}
    different = [f for f in files if (one / f).read_bytes() != (two / f).read_bytes()]
    assert {file.name for file in different} <= timed
