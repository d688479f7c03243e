"""Meta-Q-Learning as a learner: TD3 on a context, adapted with replay weighted by propensity."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jmql import adapt, inputs, mesh, networks, replay, rollout, td3
from jmql.config import Config
from jmql.inputs import Scale
from jmql.learner import Learner
from jmql.replay import ReplayState
from jmql.settings import ConfigError
from jmql.td3 import AgentState, ScaledAgentState, Sums
from jmql.types import Array, Batch, History, Key, Metrics, Params, Policy, Task


class Acting(NamedTuple):
    """What acts of an agent."""

    weights: Params
    scale: Scale | None


def acting(agent: AgentState) -> Acting:
    """Returns what acts of an agent."""
    return Acting(agent.params["actor"], agent.scale)


def described(tasks: Task) -> Array:
    """Returns the numbers [E, P] of the tasks of rows, leaves [E, ...] as they are, an angle as a
    number, too; of mean 0 and variance 1 over the rows of all devices, 0 where they are all alike.
    """
    numbers = jnp.concatenate([x.reshape(len(x), -1) for x in jax.tree.leaves(tasks)], axis=1)
    miss = numbers - mesh.mean(numbers.mean(0))[None]
    return miss / jnp.sqrt(mesh.mean(jnp.square(miss).mean(0)) + 1e-8)[None]


def learner(config: Config, action_size: int, task_size: int = 0) -> Learner:
    """Returns Meta-Q-Learning under a configuration, for actions [A] and tasks of P numbers.

    An agent is a `td3.AgentState`, and what acts an `Acting`. Stages of adaptation: `step1`, after
    learning from the first new data alone; `shot1`, `shot2` and so on; and `post`, after the last.
    """
    nets = networks.make(config.network, action_size, task_size)

    def init(key: Key, observation: Array, action: Array) -> AgentState:
        if not config.network.normalize:
            return td3.init(nets, key, observation, action)
        scale = inputs.init(len(observation), config.network.changes)
        agent = td3.init(nets, key, observation, action, scale)
        return ScaledAgentState(**vars(agent), scale=scale)

    def act(actor: Acting, observation: Array, history: History) -> Array:
        return nets.act(actor.weights, *inputs.show(actor.scale, observation, history))

    def explore(actor: Acting, warmup: Array) -> Policy:
        """With Gaussian noise, clipped; uniform actions where `warmup`."""

        def policy(observation: Array, history: History, key: Key) -> tuple[Array, Any]:
            noise_key, uniform_key = jax.random.split(key)
            action = act(actor, observation, history)
            noise = jax.random.normal(noise_key, action.shape)
            action = action + config.collect.exploration_noise * noise
            uniform = jax.random.uniform(uniform_key, action.shape, minval=-1.0, maxval=1.0)
            return jnp.where(warmup, uniform, jnp.clip(action, -1.0, 1.0)), ()

        return rollout.windowed(policy, action_size, config.network.history_length)

    def greedy(actor: Acting, reach: Array, noise: Array | float = 0.0) -> Policy:
        """Deterministic but for the noise."""

        def seen(history: History) -> History:
            age = jnp.arange(len(history.mask))[::-1]
            return history.replace(mask=history.mask & (age < reach))

        def policy(observation: Array, history: History, key: Key) -> tuple[Array, Any]:
            action = act(actor, observation, seen(history))
            action = action + noise * jax.random.normal(key, action.shape)
            return jnp.clip(action, -1.0, 1.0), ()

        def context(history: History) -> Array:
            _, shown = inputs.show(actor.scale, history.observation[-1], seen(history))
            return nets.context(actor.weights, shown)

        most = max(config.network.history_length, config.evaluate.history_length)
        return rollout.windowed(policy, action_size, most, context)

    def learn(
        agent: AgentState,
        memory: ReplayState,
        tasks: Task,
        key: Key,
        active: Array,
        updates: Array,
    ) -> tuple[AgentState, Sums]:
        """Takes `updates_per_round` steps on batches drawn uniformly.

        What networks see is scaled anew before, in warm-up too.
        """
        if agent.scale is not None:
            scale = inputs.update(agent.scale, memory, config.collect.unroll)
            agent = agent.replace(scale=scale)
        shown = functools.partial(inputs.show_batch, agent.scale)
        told = described(tasks) if config.network.task_head else None
        if told is not None and told.shape[1] != task_size:
            raise ConfigError(
                f"network.task_head is True and task_size {task_size}; it must be {told.shape[1]}"
            )

        def draw(key: Key) -> tuple[Batch, Array]:
            size, history = config.td3.batch_size, config.network.history_length
            return shown(replay.sample(memory, key, size, history, told)), jnp.zeros(())

        num = config.train.updates_per_round
        return td3.train(
            config.td3, nets, agent, key, num, draw, active=active, earlier=updates, divided=True
        )

    def metrics(agent: AgentState, sums: Sums) -> Metrics:
        """Means over the steps, and the norm of all weights, which is not finite if one is not."""
        learned = td3.means(sums)
        told = {"task_loss": learned.task_loss} if config.network.task_head else {}
        return told | {
            "critic_loss": learned.critic_loss,
            "actor_loss": learned.actor_loss,
            "q": learned.q,
            "weight_norm": optax.tree.norm((agent.params, agent.target_params)),
        }

    shots = (f"shot{i}" for i in range(1, config.adapt.shots))
    return Learner(
        init,
        acting,
        explore,
        greedy,
        learn,
        td3.no_steps(),
        metrics,
        ("step1", *shots, "post"),
        td3.fresh_optimizer,
        functools.partial(adapt.adapt, config, nets),
    )
