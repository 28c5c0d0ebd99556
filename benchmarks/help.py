"""How long `tinsmith --help` takes, best of five, warm; the bound is 0.3 s.

python benchmarks/help.py
"""

import subprocess
import sys

from common import interleave, table, write

BOUND = 0.3


def ask(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "tinsmith", *words], capture_output=True, check=True)


def main() -> None:
    contestants = {
        "tinsmith --help": lambda: ask("--help"),
        "tinsmith train --help": lambda: ask("train", "--help"),
    }
    seconds = interleave(contestants, 5)
    best = {name: min(each) for name, each in seconds.items()}
    table([{"command": name, "best of five, s": value} for name, value in best.items()])
    print("kept" if max(best.values()) <= BOUND else "NOT kept")
    print(write("help", {"bound": BOUND, "seconds": seconds}))


if __name__ == "__main__":
    main()
