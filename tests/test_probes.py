"""The probe ladder: the real learner, on problems whose answer is known."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from envs import probes
from envs.base import Environment, Task
from jmql import evaluate, mql, networks, replay, rollout, td3, train
from jmql.config import (
    CollectConfig,
    Config,
    EvaluateConfig,
    NetworkConfig,
    PropensityConfig,
    TaskConfig,
    TD3Config,
    TrainConfig,
)
from jmql.replay import ReplayState
from jmql.td3 import AgentState
from jmql.types import Array, Batch, History, Transition
from tests import tiny

DISCOUNT = 0.8
SEEDS = 3
TD3 = TD3Config(learning_rate=3e-3, discount=DISCOUNT, tau=0.05, target_noise=0.1, batch_size=64)
BLIND = networks.make(NetworkConfig((16, 16), context_size=0), action_size=1)


def random_play(env: Environment, rows: int = 16, steps: int = 64) -> ReplayState:
    """Fills a replay with uniformly random actions."""

    def act(observation: Array, history: History, key: Array) -> tuple[Array, tuple]:
        return jax.random.uniform(key, (1,), minval=-1.0, maxval=1.0), ()

    policy = rollout.windowed(act, 1, 1)

    def play(key: Array) -> Transition:
        reset_key, key = jax.random.split(key)
        start = rollout.begin(policy, env.reset(reset_key, env.sample_task(key)))
        return rollout.collect(env, policy, start, key, steps, env.episode_length)[1]

    transitions = jax.jit(jax.vmap(play))(jax.random.split(jax.random.key(0), rows))
    memory = replay.init(jax.tree.map(lambda x: x[0, 0], transitions), rows, steps)
    return replay.add(memory, transitions)


@jax.jit
def learn(memory: ReplayState) -> AgentState:
    """Trains without a context; compiled once for all probes, whose shapes are the same."""
    agent_key, learn_key = jax.random.split(jax.random.key(1))
    agent = td3.init(BLIND, agent_key, jnp.zeros(1), jnp.zeros(1))

    def draw(key: Array) -> tuple[Batch, Array]:
        return replay.sample(memory, key, TD3.batch_size, 1), jnp.zeros(())

    return td3.train(TD3, BLIND, agent, learn_key, 2000, draw)[0]


def empty(rows: int) -> History:
    """Returns windows [rows, 1] of episodes that have not begun."""
    zeros = jnp.zeros((rows, 1))
    return History(zeros[..., None], zeros[..., None], zeros, jnp.zeros((rows, 1), bool))


def values(agent: AgentState, observation: float) -> np.ndarray:
    """Returns Q1 and Q2 [2, 3] at an observation, for the actions -1, 0 and 1."""
    actions = jnp.array([[-1.0], [0.0], [1.0]])
    seen = jnp.full((3, 1), observation)
    return np.stack(BLIND.values(agent.params["critic"], seen, empty(3), actions))


def test_constant_reward_is_the_value():
    agent = learn(random_play(probes.ConstantReward()))
    np.testing.assert_allclose(values(agent, 0.0), 1.0, atol=0.05)


def test_value_follows_the_observation():
    agent = learn(random_play(probes.ObservationReward()))
    np.testing.assert_allclose(values(agent, -1.0), -1.0, atol=0.1)
    np.testing.assert_allclose(values(agent, 1.0), 1.0, atol=0.1)


def test_value_of_a_later_reward_is_discounted_once():
    agent = learn(random_play(probes.TwoStep()))
    np.testing.assert_allclose(values(agent, 0.0), DISCOUNT, atol=0.05)
    np.testing.assert_allclose(values(agent, 1.0), 1.0, atol=0.05)


def test_time_limit_bootstraps_and_a_true_end_does_not():
    memory = random_play(probes.Endless(episode_length=5))
    agent = learn(memory)
    np.testing.assert_allclose(values(agent, 0.0), 1 / (1 - DISCOUNT), atol=0.25)
    # The same data with every limit taken for an end: no step is worth more than five rewards.
    ended = memory.data.replace(terminated=memory.data.truncated)
    agent = learn(memory.replace(data=ended))
    assert values(agent, 0.0).max() < (1 - DISCOUNT**5) / (1 - DISCOUNT)


def test_policy_climbs_to_the_best_action():
    agent = learn(random_play(probes.ActionReward()))
    action = BLIND.act(agent.params["actor"], jnp.zeros((1, 1)), empty(1))
    np.testing.assert_allclose(action, 0.5, atol=0.05)
    np.testing.assert_allclose(values(agent, 0.0)[:, 1:], -0.25, atol=0.05)


class Trap(probes.Endless):
    """Every step costs 1, and an action above 0 breaks the physics: Q is -1 / (1 - discount), or
    where it breaks `worst_reward` and then the same. If a break were an end, it would be the best.
    """

    def advance(self, physics: Array, action: Array, task: Task) -> Array:
        return jnp.where(action[0] > 0, jnp.inf, physics + 1.0)

    def reward(self, before: Array, after: Array, action: Array, task: Task) -> Array:
        return -jnp.where(jnp.isfinite(after), 1.0, jnp.nan)


def test_breaking_the_physics_is_never_the_way_out():
    env = Trap(episode_length=20)
    agent = learn(random_play(env))
    best = -1 / (1 - DISCOUNT)
    np.testing.assert_allclose(values(agent, 0.0)[:, 0], best, atol=0.3)
    np.testing.assert_allclose(
        values(agent, 0.0)[:, 2], env.worst_reward + DISCOUNT * best, atol=0.3
    )
    assert BLIND.act(agent.params["actor"], jnp.zeros((1, 1)), empty(1)) < 0


@functools.cache
def hidden_bandit_returns(context_size: int) -> np.ndarray:
    """Trains on HiddenBandit; returns the greedy returns [2] of both goals."""
    env = probes.HiddenBandit(episode_length=5)
    config = Config(
        network=NetworkConfig((32, 32), context_size, history_length=5),
        td3=dataclasses.replace(TD3, learning_rate=3e-3, discount=0.5),
        collect=CollectConfig(
            rows=16, unroll=10, exploration_noise=0.3, warmup_steps=1600, replay_capacity=16 * 400
        ),
        train=TrainConfig(updates_per_round=40),
        propensity=PropensityConfig(observation=True),
    )
    config.validate()
    learner = mql.learner(config, env.action_size)
    tasks = env.sample_tasks(jax.random.key(0), 2)
    state = train.init(config, env, learner, tasks, jax.random.key(1))

    @jax.jit
    def epoch(state, rounds, warmup):
        updates = state.agent.updates
        return train.epoch(config, env, learner, state, rounds, warmup, updates)[0]

    state = epoch(state, jnp.int32(10), jnp.bool(True))
    # After 40 rounds one seed in eight still sits in the saddle where both goals look the same.
    state = epoch(state, jnp.int32(100), jnp.bool(False))

    @jax.jit
    def play(task):
        policy = learner.greedy(learner.actor(state.agent), jnp.inf)
        start = rollout.begin(policy, env.reset(jax.random.key(2), task))
        transitions, valid, *_ = rollout.episode(env, policy, start, jax.random.key(3))
        return jnp.sum(transitions.reward * valid)

    return np.asarray(jax.vmap(play)(tasks))


def test_history_reveals_the_goal():
    returns = hidden_bandit_returns(context_size=8)
    # The best are +-1 at the first step, then 1 at each of the other four: 4 in the mean.
    assert returns.mean() > 3.5
    assert returns.min() > 2.5


def test_without_a_context_the_goals_cancel():
    returns = hidden_bandit_returns(context_size=0)
    np.testing.assert_allclose(returns.mean(), 0.0, atol=1e-5)


@functools.cache
def reversed_bandit() -> dict[str, np.ndarray]:
    """Meta-trains on ReversedBandit and adapts to a held-out goal of the minority.

    Returns the metrics of `evaluate_task` and `return_uniform`, all as `return_post` but for
    weights of one. [SEEDS] each.
    """
    env = probes.ReversedBandit(episode_length=8)
    config = Config(
        network=NetworkConfig((16,), context_size=0, history_length=1),
        td3=dataclasses.replace(TD3, learning_rate=1e-3, discount=0.0),
        collect=CollectConfig(rows=16, unroll=8, warmup_steps=8192, replay_capacity=16 * 512),
        train=TrainConfig(updates_per_round=64),
        propensity=PropensityConfig(observation=True),
        adapt=dataclasses.replace(
            tiny.CONFIG.adapt,
            episodes=8,
            learning_rate=1e-2,
            step1_updates=10,
            updates=100,
            batch_multiple=4,
        ),
        evaluate=EvaluateConfig(episodes=8),
        tasks=TaskConfig(train=16),
    )
    unweighted = dataclasses.replace(
        config, adapt=dataclasses.replace(config.adapt, reuse="uniform")
    )
    config.validate()
    learner = mql.learner(config, env.action_size)
    tasks = env.sample_tasks(jax.random.key(0), config.tasks.train)

    @jax.jit
    def epoch(state, rounds, warmup):
        updates = state.agent.updates
        return train.epoch(config, env, learner, state, rounds, warmup, updates)[0]

    @functools.partial(jax.jit, static_argnums=0)
    def adapt(config, agent, memory):
        task = {"goal": jnp.array(-0.5)}
        learner = mql.learner(config, env.action_size)
        keys = jax.random.key(2), jax.random.key(3)  # of its episodes, and of replay
        return evaluate.evaluate_task(config, env, learner, agent, memory, task, *keys)[0]

    stages = []
    for seed in range(SEEDS):
        state = train.init(config, env, learner, tasks, jax.random.key(seed))
        state = epoch(state, jnp.int32(4), jnp.bool(True))
        state = epoch(state, jnp.int32(60), jnp.bool(False))
        weighted = adapt(config, state.agent, state.memory)
        uniform = adapt(unweighted, state.agent, state.memory)
        stages.append(weighted | {"return_uniform": uniform["return_post"]})
    return {name: np.array([stage[name] for stage in stages]) for name in stages[0]}


def test_policy_of_the_majority_is_wrong_for_the_minority():
    # The best return is 0. An action on the wrong side of 0 earns less than -0.25 at each of
    # eight steps.
    assert (reversed_bandit()["return_pre"] < -3).all()


def test_replay_weighted_by_propensity_puts_it_right():
    returns = reversed_bandit()
    assert (returns["return_post"] > -1.5).all()
    assert (returns["return_post"] > returns["return_step1"] + 1.5).all()


def test_unweighted_replay_does_not():
    returns = reversed_bandit()
    assert (returns["return_uniform"] < -3).all()


def test_weights_single_out_the_minority():
    returns = reversed_bandit()
    # One replay sample in eight is of the minority; with equal weights for them alone, the
    # effective sample size is an eighth.
    assert (np.abs(returns["ess"] - 1 / 8) < 0.1).all()
    assert (returns["beta_zero_share"] > 0.4).all()
    assert (returns["classifier_accuracy"] > 0.85).all()


def test_the_map_of_reuse_peaks_at_the_tasks_that_are_like_the_new_one():
    """Of sixteen training tasks, two are of the minority, as the new one is."""
    shares = reversed_bandit()["reuse"]
    tasks = probes.ReversedBandit(episode_length=8).sample_tasks(jax.random.key(0), 16)
    distance = np.abs(np.asarray(tasks["goal"]) + 0.5)
    assert (shares[:, [7, 15]].sum(1) > 0.75).all()
    for mine in shares:
        assert stats.spearmanr(distance, mine).statistic < -0.3
