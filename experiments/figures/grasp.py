"""Draws how an arm picks up one object of each kind, before and after it adapts to it."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from envs.arm import KINDS, ArmPick
from envs.physics import Shapes
from experiments import run
from experiments.figures.drawing import BODY, camera, draw_body
from experiments.report import episodes
from jmql.keys import derive
from jmql.settings import ConfigError

OBJECT, QUIET = "#c2410c", "#475569"
PARTS = 4  # capsules of the object, the last of the model
SHOTS = 10  # of adaptation
WIDE, HIGH = 0.95, 0.7  # of a frame (m)


def draw(folder: Path, picture: Path) -> None:
    """Draws the end of an episode with an object of each kind, of a run of `arm_pick`."""
    import matplotlib.pyplot as plt

    config = run.read_config(folder)
    adapt = dataclasses.replace(config.adapt, shots=SHOTS)
    program = run.load(folder, dataclasses.replace(config, adapt=adapt, devices=1))
    env = program.env
    if not isinstance(env, ArmPick):
        raise ConfigError(f"{folder} is a run of {program.config.task}; valid: of arm_pick")
    state = jax.tree.map(lambda x: x[0], run.trained(folder, program))
    drawn = [
        env.sample_tasks(derive(state.key, f"a {kind}"), 1, {"kind": (k, k + 1.0)})
        for k, kind in enumerate(KINDS)
    ]
    tasks = jax.tree.map(lambda *x: jnp.concatenate(x), *drawn)
    seen = episodes.play(program, state, tasks, derive(state.key, "grasps"))
    returns = np.where(seen["alive"], seen["reward"], 0.0).sum(-1)
    figure, axes = plt.subplots(2, len(KINDS), figsize=(10, 3.9), sharex=True, sharey=True)
    eye = camera(0.0, 0.0)
    trained = set(np.asarray(program.train_tasks["kind"]).astype(int).tolist())
    for k, kind in enumerate(KINDS):
        for row, when in enumerate(("before", f"after {SHOTS} episodes")):
            axis = axes[row, k]
            end = seen["alive"][k, row].sum() - 1
            shapes = Shapes(*(seen[name][k, row, end] for name in ("ends", "radius", "corners")))
            arm = len(shapes.radius) - PARTS
            draw_body(axis, eye, shapes, np.zeros(2), [BODY] * arm + [OBJECT] * PARTS)
            axis.plot([-WIDE / 2, WIDE / 2], [0, 0], color="#94a3b8", lw=0.8)
            axis.set(xlim=(-WIDE / 2, WIDE / 2), ylim=(-0.05, HIGH), aspect="equal")
            axis.axis("off")
            axis.text(0, -0.13, f"{when}: {returns[k, row]:.0f}", ha="center", color=QUIET, size=8)
        new = "" if k in trained else ", never seen"
        axes[0, k].set_title(f"{kind}{new}", color=QUIET if k in trained else OBJECT, size=10)
    figure.tight_layout(pad=0.4)
    figure.savefig(picture, dpi=120)
