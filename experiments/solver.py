"""What constraints and their solver in use cost and err, beside MJX's own, and with other contacts.

Run with `python -m experiments.solver FILE.json [FAMILY ...]`: some minutes a family, most of them
to compile. Rows of random play go on under each setting from the same states, and are compared with
MJX's solver at MuJoCo's own numbers and all contacts.
"""

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import envs
from envs import steps
from experiments import presets, run

FAMILIES = ("cheetah_vel", "walker_params", "ant_dir", "humanoid_dir")
ROWS, STEPS, REPEATS = 64, 10, 5
# Contacts that are kept, and the most iterations of the solver and of the line search of MJX's own;
# None is the family's own number of the first, the model's of the second, and our rows and solver.
SETTINGS: tuple[tuple[int | None, int | None, int | None], ...] = (
    (0, None, 50),
    (0, None, 4),
    (None, None, 4),
    (None, None, None),
    (None, 4, None),
)
_MOVING = ("q", "qd", "qpos", "qvel", "qacc_warmstart")


def with_contacts(family: str, contacts: int | None) -> Any:
    """Returns a family on mjx that keeps so many contacts; 0 is all, None its own number."""
    kind: Any = envs.load(family)
    engine = kind.engines["mjx"]
    kept = engine.contacts if contacts is None else contacts
    engine = dataclasses.replace(engine, contacts=kept)
    return type(kind.__name__, (kind,), {"engines": {"mjx": engine}})("mjx")


def play(env: Any, states: Any, actions: jax.Array) -> Any:
    """Returns the states [ROWS] after actions [STEPS, ROWS, A]."""

    def step(states: Any, action: jax.Array) -> tuple[Any, None]:
        return jax.vmap(env.step)(states, action), None

    return jax.lax.scan(step, states, actions)[0]


def measure(family: str) -> list[dict[str, Any]]:
    """Returns a row for each setting: speed, seconds to compile, errors (m, rad, and a second)."""
    env = with_contacts(family, 0)
    keys = jax.random.split(jax.random.key(0), ROWS)
    shape = (STEPS, ROWS, env.action_size)
    first, actions = (
        jax.random.uniform(jax.random.key(i), shape, minval=-1.0, maxval=1.0) for i in (1, 2)
    )
    tasks = env.sample_tasks(jax.random.key(3), ROWS)
    states = jax.jit(jax.vmap(env.reset))(keys, tasks)
    states = jax.jit(lambda states: play(env, states, first))(states)
    moving = {name: getattr(states.physics, name) for name in _MOVING}
    rows: list[dict[str, Any]] = []
    reference = None
    for contacts, iterations, ls_iterations in SETTINGS:
        env = with_contacts(family, contacts)
        contacts = env.engines["mjx"].contacts
        system = env._system
        iterations = iterations or int(system.opt.iterations)
        opt = system.opt.replace(iterations=iterations, ls_iterations=ls_iterations or 0)
        env._system = system.replace(opt=opt)
        # The rest of the physics follows from what moves; its shapes are those of the contacts.
        fresh = jax.jit(jax.vmap(env.reset))(keys, tasks)
        states = fresh.replace(physics=fresh.physics.replace(**moving))
        begun = time.monotonic()
        with mock.patch.object(steps, "solves", lambda _, ours=ls_iterations is None: ours):
            compiled = jax.jit(functools.partial(play, env)).lower(states, actions).compile()
        compile_seconds = time.monotonic() - begun
        after, seconds = compiled(states, actions), []
        for _ in range(REPEATS):
            begun = time.monotonic()
            jax.block_until_ready(compiled(states, actions))
            seconds.append(time.monotonic() - begun)
        place = np.concatenate([after.physics.q, after.physics.qd], axis=1)
        reference = place if reference is None else reference
        error = np.abs(place - reference).max(axis=1)
        rows.append(
            {
                "family": family,
                "contacts": contacts,
                "solver": "ours" if ls_iterations is None else "mjx",
                "iterations": iterations,
                "ls_iterations": ls_iterations,
                "env_steps_per_second": ROWS * STEPS / float(np.median(seconds)),
                "compile_seconds": compile_seconds,
                "error_median": float(np.median(error)),
                "error_p90": float(np.quantile(error, 0.9)),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main(path: Path, families: tuple[str, ...]) -> None:
    """Measures families and writes a JSON file."""
    jax.config.update("jax_enable_compilation_cache", False)
    record = run.describe(presets.preset("cheetah_vel", "paper"))
    kept = ("git_commit", "versions", "device", "platform")
    result = {name: record[name] for name in kept} | {
        "command": f"python -m experiments.solver {path} {' '.join(families)}",
        "rows": [],
    }
    for family in families:
        result["rows"] += measure(family)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    jnp.zeros(())  # the backend starts before anything is timed
    main(Path(sys.argv[1]), tuple(sys.argv[2:]) or FAMILIES)
