"""Brax's own PPO on one of our single tasks, to hold P3O against.

`python -m experiments.anchors.brax_ppo TASK SEED OUT.jsonl [STEPS]` adds a row an evaluation: the
mean return of its policy without noise over some episodes, and seconds so far.
"""

import contextlib
import functools
import importlib
import io
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import envs
from envs.base import Environment

EVALUATIONS, EPISODES = 16, 8
# What is usual for these tasks since Schulman et al. 2017: 2,048 steps, ten times in eight parts,
# tanh layers of 64. Rewards are scaled by a constant, for Brax does not scale them by their spread.
NUMBERS: dict[str, Any] = dict(
    num_envs=16,
    unroll_length=16,
    batch_size=16,
    num_minibatches=8,
    num_updates_per_batch=10,
    learning_rate=3e-4,
    discounting=0.99,
    gae_lambda=0.95,
    clipping_epsilon=0.2,
    entropy_cost=0.0,
    reward_scaling=0.1,
    max_grad_norm=0.5,
    normalize_observations=True,
)


def adapted(env: Environment) -> Any:
    """Returns one of our environments as one of Brax's. Its wrappers end an episode in time."""
    base = importlib.import_module("brax.envs.base")
    task = jax.tree.map(lambda x: x[0], env.sample_tasks(jax.random.key(0), 1))

    parent: Any = base.Env

    class Adapted(parent):
        """As Brax has it: legacy keys, and a done flag as a number."""

        def reset(self, rng: jax.Array) -> Any:
            """Begins an episode."""
            return self._state(env.reset(jax.random.wrap_key_data(rng), task), {}, {})

        def step(self, state: Any, action: jax.Array) -> Any:
            """Takes a step."""
            return self._state(env.step(state.pipeline_state, action), state.metrics, state.info)

        def _state(self, ours: Any, metrics: Any, info: Any) -> Any:
            done = jnp.float32(ours.terminated | ours.blew_up)
            return base.State(ours, ours.observation, ours.reward, done, metrics, info)

        @property
        def observation_size(self) -> int:
            """O."""
            return env.observation_size

        @property
        def action_size(self) -> int:
            """A."""
            return env.action_size

        @property
        def backend(self) -> str:
            """Its engine."""
            return "mjx"

    return Adapted()


def main(task: str, seed: int, out: Path, steps: int) -> None:
    """Trains, and writes what it earns."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ppo = importlib.import_module("brax.training.agents.ppo.train")
        networks = importlib.import_module("brax.training.agents.ppo.networks")
    # Brax 0.14.2 asks for what JAX 0.10 has no more.
    vars(jax)["device_put_replicated"] = lambda tree, devices: jax.tree.map(
        lambda x: jnp.stack([x] * len(devices)), tree
    )
    env = envs.make(task, "mjx", episode_length=1000)
    sizes = dict(policy_hidden_layer_sizes=(64, 64), value_hidden_layer_sizes=(64, 64))
    begun = time.monotonic()

    def told(done: int, metrics: Any) -> None:
        row = {
            "algorithm": "Brax PPO",
            "task": task,
            "seed": seed,
            "env_steps": int(done),
            "return": float(metrics["eval/episode_reward"]),
            "seconds": time.monotonic() - begun,  # with compilation and evaluation
            "speed": float(metrics.get("training/sps", 0.0)),
        }
        print(row, flush=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    ppo.train(
        adapted(env),
        num_timesteps=steps,
        episode_length=env.episode_length,
        network_factory=functools.partial(networks.make_ppo_networks, activation=jnp.tanh, **sizes),
        seed=seed,
        num_evals=EVALUATIONS,
        num_eval_envs=EPISODES,
        deterministic_eval=True,
        progress_fn=told,
        **NUMBERS,
    )


if __name__ == "__main__":
    name, number, path, *rest = sys.argv[1:]
    main(name, int(number), Path(path), int(rest[0]) if rest else 3_000_000)
