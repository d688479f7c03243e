"""Every number of a run, one frozen dataclass per component.

Defaults are written here once; `experiments.presets` says where a task or a profile differs.
All configurations are hashable, so that they can be closed over by compiled functions.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

import numpy as np


class ConfigError(ValueError):
    """A value that cannot work; the message names the field, the value and what is valid."""


Ranges = tuple[tuple[str, float, float], ...]


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the actor, the critic and their context encoders."""

    hidden_sizes: tuple[int, ...] = (300, 300)  # ReLU layers of the actor and of each critic head
    context_size: int = 20  # Z, the GRU's hidden state; 0 turns the context off
    history_length: int = 20  # H, steps of history that the context sees


@dataclass(frozen=True)
class TD3Config:
    """One TD3 learner (Fujimoto et al. 2018)."""

    learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 0.005  # Polyak step of the targets
    policy_delay: int = 2  # critic steps for one actor step
    target_noise: float = 0.3  # standard deviation of target policy smoothing
    target_noise_clip: float = 0.5
    batch_size: int = 256


@dataclass(frozen=True)
class CollectConfig:
    """How the replay is filled."""

    rows: int = 32  # E, environments stepped side by side, each bound to one training task
    unroll: int = 50  # T, steps a row takes in a round
    exploration_noise: float = 0.3  # standard deviation of Gaussian action noise
    warmup_steps: int = 10_000  # random actions before learning, over all rows
    warmup_episode_length: int = 50  # warm-up episodes are cut here, so that starts are common
    replay_capacity: int = 1_000_000  # transitions kept, over all rows


@dataclass(frozen=True)
class TrainConfig:
    """The length of a run and of a cycle."""

    env_steps: int = 5_000_000  # the run ends with the first round that reaches this
    updates_per_round: int = 400  # critic steps after each round of rows * unroll steps
    rounds_per_cycle: int = 10  # rounds between two evaluations


@dataclass(frozen=True)
class PropensityConfig:
    """The classifier that tells new-task data from replay, and the weights it gives."""

    inverse_regularization: float = 0.5  # `C` of scikit-learn's LogisticRegression
    log_odds_clip: float = 1.5  # weights are at most exp(this)
    zero_below: float = 0.1  # smaller weights become 0
    observation: bool = False  # the observation joins the context as a feature
    recent_per_task: int = 2000  # replay transitions of each task that the classifier may see
    balanced: bool = True  # weigh both classes equally, so that odds are a density ratio
    standardized: bool = True  # scale features to mean 0 and variance 1
    newton_steps: int = 20


@dataclass(frozen=True)
class AdaptConfig:
    """Adaptation to one held-out task."""

    episodes: int = 1  # episodes of new data, collected by the meta-trained policy
    learning_rate: float = 1e-3  # of the fresh Adam
    step1_updates: int = 10  # critic steps on the new data alone
    step2_updates: int = 50  # critic steps on weighted replay
    batch_multiple: int = 10  # step 2 draws this many times td3.batch_size
    reuse: Literal["propensity", "uniform"] = "propensity"  # weights of replay: estimated, or 1
    prox: Literal["constant", "ess"] = "constant"  # lambda: prox_coef, or prox_coef * (1 - ESS)
    prox_coef: float = 0.1


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation on held-out tasks."""

    episodes: int = 2  # per task, before and after adaptation alike
    history_length: int = 0  # steps of history in evaluation episodes; 0 is as in training


@dataclass(frozen=True)
class TaskConfig:
    """The draw of tasks. All seeds of a run share it, so that their returns compare."""

    train: int = 2  # training tasks
    held_out: int = 2  # K
    seed: int = 0
    train_ranges: Ranges = ()  # (parameter, low, high): what training tasks are drawn from
    held_out_ranges: Ranges = ()  # the same for held-out tasks; empty: as the split says


@dataclass(frozen=True)
class Config:
    """The whole algorithm."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    td3: TD3Config = field(default_factory=TD3Config)
    collect: CollectConfig = field(default_factory=CollectConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    propensity: PropensityConfig = field(default_factory=PropensityConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tasks: TaskConfig = field(default_factory=TaskConfig)

    @property
    def slots_per_row(self) -> int:
        """C: replay slots of a row, a multiple of the unroll so that writes never wrap."""
        collect = self.collect
        return collect.replay_capacity // (collect.rows * collect.unroll) * collect.unroll

    @property
    def steps_per_round(self) -> int:
        """Environment steps of one round, over all rows."""
        return self.collect.rows * self.collect.unroll

    @property
    def warmup_rounds(self) -> int:
        """Rounds of random actions: the first whole round that reaches the number of steps."""
        return -(-self.collect.warmup_steps // self.steps_per_round)

    @property
    def total_rounds(self) -> int:
        """Rounds of the whole run: the first whole round that reaches the number of steps."""
        return -(-self.train.env_steps // self.steps_per_round)

    @property
    def update_to_data(self) -> float:
        """Critic steps for each environment step."""
        return self.train.updates_per_round / self.steps_per_round


# Bounds of single values: (lowest, highest, whether the lowest itself is valid). What is compiled
# counts in 32 bits; environment steps are counted in rounds there.
LARGEST_INT = 2**31 - 1
LARGEST_SEED = 2**32 - 1
_POSITIVE = (0, 1e6, False)
_NOT_NEGATIVE = (0, 1e6, True)
_SHARE = (0, 1, True)
_COUNT = (1, LARGEST_INT, True)
_COUNT_OR_NONE = (0, LARGEST_INT, True)
_BOUNDS = {
    "network.hidden_sizes": _COUNT,
    "network.context_size": _COUNT_OR_NONE,
    "network.history_length": _COUNT,
    "td3.learning_rate": _POSITIVE,
    "td3.discount": _SHARE,
    "td3.tau": (0, 1, False),
    "td3.policy_delay": _COUNT,
    "td3.target_noise": _NOT_NEGATIVE,
    "td3.target_noise_clip": _NOT_NEGATIVE,
    "td3.batch_size": _COUNT,
    "collect.rows": _COUNT,
    "collect.unroll": _COUNT,
    "collect.exploration_noise": _NOT_NEGATIVE,
    "collect.warmup_steps": _COUNT,
    "collect.warmup_episode_length": _COUNT,
    "collect.replay_capacity": _COUNT,
    "train.env_steps": (1, 10**15, True),
    "train.updates_per_round": _COUNT,
    "train.rounds_per_cycle": _COUNT,
    "propensity.inverse_regularization": _POSITIVE,
    "propensity.log_odds_clip": _NOT_NEGATIVE,
    "propensity.zero_below": _NOT_NEGATIVE,
    "propensity.recent_per_task": _COUNT,
    "propensity.newton_steps": _COUNT,
    "adapt.episodes": _COUNT,
    "adapt.learning_rate": _POSITIVE,
    "adapt.step1_updates": _COUNT_OR_NONE,
    "adapt.step2_updates": _COUNT_OR_NONE,
    "adapt.batch_multiple": _COUNT,
    "adapt.prox_coef": _NOT_NEGATIVE,
    "evaluate.episodes": _COUNT,
    "evaluate.history_length": _COUNT_OR_NONE,
    "tasks.train": _COUNT,
    "tasks.held_out": _COUNT,
    "tasks.seed": (0, LARGEST_SEED, True),
}


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns every setting of a configuration by its dotted name, such as `td3.tau`."""
    flat: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            flat |= flatten(value, f"{prefix}{item.name}.")
        else:
            flat[prefix + item.name] = value
    return flat


def validate(config: Config) -> None:
    """Raises ConfigError, with one line that names the field, if the configuration cannot work."""
    flat = flatten(config)
    for name, (lowest, highest, closed) in _BOUNDS.items():
        values = flat[name] if isinstance(flat[name], tuple) else (flat[name],)
        for value in values:
            if isinstance(value, float):
                with np.errstate(over="ignore"):
                    value = float(np.float32(value))  # as it is computed with
            if not (lowest < value or (closed and value == lowest)) or not value <= highest:
                bound = f"{'at least' if closed else 'above'} {lowest}"
                raise ConfigError(
                    f"{name} is {flat[name]}; it must be {bound} and at most {highest:,}"
                )
    if not config.network.hidden_sizes:
        raise ConfigError("network.hidden_sizes is empty; it must name at least one layer")
    collect, history = config.collect, config.network.history_length
    if collect.rows % config.tasks.train:
        raise ConfigError(
            f"collect.rows is {collect.rows}; it must be a multiple of the"
            f" tasks.train {config.tasks.train} training tasks, for each row is bound to one"
        )
    if config.slots_per_row <= history:
        raise ConfigError(
            f"network.history_length is {history}; it must be below the {config.slots_per_row}"
            f" replay slots of a row (collect.replay_capacity {collect.replay_capacity}"
            f" over {collect.rows} rows, in unrolls of {collect.unroll})"
        )
    if config.warmup_rounds * collect.unroll > config.slots_per_row:
        raise ConfigError(
            f"collect.warmup_steps is {collect.warmup_steps}; it must fit in the replay, which"
            f" keeps {config.slots_per_row * collect.rows} (collect.replay_capacity)"
        )
    if config.total_rounds <= config.warmup_rounds:
        raise ConfigError(
            f"train.env_steps is {config.train.env_steps}; it must be above the"
            f" {config.warmup_rounds * config.steps_per_round} of warm-up (collect.warmup_steps"
            f" {collect.warmup_steps}, in rounds of {config.steps_per_round}), or nothing would be"
            " learned"
        )
    if config.total_rounds > LARGEST_INT:
        raise ConfigError(
            f"train.env_steps is {config.train.env_steps}; in rounds of {config.steps_per_round}"
            f" that is {config.total_rounds:,}, and at most {LARGEST_INT:,} can be counted"
        )
    updates = (config.total_rounds - config.warmup_rounds) * config.train.updates_per_round
    if updates > LARGEST_INT:
        raise ConfigError(
            f"train.env_steps is {config.train.env_steps}; with train.updates_per_round"
            f" {config.train.updates_per_round} that is {updates:,} updates, and at most"
            f" {LARGEST_INT:,} can be counted"
        )
    if config.network.context_size == 0 and not config.propensity.observation:
        raise ConfigError(
            "propensity.observation is False; without a context (network.context_size 0)"
            " it must be True, for the classifier needs a feature"
        )
