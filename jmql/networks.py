"""The context encoder, the actor and the twin critic."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jmql.config import NetworkConfig
from jmql.types import Array, History

# Uniform in +-1/sqrt(fan_in), as PyTorch initialises linear layers.
_FAN_IN_UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class ContextGRU(nn.Module):
    """A GRU (Cho et al. 2014) over a history window; steps that are masked leave it untouched.

    Update and candidate follow PyTorch: n = tanh(W_in x + b_in + r * (W_hn h + b_hn)),
    h' = (1 - u) n + u h, gates in the order reset, update, new, with two biases. Under Adam two
    biases move their sum twice as far as one, so both are kept.
    """

    context_size: int

    @nn.compact
    def __call__(self, history: History) -> Array:
        """Returns the last hidden state [..., Z] of windows [..., H]; zeros if all is masked."""
        size = self.context_size
        batch = history.mask.shape[:-1]
        if size == 0:
            return jnp.zeros((*batch, 0))
        inputs = jnp.concatenate(
            [history.action, history.reward[..., None], history.observation], axis=-1
        )
        bound = nn.initializers.uniform(2 / size**0.5)

        def init(key: Array, shape: tuple[int, ...]) -> Array:
            return bound(key, shape) - 1 / size**0.5

        input_kernel = self.param("input_kernel", init, (inputs.shape[-1], 3 * size))
        hidden_kernel = self.param("hidden_kernel", init, (size, 3 * size))
        input_bias = self.param("input_bias", init, (3 * size,))
        hidden_bias = self.param("hidden_bias", init, (3 * size,))

        # One product for all steps; only the hidden part has to wait for the step before.
        projected = inputs @ input_kernel + jnp.expand_dims(input_bias, range(inputs.ndim - 1))

        def step(hidden: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
            from_input, mask = at
            from_hidden = hidden @ hidden_kernel + jnp.expand_dims(hidden_bias, range(len(batch)))
            input_gates, input_new = jnp.split(from_input, [2 * size], axis=-1)
            hidden_gates, hidden_new = jnp.split(from_hidden, [2 * size], axis=-1)
            reset, keep = jnp.split(nn.sigmoid(input_gates + hidden_gates), 2, axis=-1)
            new = jnp.tanh(input_new + reset * hidden_new)
            moved = (1 - keep) * new + keep * hidden
            return jnp.where(mask[..., None], moved, hidden), None

        steps = (jnp.moveaxis(projected, -2, 0), jnp.moveaxis(history.mask, -1, 0))
        return jax.lax.scan(step, jnp.zeros((*batch, size)), steps)[0]


class MLP(nn.Module):
    """ReLU layers and a linear output."""

    hidden_sizes: tuple[int, ...]
    output_size: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., I] to [..., output_size]."""
        for size in self.hidden_sizes:
            x = nn.relu(nn.Dense(size, kernel_init=_FAN_IN_UNIFORM)(x))
        return nn.Dense(self.output_size, kernel_init=_FAN_IN_UNIFORM)(x)


class Actor(nn.Module):
    """The deterministic policy u(s, z), with a context encoder of its own."""

    hidden_sizes: tuple[int, ...]
    context_size: int
    action_size: int

    def setup(self) -> None:
        """Names the parts."""
        self.encoder = ContextGRU(self.context_size)
        self.policy = MLP(self.hidden_sizes, self.action_size)

    def context(self, history: History) -> Array:
        """Returns z [..., Z] of windows [..., H]."""
        return self.encoder(history)

    def __call__(self, observation: Array, history: History) -> Array:
        """Returns the action [..., A] in [-1, 1] for an observation [..., O]."""
        inputs = jnp.concatenate([observation, self.context(history)], axis=-1)
        return jnp.tanh(self.policy(inputs))


class TwinCritic(nn.Module):
    """Q1 and Q2 (s, a, z) on one context encoder."""

    hidden_sizes: tuple[int, ...]
    context_size: int

    @nn.compact
    def __call__(
        self, observation: Array, history: History, action: Array
    ) -> tuple[Array, Array]:
        """Returns both values, [...] each."""
        context = ContextGRU(self.context_size, name="encoder")(history)
        inputs = jnp.concatenate([observation, action, context], axis=-1)
        q1 = MLP(self.hidden_sizes, 1, name="q1")(inputs)
        q2 = MLP(self.hidden_sizes, 1, name="q2")(inputs)
        return q1[..., 0], q2[..., 0]


class Networks(NamedTuple):
    """The two modules of an agent."""

    actor: Actor
    critic: TwinCritic


def make(config: NetworkConfig, action_size: int) -> Networks:
    """Returns the modules that a configuration asks for."""
    return Networks(
        Actor(config.hidden_sizes, config.context_size, action_size),
        TwinCritic(config.hidden_sizes, config.context_size),
    )
