"""Asks what a history of `ant_goal` says of the goal, and how much of it an encoder learns to read.

`python experiments/results/ant_goal/probe.py ORACLE_RUN OUT.jsonl SEED` plays an episode of each of
many goals in two ways, by an untrained agent and by one that walks to another goal, both with
noise, and adds lines of estimates from windows of 15 steps of goals that were never seen:

- `knowable`: the mean of all goals under which these steps would have earned what they did;
- `raw`, `changes`: `jmql`'s own encoder with a linear head, learned by regression on so many goals,
  from what a history has, and with its changes from step to step beside it (of actions, too), all
  standardised.

`miss` is the mean distance of the estimate (m), `cosine` that of the ways to it and to the goal,
where this is farther than half a metre.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from experiments import run
from jmql import rollout
from jmql.networks import ContextGRU
from jmql.types import Array, History

TRAIN, TEST, HISTORY = 2048, 256, 15
UPDATES, BATCH, SIZE, LEARNING_RATE = 3000, 128, 64, 3e-3


class Played(NamedTuple):
    """An episode of each of K goals; the last `TEST` are held out."""

    seen: Array  # [K, T, O + A + 1] observation, action and reward
    place: Array  # [K, T, 2] of the torso after each step (m)
    distance: Array  # [K, T] to the goal, L1 (m), as the reward says it
    goal: Array  # [K, 2]


def play(program: Any, actor: Any, seed: int) -> Played:
    """Plays episodes of an agent that is told of other goals, with noise of 0.2."""
    env, count = program.env, TRAIN + TEST
    greedy = program.learner.greedy(actor, jnp.float32(jnp.inf), 0.2)
    tasks = env.sample_tasks(jax.random.key(seed), count)
    others = env.sample_tasks(jax.random.key(1000 + seed), count)["goal"]

    def episode(task: Any, other: Array, key: Any) -> Any:
        def act(observation: Array, history: History, key: Any) -> Any:
            return greedy.act(observation.at[-2:].set(other), history, key)

        start_key, key = jax.random.split(key)
        policy = rollout.windowed(act, env.action_size, 1)
        start = rollout.begin(policy, env.reset(start_key, task))
        return rollout.episode(env, policy, start, key).steps

    keys = jax.random.split(jax.random.key(2000 + seed), count)
    steps = jax.jit(jax.vmap(episode))(tasks, others, keys)
    seen = [steps.observation[..., :-2], steps.action, steps.reward[..., None]]
    distance = -steps.reward - 0.1 * jnp.square(steps.action).sum(-1)
    place = steps.next_observation[..., :2]
    return Played(jnp.concatenate(seen, -1), place, distance, tasks["goal"])


def knowable(place: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Returns estimates [N, 2] from windows of places [N, H, 2] and distances [N, H]."""
    side = np.arange(-3, 3.001, 0.05)
    grid = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    grid = grid[np.square(grid).sum(1) <= 9]
    found = []
    for places, far in zip(place, distance, strict=True):
        l1 = np.abs(grid[:, None] - places).sum(-1)
        miss = np.abs(l1 - far).max(1)
        found.append(grid[miss <= max(0.05, miss.min() + 1e-3)].mean(0))  # half a cell
    return np.array(found)


def learned(x: Array, goal: Array, count: int, seed: int) -> Any:
    """Returns a function of rows and steps [B] that estimates goals [B, 2] from x [K, T, I].

    It is learned on the first `count` goals.
    """

    class Estimator(nn.Module):
        @nn.compact
        def __call__(self, x: Array, mask: Array) -> Array:
            history = History(x[..., :0], x, jnp.zeros(mask.shape), mask)
            return nn.Dense(2)(ContextGRU(SIZE)(history))

    def cut(row: Array, step: Array) -> tuple[Array, Array]:
        places = step[:, None] - jnp.arange(HISTORY)[::-1]
        return x[row[:, None], jnp.maximum(places, 0)], places >= 0

    module, optimizer = Estimator(), optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, UPDATES))

    def update(carry: Any, key: Any) -> Any:
        params, state = carry
        row_key, step_key = jax.random.split(key)
        row = jax.random.randint(row_key, (BATCH,), 0, count)
        step = jax.random.randint(step_key, (BATCH,), 0, x.shape[1])

        def loss(params: Any) -> Array:
            estimate = jnp.asarray(module.apply(params, *cut(row, step)))
            return jnp.square(estimate - goal[row]).mean()

        change, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, change), state), None

    first = jnp.zeros(1, int)
    params: Any = module.init(jax.random.key(seed), *cut(first, first))
    keys = jax.random.split(jax.random.key(seed + 1), UPDATES)
    scan = jax.jit(lambda carry: jax.lax.scan(update, carry, keys)[0])
    params, _ = scan((params, optimizer.init(params)))
    return jax.jit(lambda row, step: module.apply(params, *cut(row, step)))


def inputs(seen: Array, changes: bool) -> Array:
    """Returns what an encoder reads, standardised over training goals."""
    if changes:
        change = jnp.diff(seen, axis=1, prepend=seen[:, :1])
        seen = jnp.concatenate([seen, change], -1)
    flat = seen[:TRAIN].reshape(-1, seen.shape[-1])
    return jnp.clip((seen - flat.mean(0)) / (flat.std(0) + 1e-4), -10, 10)


def estimates(
    played: Played, row: np.ndarray, step: np.ndarray, seed: int
) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """Gives how the goals of these windows [N] are estimated, on how many goals, and the estimates
    [N, 2].
    """
    middle = np.asarray(played.goal)[:TRAIN].mean(0)
    yield "middle", None, np.broadcast_to(middle, (len(row), 2))
    window = row[:, None], step[:, None] - np.arange(HISTORY)[::-1]
    place, distance = (np.asarray(x)[window] for x in (played.place, played.distance))
    yield "knowable", None, knowable(place, distance)
    for goals in (128, 512, TRAIN):
        for how in ("raw", "changes"):
            estimate = learned(inputs(played.seen, how == "changes"), played.goal, goals, seed)
            yield how, goals, np.asarray(estimate(row, step))


def main(oracle: Path, out: Path, seed: int) -> None:
    """Writes the lines."""
    config = run.read_config(oracle)
    if not config.observe_task or config.network.context_size:
        sys.exit(f"{oracle} is no oracle; valid: --observe-task --network.context-size 0")
    program = run.load(oracle, config)
    walks, untrained = (
        jax.tree.map(lambda x: x[0], program.learner.actor(agent))
        for agent in (run.trained(oracle, program).agent, program.init(program.keys).agent)
    )
    row = np.arange(TRAIN, TRAIN + TEST)
    step = np.random.default_rng(seed).integers(HISTORY, 200, TEST)
    for way, actor in {"untrained": untrained, "walks elsewhere": walks}.items():
        played = play(program, actor, seed)
        goal, here = np.asarray(played.goal)[row], np.asarray(played.place)[row, step]
        wanted = goal - here
        far = np.linalg.norm(wanted, axis=1) > 0.5
        for how, goals, estimate in estimates(played, row, step, seed):
            guessed = estimate - here
            lengths = np.linalg.norm(wanted, axis=1) * np.linalg.norm(guessed, axis=1)
            cosine = (wanted * guessed).sum(1) / np.maximum(lengths, 1e-6)
            line = {
                "way": way,
                "seed": seed,
                "how": how,
                "goals": goals,
                "miss": round(float(np.linalg.norm(estimate - goal, axis=1).mean()), 3),
                "cosine": round(float(cosine[far].mean()), 3),
            }
            print(json.dumps(line), flush=True)
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
