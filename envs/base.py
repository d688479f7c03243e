"""What a task family is: the contract, its state, reset, time limit. No engine runs here.

Shapes are those of one row: vectorise with `jax.vmap`. Letters as in `jmql/types.py`.
docs/add_a_family.md shows a whole family.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array
Task = dict[str, Array]
Ranges = Mapping[str, tuple[float, float]]  # what a parameter of a task is drawn from

_LIMIT = 1e10  # MuJoCo's mjMAXVAL; NaN is not below it either
_LARGEST = float(np.finfo(np.float32).max)


class EnvState(struct.PyTreeNode):
    """One row between two steps."""

    physics: Any  # the engine's own state
    task: Task  # leaves of any shape, fixed over an episode
    observation: Array  # [O]
    reward: Array  # [] of the step that led here, 0 after reset
    terminated: Array  # [] bool: the task ended, there is no value beyond
    truncated: Array  # [] bool: the time limit was reached
    step: Array  # [] int32: steps taken since the episode began
    blew_up: Array  # [] bool: the physics was not finite, which is why the episode was truncated
    extras: dict[str, Array]  # [] float32 each: what else the family reports, always finite


@dataclasses.dataclass(frozen=True)
class Film:
    """How a body is shown in a picture."""

    elevation: float  # of the eye (degrees); 0 looks along the y axis, or at an azimuth from it
    azimuth: float
    seconds: float
    height: float  # room for a frame and its title (m)


class Environment(abc.ABC):
    """A family of tasks. What is abstract here every family says of itself.

    Args:
        episode_length: steps after which an episode is truncated.
        observe_task: the observation ends with the task itself (the oracle baseline).
    """

    backends: ClassVar[tuple[str, ...]] = ("none",)  # physics engines, the default first
    body: ClassVar[str] = ""  # families of one body share its model
    parameters: ClassVar[Mapping[str, str]] = {}  # meaning (unit) of a task's leaves and ranges
    ranges: ClassVar[Ranges] = {}  # the benchmark's own
    limits: ClassVar[Ranges] = {}  # by parameter: the widest range that makes sense
    splits: ClassVar[Mapping[str, tuple[Ranges, Ranges]]] = {}  # of training, of held-out
    caption: ClassVar[str] = ""  # what its tasks are, in lines of a picture
    film: ClassVar[Film | None] = None  # None: it is not shown

    def __init__(self, episode_length: int = 200, observe_task: bool = False):
        self.episode_length = episode_length
        self._observe_task = observe_task

    @property
    @abc.abstractmethod
    def action_size(self) -> int:
        """A; a family without an engine says it as a plain class attribute."""

    @property
    @abc.abstractmethod
    def worst_reward(self) -> float:
        """The least that a step can earn: what is below is raised to it. A class attribute."""

    @classmethod
    def limit(cls, parameter: str) -> tuple[float, float]:
        """Returns the widest range of a parameter: without one of its own, all of float32."""
        return cls.limits.get(parameter, (-_LARGEST, _LARGEST))

    @classmethod
    def title(cls, task: Task) -> str:
        """Returns what one task is called in a table or a legend, of at most 40 characters."""
        parts = (
            f"{name} {', '.join(f'{x:+.2f}' for x in np.ravel(leaf))}"
            for name, leaf in task.items()
        )
        words = " ".join(parts)
        return words if len(words) <= 40 else f"{words[:39]}…"

    @classmethod
    def way(cls, task: Task) -> np.ndarray | None:  # noqa: ARG003
        """Returns which way a task wants the body to go, [2], for the arrow of a picture."""
        return None

    @abc.abstractmethod
    def draw_task(self, key: Array, ranges: Ranges) -> Task:
        """Draws one task, its parameters from `ranges`, all of which are given."""

    def sample_task(self, key: Array) -> Task:
        """Draws one task of the family."""
        return self.draw_task(key, self.ranges)

    def sample_tasks(self, key: Array, num: int, ranges: Ranges | None = None) -> Task:
        """Draws `num` tasks; every leaf has a leading axis of that length.

        Args:
            key: for the draw.
            num: how many.
            ranges: of some of the parameters, in place of the benchmark's.
        """
        whole = {**self.ranges, **(ranges or {})}
        return jax.vmap(lambda key: self.draw_task(key, whole))(jax.random.split(key, num))

    @abc.abstractmethod
    def start(self, key: Array, task: Task) -> Any:
        """Returns the physics at the beginning of an episode."""

    @abc.abstractmethod
    def advance(self, physics: Any, action: Array, task: Task) -> Any:
        """Returns the physics one control step later; action [A] in [-1, 1]."""

    @abc.abstractmethod
    def observe(self, physics: Any, task: Task) -> Array:
        """Returns the observation [O]; most families show nothing of the task."""

    @abc.abstractmethod
    def reward(self, before: Any, after: Any, action: Array, task: Task) -> Array:
        """Returns the reward [] of the step between two physics states."""

    def unhealthy(self, physics: Any) -> Array:
        """Returns whether the task has ended, [] bool."""
        return jnp.zeros((), bool)

    def extras(self, physics: Any, task: Task) -> dict[str, Array]:
        """Returns what else there is to report of a state, [] each, such as success (0 or 1)."""
        return {}

    @property
    def observation_size(self) -> int:
        """O, without running the physics."""
        key = jax.random.key(0)
        state = jax.eval_shape(lambda: self.reset(key, self.sample_task(key)))
        return state.observation.shape[-1]

    def reset(self, key: Array, task: Task) -> EnvState:
        """Begins an episode of `task` from a fresh random state."""
        physics = self.start(key, task)
        return EnvState(
            physics=physics,
            task=task,
            observation=self._observation(physics, task),
            reward=jnp.zeros(()),
            terminated=jnp.zeros((), bool),
            truncated=jnp.zeros((), bool),
            step=jnp.zeros((), jnp.int32),
            blew_up=jnp.zeros((), bool),
            extras=self._extras(physics, task, True, {}),
        )

    def step(self, state: EnvState, action: Array) -> EnvState:
        """Takes one control step; an action [A] outside [-1, 1] is clipped first.

        Physics that is not finite, or beyond the bound at which MuJoCo calls it unstable, truncates
        the episode, with the observation before it and `worst_reward`: to a learner it is worth no
        more than a step at the worst reward that leads nowhere, so never more than playing on.
        """
        action = jnp.clip(action, -1.0, 1.0)
        physics = self.advance(state.physics, action, state.task)
        observation = self._observation(physics, state.task)
        reward = self.reward(state.physics, physics, action, state.task)
        finite = (jnp.abs(observation) < _LIMIT).all() & (jnp.abs(reward) < _LIMIT)
        step = state.step + 1
        terminated = self.unhealthy(physics) & finite
        return EnvState(
            physics=physics,
            task=state.task,
            observation=jnp.where(finite, observation, state.observation),
            reward=jnp.maximum(jnp.where(finite, reward, -jnp.inf), self.worst_reward),
            terminated=terminated,
            truncated=((step >= self.episode_length) | ~finite) & ~terminated,
            step=step,
            blew_up=~finite,
            extras=self._extras(physics, state.task, finite, state.extras),
        )

    def _observation(self, physics: Any, task: Task) -> Array:
        observation = self.observe(physics, task)
        if self._observe_task:
            shown = [jnp.ravel(leaf) for leaf in jax.tree.leaves(task)]
            observation = jnp.concatenate([observation, *shown])
        return observation

    def _extras(
        self, physics: Any, task: Task, finite: Array | bool, before: dict[str, Array]
    ) -> dict[str, Array]:
        """What the family reports; where it is not finite what it reported before, at first 0."""
        found = {name: jnp.asarray(x, float) for name, x in self.extras(physics, task).items()}
        return {
            name: jnp.where(finite & jnp.isfinite(x), x, before.get(name, 0.0))
            for name, x in found.items()
        }
