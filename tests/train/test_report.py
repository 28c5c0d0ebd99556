"""Loss pictures, samples.md and the table of runs, also from damaged metrics files."""

import itertools
import json
import math
import os
import re
import struct
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith.core.errors import UserError
from tinsmith.train.plots.history import History, Series
from tinsmith.train.plots.loss import draw_run, draw_runs
from tinsmith.train.report import plot_run, plot_runs, runs_table, write_samples


def records(steps=300, sources=("a", "b")):
    """Return what a run of so many steps writes to metrics.jsonl."""
    result = []
    for step in range(10, steps + 1, 10):
        loss = 2 + 5 * math.exp(-step / 60)
        train = {"step": step, "kind": "train", "loss": loss, "grad_norm": 1 / step}
        train |= {"lr_multiplier": 1.0, "tokens": step * 100, "tokens_per_second": time.time()}
        result.append(train)
        if step % 100 == 0:
            evaluation = {"step": step, "kind": "eval", "loss": loss + 0.1, "bpb": loss / 2}
            evaluation |= {f"bpb.{name}": loss / (3 + i) for i, name in enumerate(sources)}
            texts = [{"prompt": "def f(", "text": f"x):\n    return {step}"}]
            result += [evaluation, {"step": step, "kind": "samples", "samples": texts}]
    return result


@pytest.fixture
def make_run(tmp_path):
    """`make_run(name, metrics, torn)` writes a run's metrics.jsonl, with `torn` as its end, and
    returns the folder.
    """

    def make(name="first", metrics=None, torn=""):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        metrics = records() if metrics is None else metrics
        text = "".join(json.dumps(record) + "\n" for record in metrics)
        (folder / "metrics.jsonl").write_bytes(text.encode() + torn.encode("latin-1"))
        return folder

    return make


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_T12_equal_metrics_give_identical_pictures(make_run):
    one, other = make_run("here/run"), make_run("there/run")
    for folder in (one, other):
        assert plot_run(folder) == folder / "loss.png"
    for name in ("loss.png", "loss.svg"):
        first = (one / name).read_bytes()
        assert first == (other / name).read_bytes()
        assert not re.search(
            rb"20\d\d-\d\d-\d\d|[Mm]atplotlib", first.replace(b"matplotlib.axis", b"")
        )
    assert {path.name for path in one.iterdir()} == {"metrics.jsonl", "loss.png", "loss.svg"}


def test_T12_matplotlib_settings_of_the_user_change_no_picture(make_run, monkeypatch):
    import matplotlib as mpl

    folder = make_run()
    before = plot_run(folder).read_bytes()
    with mpl.rc_context({"font.size": 30, "lines.linewidth": 9, "savefig.dpi": 20}):
        assert plot_run(folder).read_bytes() == before


def test_other_metrics_give_another_picture(make_run):
    metrics = records()
    changed = [line | ({"loss": 3.0} if line["kind"] == "train" else {}) for line in metrics]
    names = [plot_run(make_run(f"{i}/run", some)) for i, some in enumerate((metrics, changed))]
    assert names[0].read_bytes() != names[1].read_bytes()


def test_the_picture_has_the_size_for_a_readme(make_run):
    data = plot_run(make_run()).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert 1400 <= width <= 2000
    assert 0.4 < height / width < 0.7


def test_the_panels_show_the_metrics_and_their_units(make_run):
    figure = draw_run(History.read(make_run("the name")))
    by_title = panels(figure)
    loss, bpb, rate, norm = by_title.values()
    assert [axes.get_ylabel() for axes in (loss, bpb)] == ["nats per token", "bits per byte"]
    assert all(axes.get_ylabel() for axes in (rate, norm))
    assert [axes.get_xlabel() for axes in (loss, norm)] == ["step", "step"]
    train = [record for record in records() if record["kind"] == "train"]
    raw = loss.lines[0].get_xydata().tolist()
    assert raw == [[record["step"], record["loss"]] for record in train]
    validation = next(line for line in loss.lines if line.get_label() == "validation")
    assert validation.get_ydata().tolist() == [e["loss"] for e in records() if e["kind"] == "eval"]
    drawn = {line.get_label(): line.get_ydata().tolist() for line in bpb.lines}
    for name, key in (("all", "bpb"), ("a", "bpb.a"), ("b", "bpb.b")):
        assert drawn[name] == [record[key] for record in records() if record["kind"] == "eval"]
    assert norm.lines[0].get_ydata().tolist() == [record["grad_norm"] for record in train]
    assert rate.lines[0].get_ydata().tolist() == [1.0] * len(train)
    written = " ".join(text.get_text() for text in figure.texts)
    assert "the name" in written
    best = min(record["bpb"] for record in records() if record["kind"] == "eval")
    assert f"{best:.3f} bits per byte at step 300" in written


def test_skipped_steps_are_marked(make_run):
    metrics = [
        *records(),
        {"step": 123, "kind": "nonfinite_step", "first_sample": 0, "end_sample": 9},
    ]
    loss = panels(draw_run(History.read(make_run(metrics=metrics))))["Loss"]
    marks = next(line for line in loss.lines if line.get_label() == "skipped step")
    assert marks.get_xdata() == [123]


def test_without_bits_per_byte_the_validation_loss_is_shown(make_run):
    metrics = [
        line | ({"bpb": None} if line["kind"] == "eval" else {}) for line in records(sources=())
    ]
    by_title = panels(draw_run(History.read(make_run(metrics=metrics))))
    losses = [line["loss"] for line in metrics if line["kind"] == "eval"]
    assert by_title["Validation loss"].lines[0].get_ydata().tolist() == losses


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        records(10),
        [{"step": 5, "kind": "eval", "loss": 3.0, "bpb": 1.0}],
        [{"step": 5, "kind": "train", "loss": None, "grad_norm": None}],
        [{"step": 5, "kind": "train", "loss": 0.0, "grad_norm": 0.0, "lr_multiplier": 0.0}],
        [{"step": 5, "kind": "nonfinite_step"}, {"step": 6, "kind": "samples"}],
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_run_killed_early_is_drawn_up_to_its_last_record(make_run, metrics):
    folder = make_run(metrics=metrics)
    assert plot_run(folder).stat().st_size > 10_000
    write_samples(folder)
    assert plot_runs([folder, folder], folder / "both.svg").stat().st_size > 1000


TORN = [
    '{"step": 310, "kind": "tr',
    '{"step": 310, "kind": "train", "loss": 9}}\n',
    '{"kind": "train", "loss": 1}\n',
    '{"step": 310, "loss": 1}\n',
    '{"step": "310", "kind": "train"}\n',
    "\0\0\n",
    "[]\n",
    "7\n",
    "\xff{}\n",
    "\n\n",
]


@pytest.mark.parametrize("torn", TORN)
def test_damaged_lines_are_skipped(make_run, torn):
    metrics = records()
    whole, damaged = make_run("a/run", metrics), make_run("b/run", metrics, torn)
    for kind in ("train", "eval", "samples"):
        histories = [History.read(folder).of_kind(kind) for folder in (whole, damaged)]
        assert histories[0] == histories[1] != []
    assert History.read(damaged).step == 300
    assert write_samples(whole).read_bytes() == write_samples(damaged).read_bytes()


def test_missing_files_give_an_empty_picture_and_a_missing_folder_is_an_error(tmp_path):
    (tmp_path / "run").mkdir()
    assert plot_run(tmp_path / "run").exists()
    assert "None yet" in write_samples(tmp_path / "run").read_text()
    for report in (plot_run, write_samples):
        with pytest.raises(UserError, match="no such run"):
            report(tmp_path / "none")


def test_several_runs_share_a_picture_and_have_different_lines_and_names(make_run, tmp_path):
    folders = [make_run("one/run"), make_run("two/run"), make_run("other", records(200))]
    figure = draw_runs([History.read(folder) for folder in folders])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["run (1)", "run (2)", "other"]
    loss, validation = figure.axes
    assert [len(line.get_xdata()) for line in loss.lines] == [30, 30, 20]
    assert [len(line.get_xdata()) for line in validation.lines] == [3, 3, 2]
    assert len({line.get_color() for line in loss.lines}) == 3
    out = plot_runs(folders, tmp_path / "all.png")
    first = out.read_bytes()
    assert plot_runs(folders, out).read_bytes() == first
    many = draw_runs([History(str(i), records()) for i in range(20)])
    looks = {(line.get_color(), line.get_linestyle()) for line in many.axes[0].lines}
    assert len(looks) == 20
    with pytest.raises(UserError, match=r"as \.png or \.svg"):
        plot_runs(folders, tmp_path / "all.jpg")
    with pytest.raises(UserError, match="does not exist"):
        plot_runs(folders, tmp_path / "none" / "all.png")


def test_run_names_are_not_interpreted_as_markup(make_run, recwarn):
    for name in ("a$b_{c$", "100%_x^2", "诗"):
        figure = draw_run(History.read(make_run(name)))
        assert figure.texts[0].get_text() == name
        plot_run(make_run(f"drawn/{name}"))
    assert not recwarn.list


def fences(text):
    """Return (code blocks, other lines) of Markdown as CommonMark reads fenced code."""
    blocks, rest, block, fence = [], [], [], ""
    for line in text.split("\n"):
        marks = re.fullmatch(r" {0,3}(`{3,})\s*([^`]*)", line)
        if fence and marks and not marks[2] and len(marks[1]) >= len(fence):
            blocks.append("".join(f"{line}\n" for line in block))
            block, fence = [], ""
        elif fence:
            block.append(line)
        elif marks:
            fence = marks[1]
        else:
            rest.append(line)
    assert not fence
    return blocks, rest


pieces = st.sampled_from(
    ["`", "```", "````", "\n", "\n```\n", " ", "#", "~~~", "a", "<", "\t", "\\"]
)


@given(st.lists(st.lists(pieces, max_size=9).map("".join), min_size=2, max_size=6))
@settings(derandomize=True, max_examples=100, deadline=None)
def test_no_sample_closes_its_code_fence(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("run")
    samples = [{"prompt": a, "text": b} for a, b in itertools.pairwise(texts)]
    line = {"step": 1000, "kind": "samples", "samples": samples}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    blocks, rest = fences(write_samples(folder).read_text())
    expected = [text for sample in samples for text in (sample["prompt"], sample["text"])]
    assert blocks == [text if text.endswith("\n") else f"{text}\n" for text in expected]
    headings = [line for line in rest if line.startswith("#")]
    assert headings == [f"# Samples of {folder.name}", "## Step 1,000"]


def test_only_finite_numbers_are_drawn(make_run):
    values = [1.0, math.nan, 2, None, math.inf, True, "3", 4.5]
    metrics = [{"step": i, "kind": "train", "x": value} for i, value in enumerate(values)]
    series = History.read(make_run(metrics=[*metrics, {"step": 9, "kind": "train"}])).series(
        "train", "x"
    )
    assert series.steps.tolist() == [0, 2, 7]
    assert series.values.tolist() == [1.0, 2.0, 4.5]


def test_samples_are_listed_by_step_in_order(make_run):
    text = write_samples(make_run()).read_text()
    positions = [
        text.index(part) for n in (100, 200, 300) for part in (f"## Step {n}", f"return {n}")
    ]
    assert positions == sorted(positions)


def test_smoothing_keeps_straight_lines_and_the_first_point():
    steps = np.arange(200.0)
    for values in (np.full(200, 3.0), 2 * steps):
        smooth = Series(list(zip(steps, values, strict=True))).smooth()
        np.testing.assert_allclose(smooth[:190], values[:190], rtol=1e-12)
    noisy = np.where(steps % 2, 1.0, -1.0)
    smooth = Series(list(zip(steps, noisy, strict=True))).smooth()
    assert smooth[0] == noisy[0]
    assert np.abs(smooth[20:]).max() < 0.2
    assert len(Series([]).smooth()) == 0


def config(steps):
    return f"objective:\n  kind: sft\ntrain:\n  steps: {steps}\n"


def test_the_table_lists_finished_killed_and_broken_runs(make_run, tmp_path):
    done, killed, broken = make_run("done"), make_run("killed", torn="{"), tmp_path / "broken"
    (done / "config.yaml").write_text(config(300))
    (done / "final").mkdir()
    (done / "final" / "config.json").write_text("{}")
    (killed / "config.yaml").write_text(config(900))
    (killed / "checkpoints" / "step-00000310").mkdir(parents=True)
    (killed / "checkpoints" / ".step-00000900.tmp-1").mkdir()
    (killed / "checkpoints" / "step-00000900.old").mkdir()
    broken.mkdir()
    (broken / "config.yaml").write_text("objective: [")
    (tmp_path / ".data").mkdir()
    (tmp_path / ".data" / "config.yaml").write_text("")
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").write_text("")
    now = time.time()
    for age, folder in ((50, done), (500, killed)):
        os.utime(folder / "metrics.jsonl", (now - age, now - age))
    os.utime(broken, (now - 5000, now - 5000))
    runs = {run["name"]: run for run in runs_table(tmp_path)}
    assert list(runs) == ["done", "killed", "broken"]
    values = [line["bpb"] for line in records() if line["kind"] == "eval"]
    assert runs["done"] == {
        "name": "done",
        "folder": str(done),
        "objective": "sft",
        "step": 300,
        "steps": 300,
        "metric": "bpb",
        "last": values[-1],
        "best": min(values),
        "age_seconds": pytest.approx(50, abs=30),
        "bytes": sum(path.stat().st_size for path in done.rglob("*") if path.is_file()),
        "finished": True,
    }
    assert (runs["killed"]["step"], runs["killed"]["steps"]) == (310, 900)
    assert not runs["killed"]["finished"]
    expected = ("unknown", 0, None, None)
    assert tuple(runs["broken"][k] for k in ("objective", "step", "steps", "best")) == expected
    assert runs_table(tmp_path / "none") == []
    json.dumps(list(runs.values()))
