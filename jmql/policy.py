"""A trained policy outside the trainer: it acts, and adapts to episodes from anywhere.

One file holds it. This is the only module of `jmql` that touches the disk.
"""

import dataclasses
import functools
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jmql import inputs, mql, networks, replay, td3
from jmql.config import Config
from jmql.learner import NewData
from jmql.replay import ReplayState
from jmql.settings import ConfigError, Settings
from jmql.td3 import AgentState
from jmql.types import Array, History, Metrics, Transition

_ABOUT = "about.json"


class Episode(NamedTuple):
    """What a policy did on a task, as arrays of any kind that NumPy takes."""

    observation: Any  # [T + 1, O], the last after the last action
    action: Any  # [T, A], in [-1, 1]
    reward: Any  # [T]
    terminated: bool = False  # the task ended: there is no value beyond; else the time was up


class Carry(struct.PyTreeNode):
    """What a policy remembers of an episode."""

    hidden: Array  # [H, Z]: contexts that have read the last 1, 2, ... H steps, or all there are
    observation: Array  # [O] of the last step
    action: Array  # [A] of the last step
    begun: Array  # [] bool: there is a last step
    before: History  # [1]: the step before the last


@dataclasses.dataclass(frozen=True)
class TrainedPolicy:
    """A policy, and what it takes to adapt it.

    Attributes:
        config: what it was trained under, and how it adapts.
        agent: its weights.
        meta: those of the meta-trained agent, where adaptation began.
        memory: a part of the replay of the training tasks; without a slot: none.
        episodes: those that it has adapted to.
        about: what else is known of it, such as `task`, `observation_size`, `versions`.
    """

    config: Config
    agent: AgentState
    meta: AgentState
    memory: ReplayState
    episodes: tuple[Episode, ...]
    about: dict[str, Any]

    def start(self) -> Carry:
        """Returns what there is to remember when an episode begins: nothing."""
        observation, action = (
            jnp.zeros(self.about[f"{name}_size"]) for name in ("observation", "action")
        )
        return Carry(
            jnp.zeros((_reach(self.config), self.config.network.context_size)),
            observation,
            action,
            jnp.zeros((), bool),
            History(observation[None], action[None], jnp.zeros(1), jnp.zeros(1, bool)),
        )

    def act(
        self, observation: Any, carry: Carry, reward: float = 0.0, noise: Any = 0.0
    ) -> tuple[np.ndarray, Carry]:
        """Chooses an action.

        Args:
            observation: [O].
            carry: of the step before, or of `start`.
            reward: earned by the action before; in the first step nobody looks at it.
            noise: [A] or a number, added to the action: what is to be adapted to is best played
                with some, such as `config.adapt.exploration_noise` times normal draws.

        Returns:
            The action [A] in [-1, 1], and what to hand to the next step.
        """
        observation = np.asarray(observation, np.float32)
        if observation.shape != carry.observation.shape:
            raise ValueError(
                f"the observation has the shape {observation.shape}; it must be"
                f" {carry.observation.shape}"
            )
        step = _step(self.config, self.about["action_size"])
        noise = np.broadcast_to(np.asarray(noise, np.float32), carry.action.shape)
        actor = mql.acting(self.agent)
        action, carry = step(actor, observation, carry, np.float32(reward), noise)
        return np.asarray(action), carry

    def adapt(self, episodes: Sequence[Episode], seed: int = 0) -> tuple[Self, dict[str, Any]]:
        """Learns from episodes of a new task, those of earlier calls, and weighted replay.

        One shot of `config.adapt`: play, adapt, play with what comes back, adapt that, and so on.

        Args:
            episodes: new ones, at least one.
            seed: of the draws.

        Returns:
            The adapted policy, and the diagnostics of `jmql.adapt.adapt` as NumPy arrays.

        Raises:
            ValueError: an episode is empty, of other sizes, not finite, or has actions that are
                out of range; the message says which.
            ConfigError: the file holds no replay.
        """
        if not self.memory.size:
            raise ConfigError("this policy was exported without replay, so it cannot adapt")
        if not episodes:
            raise ValueError("there are no episodes; at least one is needed")
        sizes = self.about["observation_size"], self.about["action_size"]
        seen = self.episodes + tuple(
            checked(episode, f"episode {i}", *sizes) for i, episode in enumerate(episodes)
        )
        # Padded, so that few sizes are compiled.
        count = 1 << (len(seen) - 1).bit_length()
        length = max(self.about["episode_length"], *(len(episode.reward) for episode in seen))
        numbers = dataclasses.replace(self.config.adapt, episodes=count)
        config, shot = dataclasses.replace(self.config, adapt=numbers), len(self.episodes)
        key = jax.random.fold_in(jax.random.key(seed), shot)
        data = padded(seen, count, length)
        agent = self.agent if shot else td3.fresh_optimizer(self.agent)
        # Whether this is the first shot is all that their number says.
        agent, diagnostics = _shot(config, sizes[1])(
            self.meta, agent, data, self.memory, key, jnp.int32(shot)
        )
        found = jax.tree.map(np.asarray, diagnostics)
        return dataclasses.replace(self, agent=agent, episodes=seen), found

    def save(self, path: Path | str) -> None:
        """Writes one file, which `load` reads. What it has adapted to is not kept in it: it is a
        policy of its own, from which adaptation begins.
        """
        about = {"config": dataclasses.asdict(self.config), "about": self.about}
        whole = Path(f"{path}.new")
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(_ABOUT, json.dumps(about))
            for name, leaf in _by_name(_kept(self.agent, self.memory)).items():
                data = io.BytesIO()
                np.save(data, np.asarray(leaf))
                file.writestr(f"{name}.npy", data.getvalue())
        whole.replace(path)


def load(path: Path | str) -> TrainedPolicy:
    """Reads what `TrainedPolicy.save` or `jmql export` has written.

    Raises:
        OSError: there is no such file.
        ConfigError: it is not what they write.
    """
    try:
        with zipfile.ZipFile(path) as file:
            record = json.loads(file.read(_ABOUT))
            arrays = {
                name.removesuffix(".npy"): np.load(io.BytesIO(file.read(name)))
                for name in file.namelist()
                if name != _ABOUT
            }
        config, about = _config(record["config"]), record["about"]
        like = _kept(*jax.eval_shape(lambda: blank(config, about)))
        leaves = [jnp.asarray(arrays[name]) for name in _by_name(like)]
    except OSError:
        raise
    except Exception as error:
        raise ConfigError(f"{path} is not a policy that JMQL has written: {error}") from None
    found = jax.tree.unflatten(jax.tree.structure(like), leaves)
    agent = td3.fresh_optimizer(found["agent"])
    return TrainedPolicy(config, agent, agent, found["memory"], (), about)


def checked(episode: Episode, name: str, observation_size: int, action_size: int) -> Episode:
    """Returns an episode as arrays.

    Args:
        episode: from anywhere.
        name: what a message calls it.
        observation_size: O.
        action_size: A.

    Raises:
        ValueError: see `TrainedPolicy.adapt`.
    """
    observation, action, reward = (np.asarray(x, np.float32) for x in episode[:3])
    arrays, steps = (observation, action, reward), len(reward) if reward.ndim else 0
    shapes = ((steps + 1, observation_size), (steps, action_size), (steps,))
    if not steps:
        raise ValueError(f"{name} is empty: it has no reward")
    for array, shape, what in zip(arrays, shapes, Episode._fields, strict=False):
        if array.shape != shape:
            raise ValueError(
                f"{what} of {name} has the shape {array.shape}; with {steps} rewards it must be"
                f" {shape}"
            )
        if not np.isfinite(array).all():
            raise ValueError(f"{what} of {name} is not finite")
    largest = np.abs(action).max()
    if largest > 1 + 1e-6:
        raise ValueError(f"action of {name} reaches {largest:g}; actions are within -1 and 1")
    return Episode(observation, action, reward, bool(episode.terminated))


def padded(episodes: Sequence[Episode], count: int, length: int) -> NewData:
    """Returns episodes as new data [count, length, ...]; what is too much is not valid."""

    def stack(rows: Sequence[np.ndarray]) -> Any:
        whole = np.zeros((count, length, *rows[0].shape[1:]), rows[0].dtype)
        for place, row in zip(whole, rows, strict=False):
            place[: len(row)] = row
        return whole

    valid = stack([np.ones(len(episode.reward), bool) for episode in episodes])
    last = valid & ~np.pad(valid[:, 1:], ((0, 0), (0, 1)))
    ended = stack([np.full(len(episode.reward), episode.terminated) for episode in episodes])
    transitions = Transition(
        observation=stack([episode.observation[:-1] for episode in episodes]),
        action=stack([episode.action for episode in episodes]),
        reward=stack([episode.reward for episode in episodes]),
        terminated=last & ended,
        truncated=last & ~ended,
        next_observation=stack([episode.observation[1:] for episode in episodes]),
        step=jnp.broadcast_to(jnp.arange(length), valid.shape),
    )
    found: NewData = jax.tree.map(jnp.asarray, NewData(transitions, valid))
    return found


@functools.cache
def _step(config: Config, action_size: int) -> Callable[..., tuple[Array, Carry]]:
    nets = networks.make(config.network, action_size)

    @jax.jit
    def step(
        actor: mql.Acting, observation: Array, carry: Carry, reward: Array, noise: Array
    ) -> tuple[Array, Carry]:
        reward = jnp.where(carry.begun, reward, 0.0)
        last = History(carry.observation, carry.action, reward, carry.begun)
        last = jax.tree.map(lambda x: x[None], last)
        # The window of i + 1 steps goes on from the one of i steps a step ago; the shortest begins
        # with the last step.
        shorter = jnp.concatenate([jnp.zeros_like(carry.hidden[:1]), carry.hidden[:-1]])
        two = jax.tree.map(lambda *x: jnp.concatenate(x), carry.before, last)
        two = jax.tree.map(lambda x: jnp.repeat(x[None], len(shorter), axis=0), two)
        two = two.replace(mask=two.mask.at[0, 0].set(False))
        shown, two = inputs.show(actor.scale, observation, two)
        newest = jax.tree.map(lambda x: x[:, 1:], two)
        hidden = nets.context(actor.weights, newest, shorter)
        action = jnp.clip(nets.decide(actor.weights, shown, hidden[-1]) + noise, -1.0, 1.0)
        return action, Carry(hidden, observation, action, jnp.ones((), bool), last)

    return step


@functools.cache
def _shot(config: Config, action_size: int) -> Callable[..., Any]:
    learn = mql.learner(config, action_size).adapt
    assert learn is not None

    @jax.jit
    def shot(*arguments: Any) -> tuple[AgentState, Metrics]:
        adapted, diagnostics = learn(*arguments)
        return adapted.agent, diagnostics

    return shot


def _reach(config: Config) -> int:
    """Returns how many steps a policy looks back."""
    return config.evaluate.history_length or config.network.history_length


def _kept(agent: AgentState, memory: ReplayState) -> dict[str, Any]:
    """Returns what a file holds: all but the optimizer, which adaptation begins anew."""
    return {"agent": agent.replace(opt_state={}), "memory": memory}


def blank(config: Config, about: dict[str, Any]) -> tuple[AgentState, ReplayState]:
    """Returns an agent that has learned nothing and an empty memory, of the sizes of a policy."""
    observation, action = jnp.zeros(about["observation_size"]), jnp.zeros(about["action_size"])
    # Files that do not say it are of policies that tell no task.
    learner = mql.learner(config, len(action), about.get("task_size", 0))
    agent = learner.init(jax.random.key(0), observation, action)
    zero, never = jnp.zeros(()), jnp.zeros((), bool)
    example = Transition(observation, action, zero, never, never, observation, jnp.int32(0))
    return agent, replay.init(example, config.collect.rows, about["slots_per_row"])


def _by_name(tree: Any) -> dict[str, Any]:
    """Returns leaves by their paths, such as `agent.params.actor...`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _config(values: dict[str, Any]) -> Config:
    """Returns a configuration from plain values by name, of which there are some."""
    config = Config()
    for item in config.items():
        changed = given = values.get(item.name, getattr(config, item.name))
        if isinstance(given, dict):
            component: Settings = getattr(config, item.name)
            parts = {name: _tuples(value) for name, value in given.items()}
            changed = dataclasses.replace(cast(Any, component), **parts)
        config = dataclasses.replace(config, **{item.name: changed})
    config.validate()
    return config


def _tuples(value: Any) -> Any:
    """JSON has lists where a configuration has tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
