"""The context encoder, the actor and the twin critic."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jmql import gru
from jmql.config import NetworkConfig
from jmql.types import Array, History, Params

# Uniform in +-1/sqrt(fan_in), as PyTorch initialises linear layers.
_FAN_IN_UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class ContextGRU(nn.Module):
    """A GRU over a history window; steps that are masked leave it untouched.

    As PyTorch's it has two biases: under Adam they move their sum twice as far as one.
    """

    context_size: int

    @nn.compact
    def __call__(self, history: History, begin: Array | None = None) -> Array:
        """Returns the last hidden state [..., Z] of windows [..., H].

        It begins with `begin` [..., Z], or with zeros, and stays so if all is masked.
        """
        size = self.context_size
        batch = history.mask.shape[:-1]
        if size == 0:
            return jnp.zeros((*batch, 0))
        inputs = jnp.concatenate(
            [
                jnp.moveaxis(history.action, (-2, -1), (0, 1)),
                jnp.moveaxis(history.reward, -1, 0)[:, None],
                jnp.moveaxis(history.observation, (-2, -1), (0, 1)),
            ],
            axis=1,
        )
        shapes = (inputs.shape[1], 3 * size), (size, 3 * size), (3 * size,), (3 * size,)
        weights = gru.Weights(
            *(
                self.param(name, _within(size), shape)
                for name, shape in zip(gru.Weights._fields, shapes, strict=True)
            )
        )
        first = jnp.zeros((size, *batch)) if begin is None else jnp.moveaxis(begin, -1, 0)
        hidden = gru.last(weights, inputs, jnp.moveaxis(history.mask, -1, 0), first)
        return jnp.moveaxis(hidden, 0, -1)


def _within(size: int) -> Any:
    """Uniform in +-1/sqrt(size), as PyTorch initialises a GRU."""
    bound = size**-0.5
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


class MLP(nn.Module):
    """Layers and a linear output."""

    hidden_sizes: tuple[int, ...]
    output_size: int
    activation: Callable[[Array], Array] = nn.relu
    hidden_init: nn.initializers.Initializer = _FAN_IN_UNIFORM
    output_init: nn.initializers.Initializer = _FAN_IN_UNIFORM

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., I] to [..., output_size]."""
        for size in self.hidden_sizes:
            x = self.activation(nn.Dense(size, kernel_init=self.hidden_init)(x))
        return nn.Dense(self.output_size, kernel_init=self.output_init)(x)


class Actor(nn.Module):
    """The deterministic policy u(s, z), with a context encoder of its own."""

    hidden_sizes: tuple[int, ...]
    context_size: int
    action_size: int
    task_size: int = 0

    def setup(self) -> None:
        """Names the parts."""
        self.encoder = ContextGRU(self.context_size)
        self.policy = MLP(self.hidden_sizes, self.action_size)
        self.head = MLP((), self.task_size)

    def context(self, history: History, begin: Array | None = None) -> Array:
        """Returns z [..., Z] of windows [..., H] that go on from `begin` [..., Z], or zeros."""
        return self.encoder(history, begin)

    def decide(self, observation: Array, context: Array) -> Array:
        """Returns the action [..., A] in [-1, 1] for an observation [..., O] and z [..., Z]."""
        return jnp.tanh(self.policy(jnp.concatenate([observation, context], axis=-1)))

    def tell(self, history: History) -> Array:
        """Returns what the context says of the task [..., P]."""
        return self.head(self.encoder(history))

    def __call__(self, observation: Array, history: History) -> Array:
        """Returns the action [..., A] in [-1, 1] for an observation [..., O]."""
        if self.is_initializing() and self.task_size:
            self.tell(history)
        return self.decide(observation, self.context(history))


class TwinCritic(nn.Module):
    """Q1 and Q2 (s, a, z) on one context encoder."""

    hidden_sizes: tuple[int, ...]
    context_size: int
    task_size: int = 0

    def setup(self) -> None:
        """Names the parts."""
        self.encoder = ContextGRU(self.context_size)
        self.q1, self.q2 = MLP(self.hidden_sizes, 1), MLP(self.hidden_sizes, 1)
        self.head = MLP((), self.task_size)

    def tell(self, history: History) -> Array:
        """Returns what the context says of the task [..., P]."""
        return self.head(self.encoder(history))

    def __call__(self, observation: Array, history: History, action: Array) -> tuple[Array, Array]:
        """Returns both values, [...] each."""
        if self.is_initializing() and self.task_size:
            self.tell(history)
        inputs = jnp.concatenate([observation, action, self.encoder(history)], axis=-1)
        return self.q1(inputs)[..., 0], self.q2(inputs)[..., 0]


class Networks(NamedTuple):
    """The two modules of an agent, applied to weights."""

    actor: Actor
    critic: TwinCritic

    def act(self, params: Params, observation: Array, history: History) -> Array:
        """Returns actions [..., A] under actor weights."""
        return jnp.asarray(self.actor.apply(params, observation, history))

    def context(self, params: Params, history: History, begin: Array | None = None) -> Array:
        """Returns contexts [..., Z] under actor weights, as `Actor.context` does."""
        return jnp.asarray(self.actor.apply(params, history, begin, method="context"))

    def decide(self, params: Params, observation: Array, context: Array) -> Array:
        """Returns actions [..., A] under actor weights, for contexts [..., Z]."""
        return jnp.asarray(self.actor.apply(params, observation, context, method="decide"))

    def values(
        self, params: Params, observation: Array, history: History, action: Array
    ) -> tuple[Array, Array]:
        """Returns both values, [...] each, under critic weights."""
        q1, q2 = self.critic.apply(params, observation, history, action)
        return jnp.asarray(q1), jnp.asarray(q2)


class ActorCritic(nn.Module):
    """A Gaussian policy and a state value on one context encoder, in tanh layers of their own.

    The standard deviation does not depend on what is seen.
    """

    hidden_sizes: tuple[int, ...]
    context_size: int
    action_size: int
    initial_std: float

    def setup(self) -> None:
        """Names the parts."""
        orthogonal = nn.initializers.orthogonal
        tanh = functools.partial(
            MLP, self.hidden_sizes, activation=nn.tanh, hidden_init=orthogonal(2**0.5)
        )
        self.encoder = ContextGRU(self.context_size)
        self.policy = tanh(self.action_size, output_init=orthogonal(0.01))
        self.critic = tanh(1, output_init=orthogonal(1.0))
        self.log_std = self.param(
            "log_std", nn.initializers.constant(jnp.log(self.initial_std)), (self.action_size,)
        )

    def context(self, history: History, begin: Array) -> Array:
        """Returns z [..., Z] of windows [..., H] that go on from `begin` [..., Z]."""
        return self.encoder(history, begin)

    def distribution(self, observation: Array, context: Array) -> tuple[Array, Array]:
        """Returns mean and log standard deviation of actions, [..., A] each."""
        mean = self.policy(jnp.concatenate([observation, context], axis=-1))
        return mean, jnp.broadcast_to(self.log_std, mean.shape)

    def value(self, observation: Array, context: Array) -> Array:
        """Returns values [...]."""
        return self.critic(jnp.concatenate([observation, context], axis=-1))[..., 0]

    def __call__(self, observation: Array, history: History, begin: Array) -> Any:
        """Runs all parts."""
        context = self.context(history, begin)
        return self.distribution(observation, context), self.value(observation, context)


def make(config: NetworkConfig, action_size: int, task_size: int = 0) -> Networks:
    """Returns the modules that a configuration asks for, for tasks [P] if a context tells them."""
    told = task_size if config.task_head else 0
    return Networks(
        Actor(config.hidden_sizes, config.context_size, action_size, told),
        TwinCritic(config.hidden_sizes, config.context_size, told),
    )
