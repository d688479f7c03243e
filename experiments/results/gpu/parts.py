"""Parts of `make bench` for minutes on a GPU: compiled beside each other, timed alone.

    python experiments/results/gpu/parts.py --list
    python experiments/results/gpu/parts.py NAME ... >> parts.jsonl

With JAX_COMPILATION_CACHE_DIR set, a first call for each name in parallel fills the cache.
"""

import dataclasses
import json
import sys

import jax

from experiments import bench, presets
from experiments.program import Program, build


def _mjx(task: str, rows: int) -> Program:
    config = dataclasses.replace(presets.preset(task, "quick"), backend="mjx", devices=1)
    return build(bench._rows(config, rows))


def _tasks(count: int) -> Program:
    config = presets.preset("point_goal", "quick")
    tasks = dataclasses.replace(config.tasks, held_out=count)
    return build(dataclasses.replace(config, tasks=tasks, devices=1))


def _learner(task: str, profile: str) -> Program:
    config = bench.paper(task) if profile == "paper" else presets.preset(task, profile)
    train = dataclasses.replace(config.train, updates_per_round=bench._UPDATES)
    return build(dataclasses.replace(config, devices=1, train=train))


PARTS = {
    "learner cheetah_dir paper": lambda n: bench.learner(_learner("cheetah_dir", "paper"), n),
    "learner cheetah_dir quick": lambda n: bench.learner(_learner("cheetah_dir", "quick"), n),
    "learner ant_dir tuned": lambda n: bench.learner(_learner("ant_dir", "tuned"), n),
    "adaptation point_goal 64": lambda n: bench.adaptation(_tasks(64), n),
    "adaptation point_goal 512": lambda n: bench.adaptation(_tasks(512), n),
} | {
    f"collection {task} mjx {rows}": lambda n, task=task, rows=rows: bench.collection(
        _mjx(task, rows), n
    )
    for task, rows in (
        ("cheetah_dir", 32),
        ("cheetah_dir", 512),
        ("cheetah_dir", 4096),
        ("ant_dir", 512),
        ("ant_dir", 4096),
    )
}

if sys.argv[1] == "--list":
    print("\n".join(PARTS))
else:
    for name in sys.argv[1:]:
        row = {"part": name} | PARTS[name](3)
        row |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        print(json.dumps(row), flush=True)
