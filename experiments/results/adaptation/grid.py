"""Adapts trained runs under one setting after the other, and appends a line for each to a file.

    python -m experiments.results.adaptation.grid FILE WHERE TASKS SHOTS RUN... -- SETTINGS...

WHERE is a split, or ranges such as velocity:3:4. SETTINGS are such as `prox_coef=1,updates=50`, of
`adapt`, or `propensity.observation=true`, `td3.discount=0.95`. All seeds of all runs are adapted to
the same tasks.
"""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import evaluate, run
from experiments.config import RunConfig
from experiments.program import learner_of, split
from jmql.keys import derive

BASE = {
    "learning_rate": 1e-3,
    "updates": 100,
    "new_share": 0.5,
    "step1_updates": 0,
    "batch_multiple": 2,
    "prox_coef": 0.1,
    "exploration_noise": 0.0,
}


def setting(config: RunConfig, words: str, shots: int) -> RunConfig:
    """Returns a configuration with the settings that words name."""
    adapt: dict[str, Any] = BASE | {"shots": shots}
    others: dict[str, dict[str, Any]] = {"propensity": {}, "td3": {}}
    for word in words.split(",") if words != "base" else ():
        name, text = word.split("=")
        value: Any = text
        with contextlib.suppress(ValueError):
            value = json.loads(text)
        component, _, field = name.rpartition(".")
        (others[component] if component else adapt)[field] = value
    return dataclasses.replace(
        config,
        adapt=dataclasses.replace(config.adapt, **adapt),
        propensity=dataclasses.replace(config.propensity, **others["propensity"]),
        td3=dataclasses.replace(config.td3, **others["td3"]),
    )


def main(
    file: str, where: str, num: int, shots: int, folders: list[str], settings: list[str]
) -> None:
    """Appends a line for each setting."""
    programs = [
        run.load(Path(folder), dataclasses.replace(run.read_config(Path(folder)), devices=1), num)
        for folder in folders
    ]
    states = [
        run.trained(Path(folder), program)
        for folder, program in zip(folders, programs, strict=True)
    ]
    first = programs[0]
    if ":" in where:
        parts = (part.split(":") for part in where.split(","))
        ranges: Any = {name: (float(low), float(high)) for name, low, high in parts}
    else:
        ranges = split(first.env, first.config.task, where)[1]
    key = jax.random.key(11)
    tasks = first.env.sample_tasks(derive(key, "fresh tasks"), num, ranges)
    for words in settings:
        returns, ess = [], []
        for program, state in zip(programs, states, strict=True):
            config = setting(program.config, words, shots)
            other = dataclasses.replace(
                program, config=config, learner=learner_of(config, program.env)
            )
            found = evaluate.prepare(other, state, tasks, jax.random.key(5))(config.adapt.updates)
            stages = [stage for stage in other.stages if stage != "return_step1"]
            returns += [*np.stack([found.metrics[x] for x in stages], axis=1)]  # [S][stage, N]
            ess += [*found.metrics["ess"].mean(1)]
        by_seed = np.mean(returns, axis=2)
        line = {"where": where, "tasks": num, "runs": folders, "settings": words}
        line |= {"adapt": dataclasses.asdict(config.adapt), "ess": float(np.mean(ess))}
        line |= {"by_seed": by_seed.round(2).tolist(), "mean": by_seed.mean(0).round(2).tolist()}
        with Path(file).open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
        print(words, line["mean"], flush=True)


if __name__ == "__main__":
    file, where, num, shots, *rest = sys.argv[1:]
    end = rest.index("--")
    main(file, where, int(num), int(shots), rest[:end], rest[end + 1 :])
