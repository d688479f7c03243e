"""How much memory a run takes and how much there is: what cannot fit is refused by both."""

from pathlib import Path
from typing import Any

import jax
import psutil

from envs.base import Environment
from experiments import terminal
from jmql import replay
from jmql.config import Config, ConfigError

# What a container may use, under cgroup version 2 and 1.
_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")


def needed(config: Config, env: Environment, shapes: Any, tasks: int) -> int:
    """Returns the bytes that training, or the adaptation to held-out tasks, holds at the least.

    Args:
        config: of the run.
        env: the family.
        shapes: of the TrainState of every seed, leaves [S, ...].
        tasks: held-out tasks that are adapted to side by side.
    """
    seeds = len(shapes.rounds)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)

    def batch(num: int) -> int:
        history = config.network.history_length
        key = jax.eval_shape(lambda: jax.random.key(0))
        return size(jax.eval_shape(lambda m, k: replay.sample(m, k, num, history), one.memory, key))

    data = config.adapt.episodes * env.episode_length
    classes = 2 * data + 2 * config.tasks.train
    episodes = 2 * max(config.adapt.episodes, config.evaluate.episodes) * env.episode_length
    transition = size(one.memory.data) // one.memory.data.reward.size
    adaptation = 3 * size(one.agent) + episodes * transition + batch(classes)
    adaptation += batch(config.adapt.batch_multiple * config.td3.batch_size)
    working = max(batch(config.td3.batch_size), tasks * adaptation)
    copies = 2 if jax.default_backend() == "cpu" else 1  # saving makes one in the host's memory
    return copies * size(shapes) + seeds * working


def there_is() -> int:
    """Returns the bytes that are free where JAX computes."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    free = [psutil.virtual_memory().available]
    for name in _LIMITS:
        path = Path("/sys/fs/cgroup", name)
        text = path.read_text().strip() if path.exists() else ""
        free += [int(text)] if text.isdigit() else []
    return min(free)


def refuse_too_much(what: str, count: int) -> None:
    """Raises ConfigError if `count` bytes are more than there are.

    Args:
        what: needs them, and what makes it smaller.
        count: in bytes.
    """
    free = there_is()
    if count > free:
        raise ConfigError(
            f"{what} needs {terminal.human_bytes(count)} of memory and"
            f" {terminal.human_bytes(free)} are free"
        )


def size(tree: Any) -> int:
    """Returns the bytes of a pytree of arrays or shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
