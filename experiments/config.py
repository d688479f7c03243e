"""What a run is made of, as the command line sets it and config.json keeps it."""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from jmql.config import Config, Ranges
from jmql.settings import (
    LARGEST_SEED,
    ConfigError,
    Kind,
    Settings,
    bounded,
    count,
    flatten,
    not_negative,
)


class RunFailed(Exception):
    """Something broke that is not the user's fault; the message names the file that says more."""


@dataclass(frozen=True)
class TrackingConfig(Settings):
    """Where results go beside the run directory."""

    kind: ClassVar = Kind.HOST

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: WANDB_MODE, else online if there is a key, else offline"""
    project: str = "jmql"
    tags: tuple[str, ...] = ()  # of W&B, beside task, profile and device; a sweep adds its name


@dataclass(frozen=True)
class CheckpointConfig(Settings):
    """What survives a run that is stopped."""

    kind: ClassVar = Kind.HOST

    minutes: float = not_negative(5.0)
    """between saves; the first is made after warm-up, the last at the end"""
    replay: bool = field(default=True, metadata={"kind": Kind.LEARNED})
    """save the replay too; without it a resumed run fills it anew, and is not exact"""


@dataclass(frozen=True)
class RunConfig(Config):
    """Meta-trains on a family of tasks and adapts to held-out ones.

    `--member '--seed 1 --td3.tau 0.01 --run-id NAME'`, once for each of several runs that differ in
    seeds and numbers, trains them side by side in one process.
    """

    kind: ClassVar = Kind.LEARNED

    task: str = ""  # task family, or my_package.my_file:MyFamily
    profile: str = field(default="quick", metadata={"kind": Kind.HOST})
    """named set of numbers that the flags below change"""
    backend: str = ""  # physics engine
    seed: int = bounded(0, 0, LARGEST_SEED)  # of the first run
    seeds: int = count(1)  # runs side by side in one process, with seeds seed, seed + 1, ...
    split: str = "iid"  # how training and held-out tasks differ: iid, ood, or one of the family's
    observe_task: bool = False  # baseline: the observation shows the task (an oracle)
    devices: int = count(0, 0, kind=Kind.HOST)
    """accelerators, or cores, that share the work; 0: all that help"""
    distributed: bool = field(default=False, metadata={"kind": Kind.HOST})
    """several hosts run this same command, as one run on all their devices"""
    runs: str = field(default="runs", metadata={"kind": Kind.HOST})
    """folder that holds run directories"""
    mirror: str = field(default="", metadata={"kind": Kind.HOST})
    """gs://BUCKET/FOLDER that gets a copy of every save, from which another machine goes on"""
    run_id: str = field(default="", metadata={"kind": Kind.HOST})
    """name of the run directory, which is gone on with if it is there; empty: a new one"""
    resume: str = field(default="", metadata={"kind": Kind.HOST})
    """a run directory: go on where it stopped"""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def validate(self, prefix: str = "") -> None:
        """As in `Config`."""
        super().validate(prefix)
        if self.algorithm == "p3o" and not self.checkpoint.replay:
            raise ConfigError(
                "checkpoint.replay is False; valid with algorithm p3o is True, for its statistics"
                " go on with its rows"
            )
        if self.seed + self.seeds - 1 > LARGEST_SEED:
            raise ConfigError(
                f"seed is {self.seed} and seeds is {self.seeds}; the last seed must be at most"
                f" {LARGEST_SEED:,}"
            )
        for name in ("mirror", "distributed"):
            if getattr(self, name) and not self.run_id:
                raise ConfigError(
                    f"{name} is {getattr(self, name)} and run_id is empty; it must be a name, by"
                    " which other machines find the run"
                )
        if self.run_id and not re.fullmatch(r"\w[\w.+-]*", self.run_id):
            raise ConfigError(
                f"run_id is {self.run_id!r}; it must be a name of letters, digits, and . _ + -"
            )


@dataclass(frozen=True)
class Study(Settings):
    """What is asked of a trained run."""

    num_tasks: int = count(64)  # held-out tasks to draw
    seed: int = bounded(0, 0, LARGEST_SEED)  # of the tasks and episodes
    split: str = ""  # draw them as this split's held-out tasks; empty: as the run's were drawn
    ranges: Ranges = ()  # draw parameters from these: (parameter, low, high)
    shots: tuple[int, ...] = count((), 0)  # report after so many; empty: after each of adapt.shots
    updates: tuple[int, ...] = count((), 0)  # also adapt with so many updates a shot: a curve
    ablations: bool = False  # also adapt without each part of it, and from nothing
    oracle: str = ""  # also play by this run of the family, trained with --observe-task


def all_seeds(run: RunConfig) -> range:
    """Returns the seeds of a run, in the order of its leading axis S."""
    return range(run.seed, run.seed + run.seeds)


def identity(run: RunConfig) -> dict[str, Any]:
    """Returns what a run learns under, which is the same for its whole life, by name."""
    return flatten(run, Kind.LEARNED)


def refuse_other(run: RunConfig, before: RunConfig, where: Path) -> None:
    """Raises ConfigError if a run that goes on in a folder would learn under something else."""
    old, new = identity(before), identity(run)
    for name in old:
        if old[name] != new[name]:
            raise ConfigError(
                f"{name} is {old[name]} in {where} and cannot become {new[name]}; valid: another"
                " name (run_id, or the sweep's), or changes of adapt, propensity, evaluate and"
                " train.env_steps"
            )


def from_json(text: str) -> RunConfig:
    """Returns a configuration from its JSON; settings that it does not name have their defaults.

    Raises:
        ConfigError: it is not a configuration; the message names the setting.
    """
    import pydantic  # takes long

    values = json.loads(text)
    match values:
        case {"adapt": {"step2_updates": updates, **rest}}:  # as runs before 0.3 call it
            as_then = {"exploration_noise": 0.0, "new_share": 0.0, "updates": updates}
            values["adapt"] = as_then | rest
    match values:
        # Runs before 0.3 adapt with the tau of training.
        case {"adapt": {**adapt}, "td3": {"tau": tau}}:
            values["adapt"] = {"tau": tau} | adapt
    try:
        config = pydantic.TypeAdapter(RunConfig).validate_json(json.dumps(values), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "config"
        raise ConfigError(f"{name} is {first['input']!r}: {first['msg']}") from None
    unknown = _names(values) - _names(dataclasses.asdict(config))
    if unknown:
        raise ConfigError(f"there is no setting {min(unknown)}")
    return config


def _names(settings: dict[str, Any], prefix: str = "") -> set[str]:
    names = set()
    for name, value in settings.items():
        names |= _names(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
    return names
