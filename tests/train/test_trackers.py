"""Trackers: logged values can be read back, and a failing tracker does not stop the run."""

import builtins
import json
import random
import sqlite3
import sys

import pytest
import torch

from tinsmith.core.errors import UserError
from tinsmith.core.log import RunLog
from tinsmith.train import trackers
from tinsmith.train.trackers import attach_trackers

CONFIG = {"train": {"steps": 20}, "objective": {"kind": "pretrain"}}
RECORDS = [
    {"step": 10, "kind": "train", "loss": 3.5, "tokens": 1000, "lr_multiplier": 1.0},
    {"step": 10, "kind": "eval", "loss": 3.25, "bpb": 1.5, "bpb.a": float("nan")},
    {"step": 10, "kind": "samples", "samples": [{"prompt": "a", "text": "b"}]},
    {"step": 20, "kind": "train", "loss": 2.5, "tokens": 2000, "lr_multiplier": 0.5},
]


class Recorder:
    """A tracker that stores logged values, or fails in the methods of `fails_in`."""

    def __init__(self, fails_in=()):
        self.logged, self.closed, self.fails_in = [], 0, fails_in

    def log(self, values, step):
        if "log" in self.fails_in:
            raise OSError("the server\nis on fire")
        self.logged.append((step, values))

    def close(self):
        self.closed += 1
        if "close" in self.fails_in:
            raise RuntimeError("no")


@pytest.fixture
def recorder(monkeypatch):
    """`recorder(*fails_in)` registers a Recorder as the tracker `tensorboard` and returns it."""

    def make(*fails_in):
        tracker = Recorder(fails_in)
        monkeypatch.setitem(trackers.TRACKERS, "tensorboard", lambda folder, config, name: tracker)
        return tracker

    return make


def run_with(trackers, folder):
    log = RunLog(folder)
    close = attach_trackers(trackers, folder, CONFIG, "first", log)
    for record in RECORDS:
        log.metrics(record)
    close()
    return log


def test_finite_numbers_are_logged_under_kind_and_name_and_nothing_else(recorder, tmp_path):
    tracker = recorder()
    run_with(("tensorboard",), tmp_path)
    assert tracker.logged == [
        (10, {"train/loss": 3.5, "train/tokens": 1000, "train/lr_multiplier": 1.0}),
        (10, {"eval/loss": 3.25, "eval/bpb": 1.5}),
        (20, {"train/loss": 2.5, "train/tokens": 2000, "train/lr_multiplier": 0.5}),
    ]
    assert tracker.closed == 1


def test_tensorboard_files_contain_the_logged_values(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_with(("tensorboard",), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = {"train/loss", "train/tokens", "train/lr_multiplier", "eval/loss", "eval/bpb"}
    assert set(events.Tags()["scalars"]) == names
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 3.5), (20, 2.5)]
    assert [(e.step, e.value) for e in events.Scalars("eval/bpb")] == [(10, 1.5)]


def test_a_resumed_run_replaces_later_steps_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_with(("tensorboard",), tmp_path)
    log = RunLog(tmp_path)
    close = attach_trackers(("tensorboard",), tmp_path, CONFIG, "first", log)
    log.metrics({"step": 20, "kind": "train", "loss": 2.0})
    close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 3.5), (20, 2.0)]


def test_wandb_offline_files_contain_the_logged_values(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    run_with(("wandb",), tmp_path)
    wandb.teardown()  # as the end of a process does: waits for the process that writes the file
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"train/loss" in content
    assert b"eval/bpb" in content
    assert b"2.5" in content


def test_trackio_stores_logged_values_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils

    for module in (utils, sqlite_storage, trackio):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    (tmp_path / "run").mkdir()
    run_with(("trackio",), tmp_path / "run")
    run_with(("trackio",), tmp_path / "run")
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select run_id, run_name, step, metrics from metrics").fetchall()
    assert len({run_id for run_id, *_ in rows}) == 1
    assert {name for _, name, *_ in rows} == {"first"}
    losses = [(step, json.loads(values).get("train/loss")) for *_, step, values in rows]
    assert {(10, 3.5), (20, 2.5)} <= set(losses)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_with_the_install_command(
    name, tmp_path, monkeypatch
):
    original = builtins.__import__

    def import_without(module, *rest, **more):
        if module.split(".")[-1] == name or module == name:
            raise ModuleNotFoundError(f"No module named '{name}'")
        return original(module, *rest, **more)

    for loaded in [m for m in sys.modules if m.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(builtins, "__import__", import_without)
    with pytest.raises(
        UserError, match=rf'{name} is not installed; pip install "tinsmith\[track\]"'
    ):
        attach_trackers((name,), tmp_path, CONFIG, "first", RunLog(tmp_path))


def test_a_failure_to_log_is_printed_once_and_training_continues(recorder, tmp_path, capsys):
    tracker = recorder("log")
    run_with(("tensorboard",), tmp_path)
    printed = capsys.readouterr().err
    assert (
        printed == " warning tensorboard failed: OSError: the server; training goes on without it\n"
    )
    assert tracker.closed == 0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(RECORDS)


def test_a_failure_to_close_is_printed_and_not_raised(recorder, tmp_path, capsys):
    tracker = recorder("close")
    log = RunLog(tmp_path)
    close = attach_trackers(("tensorboard",), tmp_path, CONFIG, "first", log)
    close()
    close()
    assert tracker.closed == 1
    assert capsys.readouterr().err.count("warning") == 1


def test_a_tracker_that_cannot_start_does_not_stop_the_others(
    recorder, monkeypatch, tmp_path, capsys
):
    tracker = recorder()

    def broken(folder, config, name):
        raise ConnectionError("no route")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", broken)
    run_with(("wandb", "tensorboard"), tmp_path)
    assert len(tracker.logged) == 3
    assert "wandb could not be started: ConnectionError: no route" in capsys.readouterr().err


def test_a_quiet_log_gets_no_tracker(recorder, tmp_path):
    tracker = recorder()
    log = RunLog(tmp_path, quiet=True)
    attach_trackers(("tensorboard",), tmp_path, CONFIG, "first", log)()
    assert (tracker.logged, tracker.closed) == ([], 0)


def test_T2_a_tracker_does_not_change_the_random_state(monkeypatch, tmp_path):
    def draws_random_numbers(folder, config, name):
        random.random()
        torch.rand(3)
        return Recorder()

    monkeypatch.setitem(trackers.TRACKERS, "wandb", draws_random_numbers)
    before = random.getstate(), torch.get_rng_state()
    attach_trackers(("wandb",), tmp_path, CONFIG, "first", RunLog(tmp_path))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_wandb_is_offline_without_credentials(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert trackers._wandb_mode() == "offline"
    (tmp_path / "netrc").write_text("machine example.org login a password b\n")
    assert trackers._wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://example.org/")
    assert trackers._wandb_mode() == "online"
    (tmp_path / "netrc").write_text("what is this\n")
    assert trackers._wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert trackers._wandb_mode() == "online"
