"""Policy-on policy-off policy optimization (Fakoor, Chaudhari and Smola, UAI 2019).

Each round takes one step on what was just collected, and then a Poisson number of steps on
fragments from replay: the losses are in `jmql.policy_gradient`. For continuous control the paper
gives no numbers of its own: docs/p3o.md says what is ours.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jmql import inputs, replay
from jmql.config import Config
from jmql.inputs import Moments
from jmql.keys import derive
from jmql.learner import Learner
from jmql.networks import ActorCritic
from jmql.policy_gradient import (
    Acting,
    AgentState,
    Behaviour,
    Returns,
    counted,
    optimizer,
    remember,
    update,
)
from jmql.replay import ReplayState
from jmql.types import Array, History, Key, Metrics, Policy, Task, Transition


class Memory(struct.PyTreeNode):
    """What the policy remembers of a trial."""

    context: Array  # [Z]
    episodes: Array  # [] int32: that have begun


class Sums(struct.PyTreeNode):
    """What is added up over steps, [] each."""

    on: Metrics  # over on-policy steps
    on_steps: Array  # how many
    off: Metrics  # over off-policy steps
    off_steps: Array  # how many


def learner(config: Config, action_size: int) -> Learner:
    """Returns P3O under a configuration, for actions [A].

    An agent is an `AgentState`, what acts an `Acting`. It does not adapt: with `context_span` trial
    its stages are the later episodes of a trial, `episode2` and so on, and `post`, the last.
    """
    p3o, network = config.p3o, config.network
    modules = ActorCritic(network.hidden_sizes, network.context_size, action_size, p3o.initial_std)
    trial = p3o.trial_episodes if config.context_span == "trial" else 1
    # In rounds, for environment steps are too many to be counted in 32 bits.
    whole = config.total_rounds - config.warmup_rounds
    waiting = -(-p3o.off_policy_after // config.steps_per_round) - config.warmup_rounds

    def init(key: Key, observation: Array, action: Array) -> AgentState:
        began = jnp.concatenate([observation, jnp.zeros(1)])
        history = History(began[None], action[None], jnp.zeros(1), jnp.zeros(1, bool))
        context, zero = jnp.zeros(network.context_size), jnp.zeros(())
        params = modules.init(key, observation, history, context)
        scale = inputs.init(len(observation)) if network.normalize else None
        rows = jnp.zeros(config.collect.rows)
        returns = Returns(rows, Moments(zero, jnp.ones(())), jnp.zeros(()))
        none = jnp.zeros((), jnp.int32)
        return AgentState(
            params,
            optimizer(p3o).init(params),
            updates=none,
            rounds=jnp.zeros_like(none),
            scale=scale,
            returns=returns if network.normalize else None,
        )

    def actor(agent: AgentState) -> Acting:
        return Acting(agent.params, agent.scale)

    def policy(actor: Acting, draw: Any) -> Policy:
        def start(_: Array) -> Memory:
            return Memory(jnp.zeros(network.context_size), jnp.zeros((), jnp.int32))

        def act(observation: Array, memory: Memory, key: Key) -> tuple[Array, Any]:
            shown = inputs.show_observation(actor.scale, observation)
            run: Any = functools.partial(modules.apply, actor.weights)
            mean, log_std = run(shown, memory.context, method="distribution")
            return draw(Behaviour(mean, log_std, memory.context), key)

        def after(memory: Memory, step: Transition) -> Memory:
            context = remember(modules, actor, memory.context, step)
            return Memory(context, memory.episodes + (step.step == 0))

        def lasts(memory: Memory) -> Array:
            return memory.episodes < trial

        def context(memory: Memory) -> Array:
            return memory.context

        return Policy(start, act, after, context, lasts if trial > 1 else None)

    def explore(actor: Acting, _: Array) -> Policy:
        """Draws actions, in warm-up too, for what it did must be known; not clipped."""

        def draw(behaviour: Behaviour, key: Key) -> tuple[Array, Behaviour]:
            noise = jax.random.normal(key, behaviour.mean.shape)
            return behaviour.mean + jnp.exp(behaviour.log_std) * noise, behaviour

        return policy(actor, draw)

    def greedy(actor: Acting, _: Array, noise: Array | float = 0.0) -> Policy:
        """The mean, with noise. It sees the whole episode, or trial."""

        def draw(behaviour: Behaviour, key: Key) -> tuple[Array, Any]:
            action = behaviour.mean + noise * jax.random.normal(key, behaviour.mean.shape)
            return jnp.clip(action, -1.0, 1.0), ()

        return policy(actor, draw)

    def learning_rate(agent: AgentState) -> Array:
        """Falls linearly over the rounds of the run."""
        return p3o.learning_rate * jnp.maximum(0.0, 1.0 - agent.rounds / whole)

    def learn(
        agent: AgentState,
        memory: ReplayState,
        _tasks: Task,
        key: Key,
        active: Array,
        _updates: Array,
    ) -> tuple[AgentState, Sums]:
        """One step on the newest round, and then a Poisson number of steps on replay.

        What networks see is scaled anew before, in warm-up too.
        """
        length = config.collect.unroll
        newest = replay.newest(memory, length)
        if agent.scale is not None and agent.returns is not None:
            agent = agent.replace(
                scale=inputs.update(agent.scale, memory, length),
                returns=counted(p3o, agent.returns, newest),
            )
        rate = learning_rate(agent)
        later = agent.rounds >= waiting
        num = jax.random.poisson(derive(key, "number"), p3o.off_policy_steps) * later

        def on(_: Array, carry: tuple[AgentState, Metrics]) -> tuple[AgentState, Metrics]:
            agent, total = carry
            agent, found = update(p3o, modules, agent, newest, rate, off_policy=False)
            return agent, jax.tree.map(jnp.add, total, found)

        def off(index: Array, carry: tuple[AgentState, Metrics]) -> tuple[AgentState, Metrics]:
            agent, total = carry
            draw = jax.random.fold_in(derive(key, "fragments"), index)
            steps = replay.fragments(memory, draw, p3o.minibatch, length)
            agent, found = update(p3o, modules, agent, steps, rate, off_policy=True)
            return agent, jax.tree.map(jnp.add, total, found)

        none = no_steps()
        once = jnp.where(active, 1, 0)
        agent, on_policy = jax.lax.fori_loop(0, once, on, (agent, none.on))
        agent, off_policy = jax.lax.fori_loop(0, once * num, off, (agent, none.off))
        agent = agent.replace(rounds=agent.rounds + once)
        return agent, Sums(on_policy, 1.0 * once, off_policy, 1.0 * once * num)

    def metrics(agent: AgentState, sums: Sums) -> Metrics:
        """Means over the steps, and the norm of all weights, which is not finite if one is not.

        `policy_loss`, `value_loss`, `entropy` and `grad_norm` are of on-policy steps; `ess`,
        `clip`, `kl_coef`, `kl` and `off_*` of off-policy steps, 0 before there are any.
        """
        on = {name: x / jnp.maximum(1.0, sums.on_steps) for name, x in sums.on.items()}
        off = {name: x / jnp.maximum(1.0, sums.off_steps) for name, x in sums.off.items()}
        alike = {f"off_{name}" if name in on else name: x for name, x in off.items()}
        return (
            on
            | alike
            | {
                "off_policy_steps": sums.off_steps / jnp.maximum(1.0, sums.on_steps),
                "learning_rate": learning_rate(agent),
                "weight_norm": optax.tree.norm(agent.params),
            }
        )

    later = [f"episode{i}" for i in range(2, trial)]
    stages = (*later, "post") if trial > 1 else ()
    return Learner(init, actor, explore, greedy, learn, no_steps(), metrics, stages)


def no_steps() -> Sums:
    """Returns the sums before the first step."""
    zero = jnp.zeros(())
    on = dict.fromkeys(("value_loss", "entropy", "policy_loss", "grad_norm"), zero)
    off = on | dict.fromkeys(("ess", "clip", "kl_coef", "kl"), zero)
    return Sums(on, zero, off, zero)
