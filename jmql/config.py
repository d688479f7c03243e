"""Every number of a run: one frozen dataclass per component, of one kind, with its own checks.

Defaults and bounds are written here once; `experiments.presets` says where a task or a profile
differs. All configurations are hashable, so that they can be closed over by compiled functions.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from jmql.settings import (
    LARGEST_FLOAT,
    LARGEST_INT,
    LARGEST_SEED,
    ConfigError,
    Kind,
    Settings,
    bounded,
    count,
    flatten,
    not_negative,
    positive,
)

Ranges = tuple[tuple[str, float, float], ...]


@dataclass(frozen=True)
class NetworkConfig(Settings):
    """The actor, the critic and their context encoders: sizes, and what they see."""

    kind: ClassVar = Kind.LEARNED

    hidden_sizes: tuple[int, ...] = count((300, 300))  # ReLU layers of the actor and of each head
    context_size: int = count(20, 0)  # Z, the GRU's hidden state; 0 turns the context off
    history_length: int = count(20)  # H, steps of history that the context sees
    normalize: bool = False
    """networks see observations and rewards of mean 0 and variance 1; p3o also learns from rewards
    over the standard deviation of discounted returns"""
    changes: bool = False
    """contexts also see how observation and reward change from step to step; needs normalize"""
    task_head: bool = False
    """contexts also learn to tell the task of meta-training, by a linear head on each"""

    def validate(self, prefix: str = "") -> None:
        """As in `Settings`."""
        super().validate(prefix)
        if not self.hidden_sizes:
            raise ConfigError(f"{prefix}hidden_sizes is empty; it must name at least one layer")
        if self.changes and not self.normalize:
            raise ConfigError(f"{prefix}changes is True; it needs {prefix}normalize")
        for name in ("changes", "task_head"):
            if getattr(self, name) and not self.context_size:
                raise ConfigError(
                    f"{prefix}{name} is True; without a context ({prefix}context_size 0) it must be"
                    " False"
                )


@dataclass(frozen=True)
class TD3Config(Settings):
    """One TD3 learner (Fujimoto et al. 2018)."""

    kind: ClassVar = Kind.LEARNED

    learning_rate: float = positive(3e-4)
    discount: float = bounded(0.99, 0, 1)
    tau: float = bounded(0.005, 0, 1, above=True)  # Polyak step of the targets
    policy_delay: int = count(2)  # critic steps for one actor step
    target_noise: float = not_negative(0.3)  # standard deviation of target policy smoothing
    target_noise_clip: float = not_negative(0.5)
    batch_size: int = count(256)


@dataclass(frozen=True)
class P3OConfig(Settings):
    """One P3O learner (Fakoor, Chaudhari and Smola 2019), with the numbers of its release."""

    kind: ClassVar = Kind.LEARNED

    learning_rate: float = positive(7e-4)  # at first; falls to 0 at the end of the run
    discount: float = bounded(0.99, 0, 1)
    gae_lambda: float = bounded(0.95, 0, 1)  # of generalized advantage estimation
    off_policy_steps: float = bounded(2.0, 0, 1000)  # m, their mean in a round; 0 is A2C
    off_policy_after: int = count(240_000, 0)  # environment steps, over all rows
    minibatch: int = count(96)  # fragments of collect.unroll steps in an off-policy step
    clip: Literal["ess"] | float = bounded("ess", 0, LARGEST_FLOAT)
    """c, the most an importance ratio counts: the effective sample size, or a constant"""
    kl_coef: Literal["ess"] | float = bounded("ess", 0, LARGEST_FLOAT)
    """lambda of KL(pi || beta): 1 - the effective sample size, or a constant"""
    value_coef: float = not_negative(0.5)
    entropy_coef: float = not_negative(0.01)
    max_grad_norm: float = positive(0.5)
    initial_std: float = bounded(1.0, 0, LARGEST_FLOAT, above=True, shapes=True)  # of actions
    trial_episodes: int = count(3, 2)  # of a trial, where context_span is trial


@dataclass(frozen=True)
class CollectConfig(Settings):
    """How the replay is filled."""

    kind: ClassVar = Kind.LEARNED

    rows: int = count(32)  # E, environments stepped side by side, each bound to one training task
    unroll: int = count(50)  # T, steps a row takes in a round
    exploration_noise: float = not_negative(0.3)  # standard deviation of Gaussian action noise
    warmup_steps: int = count(10_000)  # before learning, over all rows; of random actions in mql
    warmup_episode_length: int = count(50)  # warm-up episodes are cut here, for common starts
    replay_capacity: int = count(1_000_000)  # transitions kept, over all rows


@dataclass(frozen=True)
class TrainConfig(Settings):
    """The length of a run and of a cycle."""

    kind: ClassVar = Kind.LEARNED

    env_steps: int = bounded(5_000_000, 1, 10**15, kind=Kind.HOST)
    """the run ends with the first round that reaches this; a finished run can be made longer"""
    updates_per_round: int = count(400)  # critic steps after each round of rows * unroll steps
    rounds_per_cycle: int = count(10, kind=Kind.MEASURED)  # rounds between two evaluations


@dataclass(frozen=True)
class PropensityConfig(Settings):
    """The classifier that tells new-task data from replay, and the weights it gives."""

    kind: ClassVar = Kind.MEASURED

    inverse_regularization: float = positive(0.5)  # `C` of scikit-learn's LogisticRegression
    log_odds_clip: float = not_negative(1.5)  # weights are at most exp(this)
    zero_below: float = not_negative(0.1)  # smaller weights become 0
    observation: bool = False  # the observation joins the context as a feature
    recent_per_task: int = count(2000)  # replay transitions of a task that the classifier may see
    balanced: bool = True  # weigh both classes equally, so that odds are a density ratio
    standardized: bool = True  # scale features to mean 0 and variance 1
    newton_steps: int = count(20)


@dataclass(frozen=True)
class AdaptConfig(Settings):
    """Adaptation to one held-out task, in shots: an episode, then learning from all so far.

    The paper has one shot without noise, step 1, and then replay alone (docs/method.md section 2).
    """

    kind: ClassVar = Kind.MEASURED

    shots: int = count(1)  # times that the policy as adapted so far collects, and learns
    episodes: int = count(1)  # episodes of new data of a shot
    exploration_noise: float = not_negative(0.3)  # of new data, as in collection
    learning_rate: float = positive(3e-4)  # of one fresh Adam for all shots
    # Polyak step of the targets. At td3.tau's default they would still be those of training after
    # all updates of a shot, and bootstrap from values that know nothing of the task.
    tau: float = bounded(0.05, 0, 1, above=True)
    step1_updates: int = count(0, 0)  # critic steps on the new data alone, in the first shot
    updates: int = count(50, 0)  # critic steps of each shot, on weighted replay and new data
    new_share: float = bounded(0.5, 0, 1, shapes=True)  # of each of their batches that is new data
    batch_multiple: int = count(2)  # times td3.batch_size: their batches
    reuse: Literal["propensity", "uniform"] = "propensity"  # weights of replay: estimated, or 1
    prox: Literal["constant", "ess"] = "constant"  # lambda: prox_coef, or prox_coef * (1 - ESS)
    prox_coef: float = not_negative(1.0)


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """Evaluation on held-out tasks."""

    kind: ClassVar = Kind.MEASURED

    episodes: int = count(2)  # per task, before and after adaptation alike
    history_length: int = count(0, 0)  # steps of history that episodes see; 0 is as in training


@dataclass(frozen=True)
class TaskConfig(Settings):
    """The draw of tasks. All seeds of a run share it, so that their returns compare."""

    kind: ClassVar = Kind.LEARNED

    train: int = count(2)  # training tasks
    held_out: int = count(2)  # K
    seed: int = bounded(0, 0, LARGEST_SEED)
    train_ranges: Ranges = ()  # (parameter, low, high): what training tasks are drawn from
    held_out_ranges: Ranges = ()  # the same for held-out tasks; empty: as the split says


# How the names of settings begin that an algorithm does not read.
_UNREAD = {
    "mql": ("p3o.",),
    "p3o": (
        *("td3.", "propensity.", "adapt.", "train.updates_per_round"),
        *("collect.exploration_noise", "network.history_length", "evaluate.history_length"),
        *("network.changes", "network.task_head"),
    ),
}


@dataclass(frozen=True)
class Config(Settings):
    """The whole algorithm."""

    kind: ClassVar = Kind.LEARNED

    algorithm: Literal["mql", "p3o"] = "mql"  # Meta-Q-Learning, or P3O, which does not adapt
    context_span: Literal["episode", "trial"] = "episode"
    """what the context remembers ends with the episode, or lasts over those of a trial (p3o)"""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    td3: TD3Config = field(default_factory=TD3Config)
    p3o: P3OConfig = field(default_factory=P3OConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    propensity: PropensityConfig = field(default_factory=PropensityConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tasks: TaskConfig = field(default_factory=TaskConfig)

    @property
    def read(self) -> list[str]:
        """The settings, by their dotted names, that the algorithm reads."""
        return [name for name in flatten(self) if not name.startswith(_UNREAD[self.algorithm])]

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
        """Rounds before learning: the first whole round that reaches the number of steps."""
        return -(-self.collect.warmup_steps // self.steps_per_round)

    @property
    def total_rounds(self) -> int:
        """Rounds of the whole run: the first whole round that reaches the number of steps."""
        return -(-self.train.env_steps // self.steps_per_round)

    @property
    def batch(self) -> tuple[str, int]:
        """The setting that sizes the batches of the learner, and how many draws it asks for."""
        if self.algorithm == "p3o":
            return "p3o.minibatch", self.p3o.minibatch
        return "td3.batch_size", self.td3.batch_size

    @property
    def updates_per_round(self) -> float:
        """Critic steps, or steps of P3O, for each round; of these the mean."""
        if self.algorithm == "p3o":
            return 1 + self.p3o.off_policy_steps
        return self.train.updates_per_round

    @property
    def update_to_data(self) -> float:
        """Steps of the learner for each environment step."""
        return self.updates_per_round / self.steps_per_round

    def validate(self, prefix: str = "") -> None:
        """Raises ConfigError if a component cannot work, alone or with the others."""
        super().validate(prefix)
        self._validate_replay()
        self._validate_length()
        self._validate_adaptation()
        self._validate_algorithm()
        adapts = self.algorithm == "mql"
        if adapts and self.network.context_size == 0 and not self.propensity.observation:
            raise ConfigError(
                "propensity.observation is False; without a context (network.context_size 0)"
                " it must be True, for the classifier needs a feature"
            )

    def _validate_algorithm(self) -> None:
        """What the algorithm does not read must not be set."""
        given, read = flatten(self), self.read
        for name, default in flatten(Config()).items():
            if name not in read and given[name] != default:
                raise ConfigError(
                    f"{name} is {given[name]}, which algorithm {self.algorithm} does not read;"
                    f" valid: {default}"
                )
        default = P3OConfig().trial_episodes
        if self.context_span == "episode" and self.p3o.trial_episodes != default:
            raise ConfigError(
                f"p3o.trial_episodes is {self.p3o.trial_episodes}, which is not read where"
                f" context_span is episode; valid: {default}"
            )
        if self.context_span == "trial" and self.algorithm != "p3o":
            raise ConfigError("context_span is trial; valid with algorithm p3o alone")
        if self.context_span == "trial" and not self.network.context_size:
            raise ConfigError(
                "context_span is trial and network.context_size 0; it must be at least 1"
            )

    def _validate_replay(self) -> None:
        collect, history = self.collect, self.network.history_length
        if self.network.task_head and self.tasks.train < 2:
            raise ConfigError(
                f"tasks.train is {self.tasks.train}; with network.task_head it must be at least 2"
            )
        if self.network.changes and collect.unroll < 2:
            raise ConfigError(
                f"collect.unroll is {collect.unroll}; with network.changes it must be at least 2"
            )
        if collect.rows % self.tasks.train:
            raise ConfigError(
                f"collect.rows is {collect.rows}; it must be a multiple of the"
                f" tasks.train {self.tasks.train} training tasks, for each row is bound to one"
            )
        if self.algorithm == "p3o" and not self.slots_per_row:
            raise ConfigError(
                f"collect.replay_capacity is {collect.replay_capacity}; it must hold a round of"
                f" {self.steps_per_round} steps (collect.rows, collect.unroll)"
            )
        if self.algorithm == "mql" and self.slots_per_row <= history:
            raise ConfigError(
                f"network.history_length is {history}; it must be below the {self.slots_per_row}"
                f" replay slots of a row (collect.replay_capacity {collect.replay_capacity}"
                f" over {collect.rows} rows, in unrolls of {collect.unroll})"
            )
        if self.warmup_rounds * collect.unroll > self.slots_per_row:
            raise ConfigError(
                f"collect.warmup_steps is {collect.warmup_steps}; it must fit in the replay, which"
                f" keeps {self.slots_per_row * collect.rows} (collect.replay_capacity)"
            )

    def _validate_length(self) -> None:
        steps, per_round = self.train.env_steps, self.steps_per_round
        if self.total_rounds <= self.warmup_rounds:
            raise ConfigError(
                f"train.env_steps is {steps}; it must be above the"
                f" {self.warmup_rounds * per_round} of warm-up (collect.warmup_steps"
                f" {self.collect.warmup_steps}, in rounds of {per_round}), or nothing would be"
                " learned"
            )
        if self.total_rounds > LARGEST_INT:
            raise ConfigError(
                f"train.env_steps is {steps}; in rounds of {per_round}"
                f" that is {self.total_rounds:,}, and at most {LARGEST_INT:,} can be counted"
            )
        updates = (self.total_rounds - self.warmup_rounds) * self.updates_per_round
        if updates > LARGEST_INT:
            raise ConfigError(
                f"train.env_steps is {steps}; with {self.updates_per_round} updates a round"
                f" that is {updates:,} updates, and at most {LARGEST_INT:,} can be counted"
            )

    def _validate_adaptation(self) -> None:
        drawn = self.adapt.batch_multiple * self.td3.batch_size
        if drawn > LARGEST_INT:
            raise ConfigError(
                f"adapt.batch_multiple is {self.adapt.batch_multiple}; with td3.batch_size"
                f" {self.td3.batch_size} that is {drawn:,} transitions, and at most"
                f" {LARGEST_INT:,} can be counted"
            )
