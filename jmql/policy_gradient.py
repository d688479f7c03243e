"""Policy gradients of fragments of T steps, on-policy or from replay: what P3O takes steps on.

    on-policy:   loss = -mean A log pi - entropy_coef entropy + value loss
    off-policy:  loss = -mean min(rho, c) A log pi + lambda KL(pi || beta) + value loss
                 rho = pi(a | s) / beta(a | s),   value loss = value_coef mean (R - V)^2 / 2,
                 ESS = (sum rho)^2 / (N sum rho^2),   c = ESS,   lambda = 1 - ESS

beta is the policy that acted. rho, c, lambda and the advantages A carry no gradient. A and
R = A + V are generalized advantage estimates under the current V on the stored fragment.

The policy is recurrent: its context is a GRU's hidden state, which it carries from step to step and
stores beside each. A fragment begins with the context stored at its first step.
"""

import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct

from jmql import inputs, mesh, propensity
from jmql.config import P3OConfig
from jmql.inputs import Moments, Scale
from jmql.networks import ActorCritic
from jmql.types import Array, History, Metrics, Params, Transition

_LARGEST = 10.0  # of a scaled reward
_LOG_RATIO = 20.0  # log importance ratios are clipped there, before exp
_DECAY, _EPS = 0.99, 1e-5  # of RMSProp; the release adds eps outside the root


class Behaviour(struct.PyTreeNode):
    """How an action was drawn."""

    mean: Array  # [..., A]
    log_std: Array  # [..., A]
    context: Array  # [..., Z], of which a fragment reads its first


class Returns(struct.PyTreeNode):
    """Of the discounted returns so far of all steps that were collected: the scale of rewards."""

    so_far: Array  # [E], of the episode of each row, counted over all devices
    moments: Moments  # []
    count: Array  # [] float32: steps


class AgentState(struct.PyTreeNode):
    """A learner."""

    params: Params
    opt_state: Any
    updates: Array  # [] int32: steps so far, on-policy and off-policy
    rounds: Array  # [] int32: on-policy steps so far
    scale: Scale | None  # what networks see; None: as it is
    returns: Returns | None  # where there is a scale


class Acting(NamedTuple):
    """What acts of an agent."""

    weights: Params
    scale: Scale | None


def gae(
    config: P3OConfig, reward: Array, value: Array, next_value: Array, steps: Transition
) -> Array:
    """Returns generalized advantage estimates [N, T] (Schulman et al. 2016) of fragments.

    Args:
        config: discount and lambda.
        reward, value, next_value: [N, T], values of observations and of true successors.
        steps: [N, T, ...]. A time limit bootstraps, and ends the sum as the end of a task does.
    """
    chex.assert_equal_shape([reward, value, next_value, steps.terminated])
    miss = reward + config.discount * (1.0 - steps.terminated) * next_value - value
    decay = config.discount * config.gae_lambda * ~(steps.terminated | steps.truncated)

    def back(later: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        miss, decay = at
        advantage = miss + decay * later
        return advantage, advantage

    _, advantage = jax.lax.scan(back, jnp.zeros(len(reward)), (miss.T, decay.T), reverse=True)
    return advantage.T


def log_density(action: Array, mean: Array, log_std: Array) -> Array:
    """Returns log densities [...] of actions [..., A] under diagonal Gaussians [..., A]."""
    miss = (action - mean) * jnp.exp(-log_std)
    return -0.5 * jnp.sum(jnp.square(miss) + 2 * log_std + math.log(2 * math.pi), axis=-1)


def entropy(log_std: Array) -> Array:
    """Returns the entropies [...] of diagonal Gaussians [..., A]."""
    return jnp.sum(log_std + 0.5 * math.log(2 * math.pi * math.e), axis=-1)


def divergence(mean: Array, log_std: Array, other_mean: Array, other_log_std: Array) -> Array:
    """Returns KL(one || other) [...] of diagonal Gaussians [..., A]."""
    spread = jnp.exp(2 * (log_std - other_log_std))
    miss = jnp.square((mean - other_mean) * jnp.exp(-other_log_std))
    return jnp.sum(other_log_std - log_std + 0.5 * (spread + miss - 1.0), axis=-1)


class Seen(NamedTuple):
    """Fragments as the networks see them now, [N, T, ...]."""

    mean: Array
    log_std: Array
    value: Array
    next_value: Array  # of the true successors; no gradient


def see(modules: ActorCritic, params: Params, scale: Scale | None, steps: Transition) -> Seen:
    """Runs the networks over fragments [N, T, ...], from the contexts of their first steps."""
    run: Any = functools.partial(modules.apply, params)
    read = functools.partial(remember, modules, Acting(params, scale))

    def step(context: Array, at: Transition) -> tuple[Array, tuple[Array, Array]]:
        following = read(context, at)
        ended = (at.terminated | at.truncated)[:, None]
        return jnp.where(ended, 0.0, following), (context, following)

    in_time = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), steps)
    _, contexts = jax.lax.scan(step, steps.behaviour.context[:, 0], in_time)
    context, following = (jnp.swapaxes(x, 0, 1) for x in contexts)
    observation, successor = (
        inputs.show_observation(scale, x) for x in (steps.observation, steps.next_observation)
    )
    mean, log_std = run(observation, context, method="distribution")
    value = run(observation, context, method="value")
    next_value = jax.lax.stop_gradient(run(successor, following, method="value"))
    return Seen(mean, log_std, value, next_value)


def remember(modules: ActorCritic, actor: Acting, context: Array, step: Transition) -> Array:
    """Returns contexts [..., Z] after steps [...], which know whether they began an episode."""
    if not modules.context_size:
        return context
    history = History(
        step.observation[..., None, :],
        # The environment clips what is drawn.
        jnp.clip(step.action, -1.0, 1.0)[..., None, :],
        step.reward[..., None],
        jnp.ones((*step.reward.shape, 1), bool),
    )
    _, shown = inputs.show(actor.scale, step.observation, history)
    began = jnp.float32(step.step == 0)[..., None, None]
    shown = shown.replace(observation=jnp.concatenate([shown.observation, began], axis=-1))
    return jnp.asarray(modules.apply(actor.weights, shown, context, method="context"))


def loss(
    config: P3OConfig,
    seen: Seen,
    steps: Transition,
    reward: Array,
    off_policy: bool,
) -> tuple[Array, Metrics]:
    """Returns the loss [] of fragments [N, T, ...], and what there is to report of it.

    Args:
        config: the learner's numbers.
        seen: by the current networks.
        steps: the fragments, with the behaviour policy that acted.
        reward: [N, T], scaled.
        off_policy: whether the fragments are from replay.
    """
    value, fixed = seen.value, jax.lax.stop_gradient(seen.value)
    advantage = gae(config, reward, fixed, seen.next_value, steps)
    value_loss = 0.5 * jnp.mean(jnp.square(advantage + fixed - value))
    log_prob = log_density(steps.action, seen.mean, seen.log_std)
    chex.assert_equal_shape([log_prob, advantage, value])
    found = {"value_loss": value_loss, "entropy": entropy(seen.log_std).mean()}
    if not off_policy:
        policy_loss = -jnp.mean(advantage * log_prob)
        whole = policy_loss - config.entropy_coef * found["entropy"]
    else:
        behaviour = steps.behaviour
        ratio = log_prob - log_density(steps.action, behaviour.mean, behaviour.log_std)
        rho = jnp.exp(jnp.clip(jax.lax.stop_gradient(ratio), -_LOG_RATIO, _LOG_RATIO))
        ess = propensity.effective_sample_size(mesh.gather(rho.reshape(-1)))
        clip = ess if config.clip == "ess" else jnp.float32(config.clip)
        coef = 1.0 - ess if config.kl_coef == "ess" else jnp.float32(config.kl_coef)
        policy_loss = -jnp.mean(jnp.minimum(rho, clip) * advantage * log_prob)
        kl = divergence(seen.mean, seen.log_std, behaviour.mean, behaviour.log_std).mean()
        whole = policy_loss + coef * kl
        found |= {"ess": ess, "clip": clip, "kl_coef": coef, "kl": kl}
    found["policy_loss"] = policy_loss
    return whole + config.value_coef * value_loss, found


def update(
    config: P3OConfig,
    modules: ActorCritic,
    agent: AgentState,
    steps: Transition,
    learning_rate: Array,
    off_policy: bool,
) -> tuple[AgentState, Metrics]:
    """Takes one step on this device's share of fragments [N, T, ...].

    Args:
        config, off_policy: as in `loss`.
        modules: the agent's.
        agent: the learner before.
        steps: the fragments.
        learning_rate: [].

    Returns:
        The learner after, and what `loss` reports with `grad_norm`, before it is clipped, [] each.
    """
    reward = scaled(agent.returns, steps.reward)

    def objective(params: Params) -> tuple[Array, Metrics]:
        return loss(config, see(modules, params, agent.scale, steps), steps, reward, off_policy)

    gradient, found = mesh.mean(jax.grad(objective, has_aux=True)(agent.params))
    found["grad_norm"] = optax.tree.norm(gradient)
    change, opt_state = optimizer(config).update(gradient, agent.opt_state)
    params = jax.tree.map(lambda x, y: x - learning_rate * y, agent.params, change)
    return agent.replace(params=params, opt_state=opt_state, updates=agent.updates + 1), found


def optimizer(config: P3OConfig) -> optax.GradientTransformation:
    """Returns RMSProp of clipped gradients, for a learning rate of 1."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_rms(_DECAY, _EPS, eps_in_sqrt=False),
    )


def scaled(returns: Returns | None, reward: Array) -> Array:
    """Returns rewards [...] over the standard deviation of discounted returns, clipped."""
    if returns is None:
        return reward
    return jnp.clip(reward / jnp.sqrt(returns.moments.variance + 1e-8), -_LARGEST, _LARGEST)


def counted(config: P3OConfig, returns: Returns, steps: Transition) -> Returns:
    """Returns the scale of rewards after the newest steps [E / size, T, ...]."""

    def on(so_far: Array, at: Transition) -> tuple[Array, Array]:
        so_far = config.discount * so_far + at.reward
        return jnp.where(at.terminated | at.truncated, 0.0, so_far), so_far

    in_time = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), steps)
    so_far, seen = jax.lax.scan(on, mesh.share(returns.so_far), in_time)
    moments = inputs.added(returns.moments, returns.count, seen)
    return Returns(mesh.gather(so_far), moments, returns.count + seen.size * mesh.size())
