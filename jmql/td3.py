"""Twin delayed deep deterministic policy gradients (Fujimoto et al. 2018) on a learned context.

    critic step: y = r + discount (1 - terminated) min_i Q'_i(s', clip(u'(s') + noise))
                 loss = mean w [(Q1 - y)^2 + (Q2 - y)^2] + lambda |theta - anchor|^2
    actor step:  loss = -mean w Q1(s, u(s)) + lambda |theta - anchor|^2    } after the first of
    targets:     theta' <- theta' + tau (theta - theta')                   } `policy_delay` steps

Where a batch says its tasks, each loss has mean (head(z) - task)^2 beside it. The same update
serves meta-training (w = 1, no anchor) and adaptation (docs/method.md section 2).
"""

from collections.abc import Callable
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from jmql import inputs, mesh
from jmql.config import TD3Config
from jmql.inputs import Scale
from jmql.networks import Networks
from jmql.types import Array, Batch, History, Key, Metrics, Params


class AgentState(struct.PyTreeNode):
    """A learner: online and target weights under the keys `actor` and `critic`."""

    params: dict[str, Params]
    target_params: dict[str, Params]
    opt_state: dict[str, Any]  # one Adam for each network
    updates: Array  # [] int32: critic steps so far
    scale: ClassVar[Scale | None] = None  # networks see everything as it is


class ScaledAgentState(AgentState):
    """A learner whose networks see what is scaled. Apart, for a field changes checkpoints."""

    scale: Scale  # type: ignore[misc]  # of each agent, where the class above has none for all


class Sums(struct.PyTreeNode):
    """What `train` adds up over its steps, [] each."""

    critic_loss: Array
    actor_loss: Array
    q: Array  # mean Q1
    prox_coef: Array  # lambda
    task_loss: Array  # of the critic's context
    critic_steps: Array  # how many
    actor_steps: Array  # how many of them moved the actor


def init(
    networks: Networks, key: Key, observation: Array, action: Array, scale: Scale | None = None
) -> AgentState:
    """Returns a fresh agent; observation [O], action [A] and scale serve for shapes."""
    actor_key, critic_key = jax.random.split(key)
    history = History(observation[None], action[None], jnp.zeros(1), jnp.zeros(1, bool))
    observation, history = inputs.show(scale, observation, history)
    params = {
        "actor": networks.actor.init(actor_key, observation, history),
        "critic": networks.critic.init(critic_key, observation, history, action),
    }
    # A copy: the state is donated to the compiled cycle, which refuses one buffer twice.
    return fresh_optimizer(AgentState(params, jax.tree.map(jnp.copy, params), {}, jnp.int32(0)))


def fresh_optimizer(agent: AgentState) -> AgentState:
    """Returns the agent with new Adam states; they do not depend on the learning rate."""
    adam = optax.adam(0.0)
    return agent.replace(opt_state={k: adam.init(v) for k, v in agent.params.items()})


def proximal(params: Params, anchor: Params | None, coef: Array | float) -> Array:
    """Returns coef * ||params - anchor||^2, [], or 0 without an anchor."""
    if anchor is None:
        return jnp.zeros(())
    return coef * jnp.asarray(optax.tree.norm(optax.tree.sub(params, anchor), squared=True))


def td_target(
    config: TD3Config, networks: Networks, target_params: Params, batch: Batch, noise: Array
) -> Array:
    """Returns y [B] of a batch [B]; noise [B, A] is standard normal."""
    step, history = batch.transition, batch.next_history
    clip = config.target_noise_clip
    action = networks.act(target_params["actor"], step.next_observation, history)
    action = action + jnp.clip(config.target_noise * noise, -clip, clip)
    q1, q2 = networks.values(
        target_params["critic"], step.next_observation, history, jnp.clip(action, -1.0, 1.0)
    )
    bootstrap = config.discount * (1.0 - step.terminated)
    chex.assert_equal_shape([step.reward, bootstrap, q1, q2])
    return step.reward + bootstrap * jnp.minimum(q1, q2)


def critic_loss(
    networks: Networks, params: Params, batch: Batch, target: Array
) -> tuple[Array, Array]:
    """Returns the weighted TD loss [] and the mean Q1 [] of critic params."""
    step = batch.transition
    q1, q2 = networks.values(params, step.observation, batch.history, step.action)
    chex.assert_equal_shape([q1, q2, target, batch.weight])
    loss = jnp.mean(batch.weight * (jnp.square(q1 - target) + jnp.square(q2 - target)))
    return loss, q1.mean()


def actor_loss(networks: Networks, params: Params, critic_params: Params, batch: Batch) -> Array:
    """Returns the weighted -Q1(s, u(s)), [], of actor params."""
    observation, history = batch.transition.observation, batch.history
    action = networks.act(params, observation, history)
    q1, _ = networks.values(critic_params, observation, history, action)
    chex.assert_equal_shape([q1, batch.weight])
    return -jnp.mean(batch.weight * q1)


def task_loss(module: nn.Module, params: Params, batch: Batch) -> Array:
    """Returns the squared error [] of what contexts tell of tasks, 0 where a batch does not say."""
    if batch.task is None:
        return jnp.zeros(())
    told = jnp.asarray(module.apply(params, batch.history, method="tell"))
    chex.assert_equal_shape([told, batch.task])
    return jnp.mean(jnp.square(told - batch.task))


def update(
    config: TD3Config,
    networks: Networks,
    agent: AgentState,
    batch: Batch,
    noise: Array,
    move_actor: Array | bool,
    anchor: dict[str, Params] | None = None,
    prox_coef: Array | float = 0.0,
    divided: bool = False,
) -> tuple[AgentState, Metrics]:
    """Takes a critic step and, if `move_actor`, an actor step and a step of the targets.

    Args:
        config: the learner's numbers.
        networks: the agent's modules.
        agent: the learner before.
        batch: [B, ...].
        noise: standard normal draws [B, A] of target policy smoothing.
        move_actor: [] bool.
        anchor: weights that the proximal term pulls towards, shaped as `agent.params`.
        prox_coef: lambda [], with an anchor.
        divided: the batch is this device's share of one, and gradients are means over devices.

    Returns:
        The learner after, and `critic_loss`, `actor_loss`, 0 where there was no step, `q` and
        `task_loss`, [] each.
    """
    chex.assert_rank([batch.weight, batch.transition.reward], 1)
    chex.assert_shape(noise, batch.transition.action.shape)
    adam = optax.adam(config.learning_rate)
    mean = mesh.mean if divided else lambda tree: tree

    def gradient_step(agent: AgentState, name: str, gradient: Params) -> AgentState:
        updates, opt_state = adam.update(gradient, agent.opt_state[name])
        params = optax.apply_updates(agent.params[name], updates)
        return agent.replace(
            params=agent.params | {name: params},
            opt_state=agent.opt_state | {name: opt_state},
        )

    def penalty(params: Params, name: str) -> Array:
        return proximal(params, None if anchor is None else anchor[name], prox_coef)

    target = td_target(config, networks, agent.target_params, batch, noise)

    def critic_objective(params: Params) -> tuple[Array, tuple[Array, Array, Array]]:
        loss, q = critic_loss(networks, params, batch, target)
        miss = task_loss(networks.critic, params, batch)
        return loss + miss + penalty(params, "critic"), (loss, q, miss)

    gradient, (loss, q, miss) = mean(
        jax.grad(critic_objective, has_aux=True)(agent.params["critic"])
    )
    agent = gradient_step(agent, "critic", gradient)

    def actor_and_targets(agent: AgentState) -> tuple[AgentState, Array]:
        def objective(params: Params) -> tuple[Array, Array]:
            loss = actor_loss(networks, params, agent.params["critic"], batch)
            miss = task_loss(networks.actor, params, batch)
            return loss + miss + penalty(params, "actor"), loss

        gradient, loss = mean(jax.grad(objective, has_aux=True)(agent.params["actor"]))
        agent = gradient_step(agent, "actor", gradient)
        targets = optax.incremental_update(agent.params, agent.target_params, config.tau)
        return agent.replace(target_params=targets), loss

    agent, policy_loss = jax.lax.cond(
        move_actor, actor_and_targets, lambda agent: (agent, jnp.zeros(())), agent
    )
    metrics = {"critic_loss": loss, "actor_loss": policy_loss, "q": q, "task_loss": miss}
    return agent.replace(updates=agent.updates + 1), metrics


def train(
    config: TD3Config,
    networks: Networks,
    agent: AgentState,
    key: Key,
    num: int,
    draw: Callable[[Key], tuple[Batch, Array]],
    anchor: dict[str, Params] | None = None,
    active: Array | bool = True,
    earlier: Array | int = 0,
    divided: bool = False,
) -> tuple[AgentState, Sums]:
    """Takes `num` critic steps; actor and targets move at the first of each `policy_delay`.

    Args:
        config, networks, agent, anchor, divided: as in `update`.
        key: for batches and noise.
        num: critic steps.
        draw: returns a batch [B] and its lambda [] for a key.
        active: [] bool; False takes no step at all.
        earlier: [] int32, critic steps before these, from which the delay is counted.

    Returns:
        The learner after, and sums over the steps.
    """

    def body(index: Array, carry: tuple[AgentState, Sums]) -> tuple[AgentState, Sums]:
        agent, total = carry
        draw_key, noise_key = jax.random.split(jax.random.fold_in(key, index))
        batch, coef = draw(draw_key)
        held, size = batch.transition.action.shape
        noise = jax.random.normal(noise_key, (held * mesh.size() if divided else held, size))
        noise = mesh.share(noise) if divided else noise
        move_actor = (earlier + index) % config.policy_delay == 0
        agent, new = update(
            config, networks, agent, batch, noise, move_actor, anchor, coef, divided
        )
        steps = Sums(**new, prox_coef=coef, critic_steps=jnp.ones(()), actor_steps=1.0 * move_actor)
        return agent, jax.tree.map(jnp.add, total, steps)

    return jax.lax.fori_loop(0, jnp.where(active, num, 0), body, (agent, no_steps()))


def no_steps() -> Sums:
    """Returns the sums before the first step."""
    return Sums(*[jnp.zeros(())] * 7)


def means(sums: Sums) -> Sums:
    """Returns sums over the steps that have them, divided by the number of these."""
    critic_steps = jnp.maximum(1.0, sums.critic_steps)
    return sums.replace(
        critic_loss=sums.critic_loss / critic_steps,
        actor_loss=sums.actor_loss / jnp.maximum(1.0, sums.actor_steps),
        q=sums.q / critic_steps,
        prox_coef=sums.prox_coef / critic_steps,
        task_loss=sums.task_loss / critic_steps,
    )
