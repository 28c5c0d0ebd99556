"""`tinsmith runs` and `tinsmith plot`: list runs and draw their curves."""

import json
from pathlib import Path

from tinsmith.core.errors import UserError
from tinsmith.core.log import print_line
from tinsmith.core.units import format_duration, format_size
from tinsmith.train.report import plot_run, plot_runs, runs_table
from tinsmith.train.run_dir import runs_root


def table(as_json: bool) -> None:
    """Print a table of all runs under the runs folder."""
    rows = runs_table(runs_root())
    if as_json:
        print_line(json.dumps(rows, indent=1))
        return
    if not rows:
        print_line(f"no runs under {runs_root()}")
        return
    print_line(
        f"{'name':<32} {'objective':<10} {'step':>13} {'last':>16} {'best':>7} "
        f"{'age':>8} {'size':>8}"
    )
    for row in rows:
        step = f"{row['step']}/{row['steps'] or '?'}"
        last, best = "-", "-"
        if row["metric"] is not None:
            last, best = f"{row['metric']} {row['last']:.3f}", f"{row['best']:.3f}"
        age, size = format_duration(row["age_seconds"]), format_size(row["bytes"])
        note = "" if row["finished"] else "  unfinished"
        print_line(
            f"{row['name']:<32} {row['objective']:<10} {step:>13} {last:>16} {best:>7} "
            f"{age:>8} {size:>8}{note}"
        )


def plot(runs: list[Path], out: Path | None) -> None:
    """Draw the curves of one run into its folder, or of several runs into one picture."""
    for run in runs:
        if not (run / "metrics.jsonl").exists():
            raise UserError(f"{run}: has no metrics.jsonl; name the folder of a run")
    if len(runs) == 1 and out is None:
        print_line(str(plot_run(runs[0])))
    else:
        print_line(str(plot_runs(runs, out or Path("runs.png"))))
