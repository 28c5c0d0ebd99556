"""T1: killed at any moment, a run ends in the same bits."""

import random

import pytest

KILLS = 14
BETWEEN_STEPS = ("in evaluate", "in sample")
INSIDE_A_SAVE = ("model.safetensors", "optim.safetensors", "state.json", "manifest", "tokenizer")


def kill_points(events: list[str]) -> list[int]:
    """By a fixed seed: six inside saves, two in evaluations or samples, six anywhere else; numbered
    from 1.
    """
    generator = random.Random(7)
    inside = [place for place, name in enumerate(events, 1) if name in INSIDE_A_SAVE]
    between = [place for place, name in enumerate(events, 1) if name in BETWEEN_STEPS]
    rest = [place for place in range(1, len(events) + 1) if place not in {*inside, *between}]
    return [*generator.sample(inside, 6), *generator.sample(between, 2), *generator.sample(rest, 6)]


@pytest.mark.parametrize("number", range(KILLS))
def test_T1_killed_and_resumed_run_ends_in_the_same_bits(number, shared_place, recipe, reference):
    point = kill_points(reference["events"])[number]
    name = f"killed-{number}"
    found = shared_place.killed(recipe, name, point)
    for key, value in found.items():
        assert value == reference[key], (key, reference["events"][point - 1])


def test_T1_kill_points_reach_into_saves_and_steps(reference):
    named = {reference["events"][point - 1] for point in kill_points(reference["events"])}
    assert named & set(INSIDE_A_SAVE)
    assert named & {"step", "micro-step", "in step"}
    assert named & set(BETWEEN_STEPS)


def test_T12_two_identical_runs_leave_identical_files(shared_place, reference):
    for key, value in reference["twin"].items():
        assert value == reference[key], key
    one, two = shared_place.folder / "twin" / "whole", shared_place.runs / "whole"
    files = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
    assert files == {path.relative_to(two) for path in two.rglob("*") if path.is_file()}
    assert len(files) > 20
    timed = {"log.txt", "metrics.jsonl"}
    different = [f for f in files if (one / f).read_bytes() != (two / f).read_bytes()]
    assert {file.name for file in different} <= timed
