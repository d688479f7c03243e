"""Meta-training: collect, add, sample, update, all on device."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jmql import replay, rollout, td3
from jmql.config import Config
from jmql.keys import derive
from jmql.networks import Networks
from jmql.replay import ReplayState
from jmql.rollout import ActorCarry
from jmql.td3 import AgentState
from jmql.types import Array, Batch, Env, Key, Metrics, Task, Transition


class TrainState(struct.PyTreeNode):
    """The carry of the compiled loop. Saving it whole makes resuming exact."""

    agent: AgentState
    memory: ReplayState
    actors: ActorCarry  # [E, ...]
    key: Key  # []
    rounds: Array  # [] int32: rounds so far, warm-up included, of config.steps_per_round each


def init(config: Config, env: Env, networks: Networks, tasks: Task, key: Key) -> TrainState:
    """Returns the state before the first step.

    Args:
        config: the whole configuration.
        env: the family.
        networks: the agent's modules.
        tasks: training tasks, leaves [config.tasks.train, ...]; rows take them in turn.
        key: of the seed.
    """
    rows = config.collect.rows
    row_tasks = jax.tree.map(lambda x: x[jnp.arange(rows) % config.tasks.train], tasks)

    def begin(key: Key, task: Task) -> ActorCarry:
        return rollout.begin(env, env.reset(key, task), config.network.history_length)

    actors = jax.vmap(begin)(jax.random.split(derive(key, "starts"), rows), row_tasks)
    observation, action = jnp.zeros(env.observation_size), jnp.zeros(env.action_size)
    never, zero = jnp.zeros((), bool), jnp.zeros(())
    example = Transition(
        observation, action, zero, never, never, observation, jnp.zeros((), jnp.int32)
    )
    return TrainState(
        agent=td3.init(networks, derive(key, "agent"), observation, action),
        memory=replay.init(example, rows, config.slots_per_row),
        actors=actors,
        key=derive(key, "rounds"),
        rounds=jnp.zeros((), jnp.int32),
    )


def round(
    config: Config,
    env: Env,
    networks: Networks,
    state: TrainState,
    warmup: Array,
    updates: Array,
) -> tuple[TrainState, Metrics]:
    """Collects T steps on every row and learns from replay.

    Args:
        config, env, networks: what is trained.
        state: before.
        warmup: [] bool. True: random actions, short episodes, no learning.
        updates: [] int32, what `state.agent.updates` is. Apart from the state, for under vmap over
            seeds it must stay one number: the delayed steps would else be taken every time.

    Returns:
        The state after; the sums of `td3.train`, and of the episodes that ended the sum
        `return_sum`, the number `episodes`, and the number `blew_up` of those whose physics was
        not finite. [] each.
    """
    policy = rollout.exploring(
        networks, state.agent.params["actor"], config.collect.exploration_noise, warmup
    )
    # Warm-up episodes are cut early, so that replay begins with many starts.
    cut = jnp.where(warmup, config.collect.warmup_episode_length, env.episode_length)

    def collect(carry: ActorCarry, key: Key) -> Any:
        return rollout.collect(env, policy, carry, key, config.collect.unroll, cut)

    keys = jax.random.split(derive(state.key, "collect"), config.collect.rows)
    actors, transitions, finished = jax.vmap(collect)(state.actors, keys)
    memory = replay.add(state.memory, transitions)

    def draw(key: Key) -> tuple[Batch, Array]:
        batch = replay.sample(memory, key, config.td3.batch_size, config.network.history_length)
        return batch, jnp.zeros(())

    agent, learned = td3.train(
        config.td3,
        networks,
        state.agent,
        derive(state.key, "learn"),
        config.train.updates_per_round,
        draw,
        config.td3.learning_rate,
        active=~warmup,
        earlier=updates,
    )
    state = TrainState(agent, memory, actors, derive(state.key, "next"), state.rounds + 1)
    ended = {
        "return_sum": finished.return_sum.sum(),
        "episodes": finished.count.sum(),
        "blew_up": finished.blew_up.sum(),
    }
    return state, learned | ended


def epoch(
    config: Config,
    env: Env,
    networks: Networks,
    state: TrainState,
    rounds: Array,
    warmup: Array,
    updates: Array,
) -> tuple[TrainState, Metrics]:
    """Runs `rounds` [] rounds (a value, not a shape: one compiled program serves any number).

    The other arguments are those of `round`.

    Returns:
        The state after, and the metrics: `train/critic_loss`, `train/actor_loss` and `train/q`,
        means over the updates; `train/weight_norm`, of all weights and their targets;
        `collect/return`, the mean return of the episodes that ended, NaN if none did; and
        `collect/blew_up`, how many ended because the physics was not finite. [] each.
    """

    def body(index: Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        state, total = carry
        so_far = updates + index * config.train.updates_per_round
        state, new = round(config, env, networks, state, warmup, so_far)
        return state, jax.tree.map(jnp.add, total, new)

    total = td3.no_steps() | dict.fromkeys(("return_sum", "episodes", "blew_up"), jnp.zeros(()))
    state, total = jax.lax.fori_loop(0, rounds, body, (state, total))
    learned = td3.means(total)
    agent = state.agent
    return state, {
        "train/critic_loss": learned["critic_loss"],
        "train/actor_loss": learned["actor_loss"],
        "train/q": learned["q"],
        "train/weight_norm": optax.tree.norm((agent.params, agent.target_params)),
        "collect/return": total["return_sum"] / total["episodes"],
        "collect/blew_up": total["blew_up"],
    }
