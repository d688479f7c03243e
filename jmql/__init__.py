"""Meta-Q-Learning in JAX: pytrees and pure functions.

What a program may use. Everything is imported when it is asked for.

    Config and its components  every number, each with its bounds
    mql.learner, p3o.learner   an algorithm under a configuration: a Learner
    train                      TrainState; init, round, epoch
    evaluate                   adaptation to held-out tasks, and what it earns
    cycle.cycle                some rounds of training, then evaluation: the unit to compile
    rollout, replay            acting and remembering, for other loops than these
    load, TrainedPolicy, Episode   a trained policy from a file: it acts, and adapts to your data
    Transition, History, Batch, Policy, Env, NewData    the data that flows through them
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jmql import cycle, evaluate, mql, p3o, replay, rollout, train
    from jmql.config import (
        AdaptConfig,
        CollectConfig,
        Config,
        EvaluateConfig,
        NetworkConfig,
        P3OConfig,
        PropensityConfig,
        TaskConfig,
        TD3Config,
        TrainConfig,
    )
    from jmql.learner import Learner, NewData
    from jmql.policy import Episode, TrainedPolicy, load
    from jmql.settings import ConfigError
    from jmql.train import TrainState
    from jmql.types import Batch, Env, History, Policy, Transition

__all__ = [
    "AdaptConfig",
    "Batch",
    "CollectConfig",
    "Config",
    "ConfigError",
    "Env",
    "Episode",
    "EvaluateConfig",
    "History",
    "Learner",
    "NetworkConfig",
    "NewData",
    "P3OConfig",
    "Policy",
    "PropensityConfig",
    "TD3Config",
    "TaskConfig",
    "TrainConfig",
    "TrainState",
    "TrainedPolicy",
    "Transition",
    "cycle",
    "evaluate",
    "load",
    "mql",
    "p3o",
    "replay",
    "rollout",
    "train",
]
_HOMES = ("config", "learner", "policy", "settings", "train", "types")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'jmql' has no attribute {name!r}")
    if name.islower() and name != "load":
        return importlib.import_module(f"jmql.{name}")
    homes = (importlib.import_module(f"jmql.{home}") for home in _HOMES)
    return next(getattr(home, name) for home in homes if hasattr(home, name))


def __dir__() -> list[str]:
    return __all__
