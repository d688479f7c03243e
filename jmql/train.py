"""Meta-training: collect, add, learn, all on device."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jmql import mesh, replay, rollout
from jmql.config import Config
from jmql.keys import derive
from jmql.learner import Learner
from jmql.replay import ReplayState
from jmql.rollout import ActorCarry, Finished
from jmql.types import Array, Env, Key, Metrics, Task, Transition


class TrainState(struct.PyTreeNode):
    """The carry of the compiled loop. Saving it whole makes resuming exact."""

    agent: Any  # the learner's own
    memory: ReplayState
    actors: ActorCarry  # [E, ...]
    key: Key  # []
    rounds: Array  # [] int32: rounds so far, warm-up included, of config.steps_per_round each


def init(config: Config, env: Env, learner: Learner, tasks: Task, key: Key) -> TrainState:
    """Returns the state before the first step.

    Args:
        config: the whole configuration.
        env: the family.
        learner: the algorithm.
        tasks: training tasks, leaves [config.tasks.train, ...]; rows take them in turn.
        key: of the seed.
    """
    rows = config.collect.rows
    row_tasks = jax.tree.map(lambda x: x[jnp.arange(rows) % config.tasks.train], tasks)

    observation, action = jnp.zeros(env.observation_size), jnp.zeros(env.action_size)
    agent = learner.init(derive(key, "agent"), observation, action)
    policy = learner.explore(learner.actor(agent), jnp.zeros((), bool))

    def begin(key: Key, task: Task) -> ActorCarry:
        return rollout.begin(policy, env.reset(key, task))

    actors = jax.vmap(begin)(jax.random.split(derive(key, "starts"), rows), row_tasks)
    _, behaviour = jax.eval_shape(policy.act, observation, policy.start(observation), key)
    never, zero = jnp.zeros((), bool), jnp.zeros(())
    example = Transition(
        observation, action, zero, never, never, observation, jnp.zeros((), jnp.int32), behaviour
    )
    return TrainState(
        agent=agent,
        memory=replay.init(example, rows, config.slots_per_row),
        actors=actors,
        key=derive(key, "rounds"),
        rounds=jnp.zeros((), jnp.int32),
    )


def round(
    config: Config,
    env: Env,
    learner: Learner,
    state: TrainState,
    warmup: Array,
    updates: Array,
) -> tuple[TrainState, tuple[Any, Finished]]:
    """Collects T steps on every row and learns.

    Args:
        config, env, learner: what is trained.
        state: before.
        warmup: [] bool. True: random actions, short episodes, no learning.
        updates: [] int32, what `state.agent.updates` is, see `Learner.learn`.

    Returns:
        The state after, and the sums of what was learned and of the episodes that ended.
    """
    policy = learner.explore(learner.actor(state.agent), warmup)
    # Warm-up episodes are cut early, so that replay begins with many starts.
    cut = jnp.where(warmup, config.collect.warmup_episode_length, env.episode_length)

    def collect(carry: ActorCarry, key: Key) -> tuple[ActorCarry, Transition, Finished]:
        return rollout.collect(env, policy, carry, key, config.collect.unroll, cut)

    keys = mesh.share(jax.random.split(derive(state.key, "collect"), config.collect.rows))
    actors, transitions, finished = jax.vmap(collect)(state.actors, keys)
    memory = replay.add(state.memory, transitions)
    agent, learned = learner.learn(
        state.agent, memory, actors.env_state.task, derive(state.key, "learn"), ~warmup, updates
    )
    state = TrainState(agent, memory, actors, derive(state.key, "next"), state.rounds + 1)
    return state, (learned, mesh.total(jax.tree.map(lambda x: x.sum(0), finished)))


def epoch(
    config: Config,
    env: Env,
    learner: Learner,
    state: TrainState,
    rounds: Array,
    warmup: Array,
    updates: Array,
) -> tuple[TrainState, Metrics]:
    """Runs `rounds` [] rounds (a value, not a shape: one compiled program serves any number).

    The other arguments are those of `round`.

    Returns:
        The state after, and the metrics [] each: `train/*`, what the learner says of its steps;
        `collect/return` and what else the environment reports, means over the episodes that
        ended, NaN if none did; and `collect/blew_up`, how many ended because the physics was not
        finite.
    """
    Total = tuple[Any, Finished]

    def body(index: Array, carry: tuple[TrainState, Total]) -> tuple[TrainState, Total]:
        state, total = carry
        so_far = updates + index * config.train.updates_per_round
        state, new = round(config, env, learner, state, warmup, so_far)
        return state, jax.tree.map(jnp.add, total, new)

    nothing = rollout.no_episodes(state.actors.env_state.extras)
    state, (learned, ended) = jax.lax.fori_loop(
        0, rounds, body, (state, (learner.no_steps, nothing))
    )
    metrics = {f"train/{k}": v for k, v in learner.metrics(state.agent, learned).items()}
    metrics |= {f"collect/{k}": v for k, v in rollout.means(ended).items()}
    return state, metrics | {"collect/blew_up": ended.blew_up}
