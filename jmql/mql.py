"""Meta-Q-Learning as a learner: TD3 on a context, adapted with replay weighted by propensity."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jmql import adapt, networks, replay, td3
from jmql.config import Config
from jmql.learner import Learner, NewData
from jmql.replay import ReplayState
from jmql.td3 import AgentState, Sums
from jmql.types import Array, Batch, History, Key, Metrics, Params, Policy


def learner(config: Config, action_size: int) -> Learner:
    """Returns Meta-Q-Learning under a configuration, for actions [A].

    An agent is a `td3.AgentState`, and what acts its weights `actor`. Stages of adaptation:
    `step1`, after learning from the new data alone, and `post`, after weighted replay.
    """
    nets = networks.make(config.network, action_size)

    def init(key: Key, observation: Array, action: Array) -> AgentState:
        return td3.init(nets, key, observation, action)

    def explore(actor: Params, warmup: Array) -> Policy:
        """With Gaussian noise, clipped; uniform actions where `warmup`."""

        def policy(observation: Array, history: History, key: Key) -> tuple[Array, Any]:
            noise_key, uniform_key = jax.random.split(key)
            action = nets.act(actor, observation, history)
            noise = jax.random.normal(noise_key, action.shape)
            action = action + config.collect.exploration_noise * noise
            uniform = jax.random.uniform(uniform_key, action.shape, minval=-1.0, maxval=1.0)
            return jnp.where(warmup, uniform, jnp.clip(action, -1.0, 1.0)), ()

        return policy

    def greedy(actor: Params, reach: Array) -> Policy:
        """Deterministic."""

        def policy(observation: Array, history: History, _: Key) -> tuple[Array, Any]:
            age = jnp.arange(len(history.mask))[::-1]
            history = history.replace(mask=history.mask & (age < reach))
            return nets.act(actor, observation, history), ()

        return policy

    def learn(
        agent: AgentState, memory: ReplayState, key: Key, active: Array, updates: Array
    ) -> tuple[AgentState, Sums]:
        """Takes `updates_per_round` steps on batches drawn uniformly."""

        def draw(key: Key) -> tuple[Batch, Array]:
            size, history = config.td3.batch_size, config.network.history_length
            return replay.sample(memory, key, size, history), jnp.zeros(())

        num = config.train.updates_per_round
        return td3.train(
            config.td3, nets, agent, key, num, draw, active=active, earlier=updates, divided=True
        )

    def metrics(agent: AgentState, sums: Sums) -> Metrics:
        """Means over the steps, and the norm of all weights, which is not finite if one is not."""
        learned = td3.means(sums)
        return {
            "critic_loss": learned.critic_loss,
            "actor_loss": learned.actor_loss,
            "q": learned.q,
            "weight_norm": optax.tree.norm((agent.params, agent.target_params)),
        }

    def adapted(
        agent: AgentState, data: NewData, memory: ReplayState, key: Key
    ) -> tuple[Params, Metrics]:
        agents, diagnostics = adapt.adapt(config, nets, agent, data, memory, key)
        actors = [stage.params["actor"] for stage in agents]
        return jax.tree.map(lambda *x: jnp.stack(x), *actors), diagnostics

    return Learner(
        init,
        lambda agent: agent.params["actor"],
        explore,
        greedy,
        learn,
        td3.no_steps(),
        metrics,
        ("step1", "post"),
        adapted,
    )
