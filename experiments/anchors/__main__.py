"""Our learner beside the same update in PyTorch, on the same cores, in turns.

Run with `make bench-anchor`, which gives PyTorch an environment of its own, or with
`python -m experiments.anchors PYTHON [FAMILY ...]`, where PYTHON has torch.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from experiments import bench, devices, presets, run
from experiments.config import RunConfig
from experiments.program import Program

REPEATS, TURNS = 3, 2  # timed calls, each turn of ours between two of theirs
OUT = Path("experiments/results")
_FEW = 10  # updates in a timed call, where each takes long


def theirs(python: str, program: Program) -> dict[str, Any]:
    """Returns updates a second of PyTorch, on as many threads as the program has devices."""
    config, env = program.config, program.env
    size = {
        "observation": env.observation_size,
        "action": env.action_size,
        "history": config.network.history_length,
        "context": config.network.context_size,
        "hidden": config.network.hidden_sizes,
        "policy_delay": config.td3.policy_delay,
        "batch": config.td3.batch_size,
        "rows": config.collect.rows,
        "slots": config.slots_per_row,
        "updates": config.train.updates_per_round,
        "repeats": REPEATS,
        "threads": program.mesh.size,
    }
    script = Path(__file__).with_name("torch_td3.py")
    done = subprocess.run(
        [python, str(script)],
        input=json.dumps(size),
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def compare(python: str, program: Program) -> dict[str, Any]:
    """Returns medians of both, and their ratio, of calls that take turns."""
    others, own = [theirs(python, program)], []
    for _ in range(TURNS):
        own.append(bench.learner(program, REPEATS)["per_second"])
        others.append(theirs(python, program))
    jmql, torch = np.median(own), np.median([x for other in others for x in other["speeds"]])
    return {
        "task": program.config.task,
        "batch": program.config.td3.batch_size,
        "devices": program.mesh.size,
        "jmql": float(jmql),
        "torch": float(torch),
        "ratio": float(jmql / torch),
        "torch_version": others[0]["torch"],
    }


def as_in_adaptation(config: RunConfig) -> RunConfig:
    """Returns a configuration whose batches are as large as those of adaptation."""
    large = config.td3.batch_size * config.adapt.batch_multiple
    return dataclasses.replace(
        config,
        td3=dataclasses.replace(config.td3, batch_size=large),
        train=dataclasses.replace(config.train, updates_per_round=_FEW),
    )


def main(python: str, *tasks: str) -> None:
    """Prints a line for each family and number of devices, and writes anchor-<device>.json."""
    devices.prepare(devices.cores())
    record = run.describe(bench.paper("cheetah_dir"))
    results = []
    for task in tasks or presets.tasks("paper"):
        config = bench.paper(task)
        programs = bench.alone_and_together(config)
        if config.adapt.batch_multiple > 1:
            programs += bench.alone_and_together(as_in_adaptation(config))
        for program in programs:
            row = compare(python, program)
            results.append(row)
            print(
                f"{task:<14}batch {row['batch']:>4}, {row['devices']} devices  JMQL"
                f" {row['jmql']:6.1f}  PyTorch {row['torch']:6.1f} updates/s  ratio"
                f" {row['ratio']:.2f}",
                flush=True,
            )
    kept = ("git_commit", "versions", "device", "platform")
    answer = {"command": "make bench-anchor"} | {k: record[k] for k in kept}
    path = OUT / f"anchor-{record['platform']}.json"
    path.write_text(json.dumps(answer | {"results": results}, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
