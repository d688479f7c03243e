"""The numbers of every (task, profile): where they differ from the defaults of `jmql.config`."""

import envs
from experiments.config import RunConfig
from experiments.presets import paper, quick, tuned
from jmql.settings import ConfigError

_PROFILES = {"quick": quick.PRESETS, "tuned": tuned.PRESETS, "paper": paper.PRESETS}


def profiles(task: str) -> list[str]:
    """Returns the profiles that a task family has. One from outside has `quick`."""
    if task not in envs.FAMILIES:
        return ["quick"]
    return [name for name, table in _PROFILES.items() if task in table]


def tasks(profile: str) -> list[str]:
    """Returns the task families that a profile has."""
    return list(_PROFILES[profile])


def preset(task: str, profile: str) -> RunConfig:
    """Returns the configuration of a task family under one of its `profiles`.

    Raises:
        ConfigError: a family from outside cannot be loaded.
    """
    if task in envs.FAMILIES:
        return RunConfig(task=task, profile=profile, **_PROFILES[profile][task])
    try:
        family = envs.load(task)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    numbers = quick.POINT if family.backends == ("none",) else quick.BODY
    return RunConfig(task=task, profile=profile, **numbers | {"backend": family.backends[0]})
