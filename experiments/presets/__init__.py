"""The numbers of every (algorithm, task, profile): where they differ from the defaults of
`jmql.config`.
"""

from typing import Any

import envs
from experiments.config import RunConfig
from experiments.presets import p3o, paper, quick, tuned
from jmql.settings import ConfigError

ALGORITHMS: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "mql": {"quick": quick.PRESETS, "tuned": tuned.PRESETS, "paper": paper.PRESETS},
    "p3o": {"quick": p3o.QUICK, "tuned": p3o.TUNED, "paper": p3o.PAPER},
}
_OUTSIDE = {"mql": (quick.POINT, quick.BODY), "p3o": (p3o.POINT, p3o.BODY)}


def profiles(task: str, algorithm: str = "mql") -> list[str]:
    """Returns the profiles that a task family has. One from outside has `quick`."""
    if task not in envs.FAMILIES:
        return ["quick"]
    return [name for name, table in ALGORITHMS[algorithm].items() if task in table]


def tasks(profile: str, algorithm: str = "mql") -> list[str]:
    """Returns the task families that a profile has."""
    return list(ALGORITHMS[algorithm][profile])


def preset(task: str, profile: str, algorithm: str = "mql") -> RunConfig:
    """Returns the configuration of a task family under one of its `profiles`.

    Raises:
        ConfigError: a family from outside cannot be loaded.
    """

    def run(numbers: dict[str, Any]) -> RunConfig:
        return RunConfig(**{"task": task, "profile": profile, "algorithm": algorithm} | numbers)

    if task in envs.FAMILIES:
        return run(ALGORITHMS[algorithm][profile][task])
    try:
        family = envs.load(task)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    point, body = _OUTSIDE[algorithm]
    numbers = point if family.backends == ("none",) else body
    return run(numbers | {"backend": family.backends[0]})
