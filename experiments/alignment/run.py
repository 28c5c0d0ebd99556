"""What each way of alignment gains from equal tokens, and what it costs.

    python -m experiments.alignment.run [--seeds 3] [--only grpo spo] [--steps 40]

Every case of cases.py begins with the same SFT model of a seed and goes on for so many rollouts of
256 answers to generated sums: PPO, GRPO with its kin and SPO learn from answers that they generate;
DPO, and SFT that simply goes on, learn from as many answers of the data. By default three seeds.
Each run has a process of its own, for its peak memory. Results go to results.json as they come, and
a case that is there is not run again, so an interrupted run goes on. At the end page.py draws
README.md and its picture. With another number of steps, results and page go to a folder of their
own.
"""

import json
import multiprocessing
import resource
from itertools import accumulate
from pathlib import Path
from typing import Any

from experiments.alignment import cases, page
from experiments.alignment.exam import Exam
from experiments.common import Results, parser, place, workplace
from tinsmith.config import from_dict
from tinsmith.core.log import Metrics, read_metrics
from tinsmith.data.formats.pairs import encode_pair, read_pair
from tinsmith.hub.load import load
from tinsmith.text.chat import encode_chat, parse_conversation
from tinsmith.train.trainer import train


class School:
    """The sums in a folder, and the start of every seed."""

    def __init__(self, folder: Path):
        self.folder = folder
        sums = cases.sums()
        self.rows = sums.learned
        self.taught = self.data(self.write("taught", sums.taught))
        self.learned = self.data(self.write("learned", sums.learned))
        self.held = self.write("held", sums.held_back)
        self._starts: dict[int, tuple[Path, Exam]] = {}

    def write(self, name: str, rows: list[dict[str, Any]]) -> Path:
        """Rows as a file."""
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def data(self, path: Path) -> dict[str, Any]:
        """The `data:` section of a file; nothing of it is held back."""
        return {"kind": "chats", "path": str(path), "validation": 0.0}

    def start(self, seed: int) -> tuple[Path, Exam]:
        """The SFT model of a seed, and the exam of all that begin with it."""
        if seed not in self._starts:
            begun = train(from_dict(cases.start(self.taught, seed)), f"start-{seed}")
            self._starts[seed] = begun, Exam(begun, self.held, self.folder / f"exam-{seed}")
        return self._starts[seed]

    def case(self, name: str, seed: int, rollouts: int) -> dict[str, Any]:
        """All that is measured of one case and seed."""
        begun, exam = self.start(seed)
        recipe = cases.recipe(name, begun, self.learned, seed, rollouts)
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            run, memory = alone.apply(practise, (recipe, f"{name}-{seed}"))
        lines = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]
        before, spent = exam.accuracy(begun), self.tokens(name, begun, lines)
        curve = [[0, before]] + [
            [spent[int(saved.name.removeprefix("step-")) - 1], exam.accuracy(saved)]
            for saved in sorted((run / "checkpoints").glob("step-*"))
        ]
        return {
            **{"case": name, "seed": seed, "rollouts": rollouts, "before": before},
            **{"accuracy": exam.accuracy(run), "kl": exam.divergence(run), "tokens": spent[-1]},
            **{"seconds": seconds(lines), "mib": memory, "curve": curve},
        }

    def tokens(self, name: str, begun: Path, lines: list[Metrics]) -> list[float]:
        """Tokens of answers after each step: generated, or trained where the data answers."""
        if name in cases.OFFLINE:
            once = self._answers(name, begun)
            return [line["epoch"] * once for line in lines]
        passes = cases.passes(name)
        generated = accumulate(
            line["completion_length"] * cases.ANSWERS for line in lines[::passes]
        )
        return [total for total in generated for _ in range(passes)]

    def _answers(self, name: str, begun: Path) -> int:
        """Tokens of all answers of the data: of both sides, where a case learns from pairs."""
        _, tokenizer = load(begun)
        assert tokenizer is not None
        if name == "sft":
            return sum(
                sum(encode_chat(tokenizer, parse_conversation(row)).mask) for row in self.rows
            )
        pairs = (encode_pair(tokenizer, read_pair(row), cases.ROOM) for row in self.rows)
        return sum(sum(side.mask) for pair in pairs for side in pair)


def practise(recipe: dict[str, Any], name: str) -> tuple[Path, float]:
    """Train in this process: the run, and by how many MiB that raised the most it ever held."""
    config, before = from_dict(recipe), _peak()
    return train(config, name), _peak() - before


def _peak() -> float:
    """MiB of resident memory at most, so far."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says here begins with what the parent process held
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS: bytes


def seconds(lines: list[Metrics]) -> float:
    """Spent on steps, rollouts included; not on saves."""
    tokens = [0, *(line["tokens"] for line in lines)]
    return sum(
        (line["tokens"] - before) / line["tokens_per_second"]
        for before, line in zip(tokens, lines, strict=False)
    )


def main() -> None:
    words = parser(__doc__, list(cases.CASES))
    words.add_argument("--steps", type=int, default=cases.ROLLOUTS, help="rollouts of a run")
    requested = words.parse_args()
    out = place(__file__, requested.steps, cases.ROLLOUTS)
    results = Results(out, "seed", "case")
    with workplace() as folder:
        school = School(folder)
        for seed, name in results.missing(range(requested.seeds), requested.only):
            results.add(school.case(name, seed, requested.steps))
    page.write(results.rows, out)


if __name__ == "__main__":
    main()
