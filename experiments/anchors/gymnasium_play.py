"""Plays a trained run of a single task in Gymnasium's own environment, under native MuJoCo.

`python -m experiments.anchors.gymnasium_play RUN [EPISODES]` prints a line of JSON: returns of the
policy of the first seed, without noise, there and here.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from experiments import run, tracking
from jmql.types import Transition

NAMES = {
    "half_cheetah": "HalfCheetah-v4",
    "hopper": "Hopper-v4",
    "walker2d": "Walker2d-v4",
    "ant": "Ant-v4",
    "humanoid": "Humanoid-v4",
}


def play(folder: Path, episodes: int) -> dict[str, Any]:
    """Returns the returns of so many episodes."""
    program = run.load(folder, run.read_config(folder))
    state = jax.tree.map(lambda x: x[0], run.trained(folder, program))
    actor = program.learner.actor(state.agent)
    policy = program.learner.greedy(actor, jnp.int32(program.config.network.history_length), 0.0)
    never = jnp.zeros((), bool)

    @jax.jit
    def act(observation: jax.Array, memory: Any) -> Any:
        return policy.act(observation, memory, jax.random.key(0))

    @jax.jit
    def remember(memory: Any, observation: jax.Array, action: Any, reward: Any, step: Any) -> Any:
        seen = Transition(observation, action, reward, never, never, observation, step)
        return policy.remember(memory, seen)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is a version 5
        env = gymnasium.make(NAMES[program.config.task])
    low, high = env.unwrapped.model.actuator_ctrlrange.T
    found = []
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode)
        earned, step, done = 0.0, 0, False
        memory = policy.start(jnp.asarray(observation, jnp.float32))
        while not done:
            seen = jnp.asarray(observation, jnp.float32)
            action, _ = act(seen, memory)
            control = low + (np.asarray(action, float) + 1) / 2 * (high - low)
            observation, reward, terminated, truncated, _ = env.step(control)
            memory = remember(memory, seen, action, jnp.float32(reward), jnp.int32(step))
            earned, step, done = earned + reward, step + 1, terminated or truncated
        found.append(round(float(earned), 1))
    steps = int(state.rounds) * program.config.steps_per_round
    (row, *_) = (row for row in tracking.read(folder) if row["env_steps"] == steps)
    return {
        "task": program.config.task,
        "run": folder.name,
        "env_steps": steps,
        "gymnasium": found,
        "mjx": round(row["eval/return_pre"], 1),
    }


if __name__ == "__main__":
    words = sys.argv[1:]
    print(json.dumps(play(Path(words[0]), int(words[1]) if len(words) > 1 else 8)))
