"""The data that flows through JMQL, and the environment it expects.

Axis legend, used in every shape comment of this package:

    S  seeds                     B  batch
    E  environment rows          H  history length
    K  held-out tasks            O  observation size
    T  unroll length             A  action size
    C  replay slots per row      Z  context size

`[E, C, O]` is an array with those axes; `[]` is a scalar.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
from flax import struct

Array = jax.Array
Key = jax.Array
Task = Any  # a pytree of arrays: what distinguishes one task of a family from another
Params = Any  # a pytree of weights
Actor = Any  # a pytree: what acts of an agent, such as weights and the scale of what they see
Metrics = dict[str, Array]


class Transition(struct.PyTreeNode):
    """One environment step, or many of them with any leading axes."""

    observation: Array  # [..., O]
    action: Array  # [..., A], as drawn: the environment clips what is beyond [-1, 1]
    reward: Array  # [...]
    terminated: Array  # [...] bool: the task ended here, there is no value beyond
    truncated: Array  # [...] bool: a limit was reached, the value goes on
    next_observation: Array  # [..., O] the true successor, never a reset observation
    step: Array  # [...] int32: steps since the episode began, 0 for the first
    behaviour: Any = ()  # what the policy says of how it acted, such as a log-probability [...]


class History(struct.PyTreeNode):
    """The last H steps before a moment, newest last."""

    observation: Array  # [..., H, O]
    action: Array  # [..., H, A]
    reward: Array  # [..., H]
    mask: Array  # [..., H] bool: False where the episode had not begun


class Batch(struct.PyTreeNode):
    """Transitions to learn from, each with the history before and after it."""

    transition: Transition  # [..., B]
    history: History  # [..., B, H] ends one step before the transition
    next_history: History  # [..., B, H] the same window shifted by one: ends with the transition
    weight: Array  # [..., B] importance weight, 1 in meta-training
    task: Array | None = None  # [..., B, P] what contexts are to tell of it, `mql.described`


class Policy(NamedTuple):
    """What acts on one row, and what it remembers of the steps so far, as pure functions."""

    # observation [O], for its shape -> memory before the first step
    start: Callable[[Array], Any]
    # (observation [O], memory, key) -> action [A], and what it says of how it acted
    act: Callable[[Array, Any, Key], tuple[Array, Any]]
    # (memory, transition []) -> memory a step later
    remember: Callable[[Any, Transition], Any]
    # memory -> what it takes the task to be, [Z]
    context: Callable[[Any], Array]
    # memory -> whether an episode that ends now is followed by one of the same trial, [] bool,
    # which what is remembered lasts over; None: never
    lasts: Callable[[Any], Array] | None = None


class EnvState(Protocol):
    """What JMQL reads of an environment's state, which is a pytree."""

    @property
    def task(self) -> Task: ...
    @property
    def observation(self) -> Array: ...  # [O]
    @property
    def reward(self) -> Array: ...  # []
    @property
    def terminated(self) -> Array: ...  # [] bool
    @property
    def truncated(self) -> Array: ...  # [] bool
    @property
    def step(self) -> Array: ...  # [] int32: steps taken since the episode began
    @property
    def blew_up(self) -> Array: ...  # [] bool: it was truncated because the physics was not finite
    @property
    def extras(self) -> Metrics: ...  # [] each: what else there is to report, by name


class Env(Protocol):
    """A family of tasks: pure functions of one row, to be vectorised with vmap."""

    @property
    def observation_size(self) -> int: ...
    @property
    def action_size(self) -> int: ...
    @property
    def episode_length(self) -> int: ...
    @property
    def worst_reward(self) -> float: ...  # the least that a step can earn
    def reset(self, key: Key, task: Task) -> Any: ...  # an EnvState
    def step(self, state: Any, action: Array) -> Any: ...  # an EnvState
