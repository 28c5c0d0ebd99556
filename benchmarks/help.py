"""Measures the time of `tinsmith --help`: best of five with warm caches; the bound is 0.3 s.

python benchmarks/help.py
"""

import subprocess
import sys

from common import interleave, table, write

BOUND = 0.3


def run_tinsmith(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "tinsmith", *words], capture_output=True, check=True)


def main() -> None:
    contestants = {
        "tinsmith --help": lambda: run_tinsmith("--help"),
        "tinsmith train --help": lambda: run_tinsmith("train", "--help"),
    }
    seconds = interleave(contestants, 5)
    best = {name: min(each) for name, each in seconds.items()}
    table([{"command": name, "best of five, s": value} for name, value in best.items()])
    print("kept" if max(best.values()) <= BOUND else "NOT kept")
    print(write("help", {"bound": BOUND, "seconds": seconds}))


if __name__ == "__main__":
    main()
