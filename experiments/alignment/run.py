"""Compares alignment methods on equal numbers of tokens.

    python -m experiments.alignment.run [--seeds 3] [--only grpo spo] [--steps 40]

Every case of cases.py starts from the SFT model of its seed and trains for `--steps` rollouts of
256 completions of generated sums. PPO, the variants of GRPO, and SPO train on completions that they
generate; DPO and further SFT train on as many completions of the data set. The default is three
seeds. Each run has its own process, so that its peak memory can be measured.

Results are written to results.json after each case, and cases in that file are not run again, so
an interrupted experiment can be continued. At the end page.py writes README.md and its picture.
With another number of steps than the default, results and page go to the folder `steps-N`.
"""

import json
import multiprocessing
import resource
from itertools import accumulate
from pathlib import Path
from typing import Any

from experiments.alignment import cases, page
from experiments.alignment.evaluation import Evaluation
from experiments.common import Results, parser, results_folder, temporary_runs
from tinsmith.config import from_dict
from tinsmith.core.log import Metrics, read_metrics
from tinsmith.data.formats.pairs import encode_pair, read_pair
from tinsmith.hub.load import load
from tinsmith.text.chat import encode_chat, parse_conversation
from tinsmith.train.trainer import train


class Experiment:
    """Data files in a folder, and the SFT model of each seed, which is trained once."""

    def __init__(self, folder: Path):
        self.folder = folder
        sums = cases.sums()
        self.samples = sums.train
        self.sft_data = self.data(self.write("sft", sums.sft))
        self.train_data = self.data(self.write("train", sums.train))
        self.held_out = self.write("held_out", sums.held_out)
        self._sft_runs: dict[int, tuple[Path, Evaluation]] = {}

    def write(self, name: str, samples: list[dict[str, Any]]) -> Path:
        """Write samples to a JSONL file and return its path."""
        path = self.folder / f"{name}.jsonl"
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        path.write_text(lines, encoding="utf-8")
        return path

    def data(self, path: Path) -> dict[str, Any]:
        """Return the `data:` section of a file, without a validation split."""
        return {"kind": "chats", "path": str(path), "validation": 0.0}

    def sft_run(self, seed: int) -> tuple[Path, Evaluation]:
        """Train the SFT model of a seed once; return its run and the evaluation against it."""
        if seed not in self._sft_runs:
            run = train(from_dict(cases.sft_recipe(self.sft_data, seed)), f"start-{seed}")
            evaluation = Evaluation(run, self.held_out, self.folder / f"prompts-{seed}")
            self._sft_runs[seed] = run, evaluation
        return self._sft_runs[seed]

    def measure(self, name: str, seed: int, rollouts: int) -> dict[str, Any]:
        """Train a case with a seed in a new process and return its record."""
        sft_run, evaluation = self.sft_run(seed)
        recipe = cases.recipe(name, sft_run, self.train_data, seed, rollouts)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            run, memory = pool.apply(train_and_measure_memory, (recipe, f"{name}-{seed}"))
        metrics = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]
        before, tokens = evaluation.accuracy(sft_run), self.tokens(name, sft_run, metrics)
        curve = [[0, before]] + [
            [tokens[int(saved.name.removeprefix("step-")) - 1], evaluation.accuracy(saved)]
            for saved in sorted((run / "checkpoints").glob("step-*"))
        ]
        return {
            **{"case": name, "seed": seed, "rollouts": rollouts, "before": before},
            **{"accuracy": evaluation.accuracy(run), "kl": evaluation.divergence(run)},
            **{"tokens": tokens[-1], "seconds": seconds(metrics), "mib": memory, "curve": curve},
        }

    def tokens(self, name: str, sft_run: Path, metrics: list[Metrics]) -> list[float]:
        """Return the cumulative tokens of completions, generated or trained on, after each step."""
        if name in cases.OFFLINE:
            per_epoch = self._completion_tokens(name, sft_run)
            return [line["epoch"] * per_epoch for line in metrics]
        passes = cases.passes(name)
        generated = accumulate(
            line["completion_length"] * cases.COMPLETIONS for line in metrics[::passes]
        )
        return [total for total in generated for _ in range(passes)]

    def _completion_tokens(self, name: str, sft_run: Path) -> int:
        """Return the tokens of all completions in the data, of both sides of pairs for DPO."""
        _, tokenizer = load(sft_run)
        assert tokenizer is not None
        if name == "sft":
            chats = (encode_chat(tokenizer, parse_conversation(each)) for each in self.samples)
            return sum(sum(chat.mask) for chat in chats)
        pairs = (encode_pair(tokenizer, read_pair(each), cases.SEQ_LEN) for each in self.samples)
        return sum(sum(side.mask) for pair in pairs for side in pair)


def train_and_measure_memory(recipe: dict[str, Any], name: str) -> tuple[Path, float]:
    """Train in this process; return the run and the increase of peak memory in MiB."""
    config, before = from_dict(recipe), _peak_memory()
    return train(config, name), _peak_memory() - before


def _peak_memory() -> float:
    """Return the peak resident memory of this process in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include the memory of the parent process
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS: bytes


def seconds(metrics: list[Metrics]) -> float:
    """Return the seconds of all steps, rollouts included and saves excluded."""
    tokens = [0, *(line["tokens"] for line in metrics)]
    return sum(
        (line["tokens"] - before) / line["tokens_per_second"]
        for before, line in zip(tokens, metrics, strict=False)
    )


def main() -> None:
    options = parser(__doc__, list(cases.CASES))
    options.add_argument("--steps", type=int, default=cases.ROLLOUTS, help="rollouts of a run")
    arguments = options.parse_args()
    out = results_folder(__file__, arguments.steps, cases.ROLLOUTS)
    results = Results(out, "seed", "case")
    with temporary_runs() as folder:
        experiment = Experiment(folder)
        for seed, name in results.missing(range(arguments.seeds), arguments.only):
            results.add(experiment.measure(name, seed, arguments.steps))
    page.write(results.records, out)


if __name__ == "__main__":
    main()
