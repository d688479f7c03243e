"""Prints a line for each seed of runs of P3O: what they changed of their profile, and their curves.

`python experiments/results/p3o/gather.py RUN... >> experiments/results/p3o/FILE.jsonl`
"""

import json
import sys
from pathlib import Path

from experiments.config import all_seeds
from experiments.report import source
from jmql.settings import Kind, flatten

CURVES = ("eval/return_pre", "eval/return_episode2", "eval/return_post", "train/ess")


def main(folders: list[Path]) -> None:
    """Prints the lines."""
    for folder in folders:
        it = source.read(folder)
        for seed in all_seeds(it.config):
            mine = [row for row in it.rows if row["seed"] == seed]
            found = {
                name: [round(row[name], 3) if name in row else None for row in mine]
                for name in CURVES
                if any(name in row for row in mine)
            }
            host = flatten(it.config, Kind.HOST).keys() - {"train.env_steps"}
            line = {
                "run": folder.name,
                "task": it.config.task,
                "algorithm": it.config.algorithm,
                "profile": it.config.profile,
                "seed": seed,
                "changed": {
                    name: value for name, value, _ in it.changed if name not in (*host, "seed")
                },
                "env_steps": [row["env_steps"] for row in mine],
                "minutes": [round(it.seconds[row["env_steps"]] / 60, 2) for row in mine],
                "compile_seconds": round(mine[-1]["time/compile_seconds"]),
            }
            print(json.dumps(line | found))


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]])
