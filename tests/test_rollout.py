"""Acting: what is recorded, what the policy sees, and where episodes begin and end."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs import probes
from envs.base import Environment, Task
from jmql import mql, networks, replay, rollout
from jmql.config import CollectConfig, Config, NetworkConfig
from jmql.types import Array, History, Policy, Transition

H = 4


class Counter(Environment):
    """Sees (a number drawn at reset, steps taken); reward is the number of the step, 1, 2, ...

    Task `end`: the step that ends the task. The time limit of 7 may come before.
    """

    action_size = 2
    worst_reward = -4.0

    def __init__(self):
        super().__init__(episode_length=7)

    def draw_task(self, key: Array, ranges: object) -> Task:
        return {"end": jnp.float32(5)}

    def start(self, key: Array, task: Task) -> Array:
        return jnp.stack([jax.random.uniform(key), jnp.zeros(())])

    def advance(self, physics: Array, action: Array, task: Task) -> Array:
        return physics + jnp.array([0.0, 1.0])

    def observe(self, physics: Array, task: Task) -> Array:
        return jnp.concatenate([physics, task["end"][None]])

    def reward(self, before: Array, after: Array, action: Array, task: Task) -> Array:
        return after[1]

    def step(self, state, action):
        after = super().step(state, action)
        terminated = after.physics[1] >= state.task["end"]
        return after.replace(terminated=terminated, truncated=after.truncated & ~terminated)


ENV = Counter()
CONFIG = Config(
    network=NetworkConfig((16,), context_size=3, history_length=H),
    collect=CollectConfig(exploration_noise=0.1),
)
NETWORKS = networks.make(CONFIG.network, ENV.action_size)
LEARNER = mql.learner(CONFIG, ENV.action_size)
NEVER = 1000  # a cut that does not cut


def unscaled(weights):
    """Returns what acts, of weights that see everything as it is."""
    return mql.Acting(weights, None)


@functools.cache
def actor_params():
    carry = begin(5)
    # Larger weights, so that every input matters.
    params = NETWORKS.actor.init(jax.random.key(4), carry.env_state.observation, carry.history)
    return jax.tree.map(lambda x: 2 * x, params)


def begin(end: int, seed: int = 0) -> rollout.ActorCarry:
    task = {"end": jnp.float32(end)}
    return rollout.begin(RANDOM, ENV.reset(jax.random.key(seed), task))


def random_action(observation: Array, history: History, key: Array) -> tuple[Array, tuple]:
    return jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0), ()


RANDOM = rollout.windowed(random_action, 2, H)


@functools.partial(jax.jit, static_argnums=(2, 3))
def collect(carry, key, length, cut=NEVER):
    return rollout.collect(ENV, RANDOM, carry, key, length, cut)


def collected(end: int, length: int = 40) -> Transition:
    transitions = collect(begin(end), jax.random.key(1), length)[1]
    return jax.tree.map(np.asarray, transitions)


@pytest.mark.parametrize("end", [1, 3, 7, 100])
def test_successors_are_true_within_and_across_episodes(end):
    steps = collected(end)
    ended = steps.terminated | steps.truncated
    within, across = ~ended[:-1], ended[:-1]
    following, successor = steps.observation[1:], steps.next_observation[:-1]
    np.testing.assert_array_equal(following[within], successor[within])
    # The step that ends an episode leads to its own last state, and the next step starts anew.
    np.testing.assert_array_equal(steps.next_observation[:, 1], steps.step + 1)
    np.testing.assert_array_equal(steps.next_observation[:, 0], steps.observation[:, 0])
    np.testing.assert_array_equal(following[across][:, 1], 0)
    assert (following[across][:, 0] != successor[across][:, 0]).all()
    assert across.sum() == 39 // min(end, 7)


@pytest.mark.parametrize(("end", "length"), [(1, 1), (3, 3), (7, 7), (100, 7)])
def test_steps_and_ends_by_hand(end, length):
    steps = collected(end)
    step = np.arange(40) % length
    np.testing.assert_array_equal(steps.step, step)
    np.testing.assert_array_equal(steps.reward, step + 1)
    np.testing.assert_array_equal(steps.terminated, (step == length - 1) & (end <= 7))
    np.testing.assert_array_equal(steps.truncated, (step == length - 1) & (end > 7))


def test_resets_are_fresh_and_keep_the_task():
    steps = collected(3, length=40)
    starts = steps.observation[steps.step == 0]
    assert len(starts) == 14
    assert len(np.unique(starts[:, 0])) == 14
    assert (steps.observation[:, 2] == 3).all()


def test_a_row_goes_on_where_it_stopped():
    carry, first, _ = collect(begin(5), jax.random.key(1), 8)
    _, second, _ = collect(carry, jax.random.key(2), 8)
    np.testing.assert_array_equal(second.step, (8 + np.arange(8)) % 5)
    np.testing.assert_array_equal(second.observation[0], first.next_observation[-1])


@pytest.mark.parametrize("end", [3, 100])
def test_acting_sees_the_history_that_training_cuts(end):
    carry, befores, afters, transitions = begin(end), [], [], []
    for i in range(30):
        befores.append(carry.history)
        carry, transition, _ = collect(carry, jax.random.key(i), 1)
        afters.append(carry.history)
        transitions.append(transition)
    data = jax.tree.map(lambda *x: jnp.concatenate(x)[None], *transitions)  # [1, 30]
    before, after = (jax.tree.map(lambda *x: np.stack(x), *x) for x in (befores, afters))
    cut = replay.windows(data, jnp.zeros(30, jnp.int32), jnp.arange(30), H)

    def assert_same(seen: History, cut: History) -> None:
        np.testing.assert_array_equal(seen.mask, cut.mask)
        for name in ("observation", "action", "reward"):
            mask = seen.mask if name == "reward" else seen.mask[..., None]
            where = np.broadcast_to(mask, getattr(seen, name).shape)
            np.testing.assert_array_equal(
                getattr(seen, name)[where], np.asarray(getattr(cut, name))[where], err_msg=name
            )

    assert_same(before, cut.history)
    ended = np.asarray(data.terminated | data.truncated)[0]
    going = jax.tree.map(lambda x: np.asarray(x)[~ended], (after, cut.next_history))
    assert_same(*going)
    # Window by window: as many steps as the episode has, at most H, the newest last.
    known = np.minimum(np.asarray(data.step)[0], H)
    np.testing.assert_array_equal(before.mask, np.arange(H) >= (H - known)[:, None])
    assert not after.mask[ended].any()
    assert known.max() == min(H, end - 1)


def test_training_reproduces_the_actions_that_were_taken():
    params = actor_params()
    policy = LEARNER.greedy(unscaled(params), jnp.inf)
    act = jax.jit(
        lambda carry: rollout.collect(ENV, policy, carry, jax.random.key(1), 40, NEVER)[1]
    )
    rows = jax.tree.map(lambda *x: jnp.stack(x), act(begin(100)), act(begin(3, seed=1)))
    memory = replay.add(replay.init(jax.tree.map(lambda x: x[0, 0], rows), 2, 40), rows)
    batch = replay.sample(memory, jax.random.key(2), 300, H)
    again = NETWORKS.act(params, batch.transition.observation, batch.history)
    np.testing.assert_allclose(again, batch.transition.action, atol=1e-5)
    # The history does matter: without it the actions are others.
    blind = batch.history.replace(mask=jnp.zeros_like(batch.history.mask))
    other = NETWORKS.act(params, batch.transition.observation, blind)
    late = np.asarray(batch.transition.step) > 0
    assert (np.abs(other - again).max(-1)[late] > 1e-3).mean() > 0.9


def test_push_drops_the_oldest():
    history = begin(5).history
    for i in range(6):
        # What else there is of a step is not remembered.
        never, other = jnp.zeros((), bool), jnp.full(3, jnp.nan)
        new = jnp.full(3, float(i)), jnp.full(2, -float(i)), jnp.float32(10 * i)
        step = Transition(*new, never, never, other, jnp.int32(i), ())
        history = rollout.push(history, step)
        np.testing.assert_array_equal(history.mask, np.arange(H) >= H - (i + 1))
    np.testing.assert_array_equal(history.observation, np.tile([[2], [3], [4], [5]], 3))
    np.testing.assert_array_equal(history.action, -np.tile([[2], [3], [4], [5]], 2))
    np.testing.assert_array_equal(history.reward, [20, 30, 40, 50])


def test_cut_truncates_at_50_steps():
    env = probes.Endless(episode_length=200)

    def still(observation, history, key):
        return jnp.zeros(1), ()

    policy = rollout.windowed(still, 1, 1)
    start = rollout.begin(policy, env.reset(jax.random.key(0), {}))

    @jax.jit
    def limits(cut):
        _, steps, done = rollout.collect(env, policy, start, jax.random.key(0), 220, cut)
        return steps.step, steps.truncated, steps.terminated, done

    for cut, length in ((50, 50), (200, 200), (NEVER, 200)):
        step, limit, end, done = limits(cut)
        np.testing.assert_array_equal(step, np.arange(220) % length)
        np.testing.assert_array_equal(limit, np.arange(220) % length == length - 1)
        assert not np.asarray(end).any()
        assert int(done.count) == 220 // length
        assert float(done.return_sum) == 220 // length * length


def test_what_a_policy_says_of_itself_is_remembered():
    """Such as a log-probability, which tells the step that it belongs to."""

    def act(observation, history, key):
        return jnp.zeros(2), {"log_prob": -observation[1]}

    policy = rollout.windowed(act, 2, H)

    carry = begin(5)
    steps = jax.jit(lambda key: rollout.collect(ENV, policy, carry, key, 8, NEVER)[1])(
        jax.random.key(0)
    )
    memory = replay.add(replay.init(jax.tree.map(lambda x: x[0], steps), 1, 8), steps_of_row(steps))
    batch = replay.sample(memory, jax.random.key(1), 50, 2)
    np.testing.assert_array_equal(batch.transition.behaviour["log_prob"], -batch.transition.step)


def steps_of_row(steps: Transition) -> Transition:
    """Returns transitions [T] as those of one row, [1, T]."""
    return jax.tree.map(lambda x: x[None], steps)


def test_an_end_at_the_cut_is_an_end_only():
    steps = collect(begin(3), jax.random.key(0), 12, 3)[1]
    np.testing.assert_array_equal(steps.terminated, np.arange(12) % 3 == 2)
    assert not np.asarray(steps.truncated).any()


def test_finished_returns_by_hand():
    # Episodes of 5 steps return 1 + 2 + 3 + 4 + 5 = 15; 8 steps end one, 8 more end two.
    carry, _, first = collect(begin(5), jax.random.key(1), 8)
    assert (float(first.return_sum), int(first.count)) == (15.0, 1)
    assert float(carry.episode_return) == 1 + 2 + 3
    carry, _, second = collect(carry, jax.random.key(2), 8)
    assert (float(second.return_sum), int(second.count)) == (30.0, 2)
    assert float(carry.episode_return) == 1.0
    _, _, third = collect(carry, jax.random.key(3), 2)
    assert (float(third.return_sum), int(third.count)) == (0.0, 0)


def actions(policy: Policy, num: int = 4000) -> np.ndarray:
    """Returns the actions [num, 2] for different keys, after two steps of an episode."""
    carry = collect(begin(5), jax.random.key(0), 2)[0]
    keys = jax.random.split(jax.random.key(7), num)
    act = jax.vmap(lambda key: policy.act(carry.env_state.observation, carry.history, key)[0])
    return np.asarray(jax.jit(act)(keys))


def test_greedy_is_deterministic():
    drawn = actions(LEARNER.greedy(unscaled(actor_params()), jnp.inf))
    assert (drawn == drawn[0]).all()
    carry = collect(begin(5), jax.random.key(0), 2)[0]
    direct = NETWORKS.act(actor_params(), carry.env_state.observation, carry.history)
    np.testing.assert_allclose(drawn[0], direct, atol=1e-6)
    assert np.abs(direct).max() > 0.01


def test_greedy_sees_as_far_back_as_it_may():
    carry = collect(begin(5), jax.random.key(0), 2)[0]
    newest = jax.tree.map(lambda x: x[-1:], carry.history)
    direct = NETWORKS.act(actor_params(), carry.env_state.observation, newest)
    drawn = actions(LEARNER.greedy(unscaled(actor_params()), jnp.int32(1)), 1)[0]
    np.testing.assert_allclose(drawn, direct, atol=1e-6)
    assert (
        np.abs(drawn - actions(LEARNER.greedy(unscaled(actor_params()), jnp.inf), 1)[0]).max()
        > 1e-3
    )


def test_exploring_adds_noise_and_clips():
    params = jax.tree.map(lambda x: 0.3 * x, actor_params())  # away from the bounds
    mean = actions(LEARNER.greedy(unscaled(params), jnp.inf), 1)[0]
    assert np.abs(mean).max() < 0.5
    drawn = actions(LEARNER.explore(unscaled(params), jnp.bool(False)))
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.01)
    np.testing.assert_allclose(drawn.std(0), 0.1, rtol=0.05)
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.05
    wild = dataclasses.replace(CONFIG, collect=CollectConfig(exploration_noise=5.0))
    wild = actions(mql.learner(wild, ENV.action_size).explore(unscaled(params), jnp.bool(False)))
    assert (wild.min(), wild.max()) == (-1.0, 1.0)
    assert 0.7 < (np.abs(wild) == 1.0).mean() < 0.95


def test_warmup_is_uniform_whatever_the_policy():
    drawn = actions(LEARNER.explore(unscaled(actor_params()), jnp.bool(True)))
    assert np.abs(drawn).max() <= 1
    for column in drawn.T:
        sample = (np.sort(column) + 1) / 2
        assert np.abs(sample - np.arange(1, 4001) / 4000).max() < 0.03
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("end", "length"), [(1, 1), (3, 3), (7, 7), (100, 7)], ids=["first", "third", "last", "limit"]
)
def test_episode_masks_what_comes_after_its_end(end, length):
    steps, valid, finished, _ = jax.jit(
        lambda start, key: rollout.episode(ENV, RANDOM, start, key)
    )(begin(end), jax.random.key(1))
    assert valid.shape == steps.reward.shape == (7,)
    assert (finished.blew_up, finished.count) == (0, 1)
    np.testing.assert_array_equal(valid, np.arange(7) < length)
    assert finished.return_sum == length * (length + 1) / 2
    assert bool(steps.terminated[length - 1]) == (end <= 7)
    assert bool(steps.truncated[length - 1]) == (end > 7)
    np.testing.assert_array_equal(steps.observation[:length, 1], np.arange(length))
    np.testing.assert_array_equal(steps.observation[0], begin(end).env_state.observation)


class Fragile(Counter):
    """Its reward is infinite at the third step, or beyond all bounds."""

    step = Environment.step

    def reward(self, before: Array, after: Array, action: Array, task: Task) -> Array:
        return 1.0 / (jnp.abs(3.0 - after[1]) + self.gap)


@pytest.mark.parametrize("gap", [0.0, 1e-30])
def test_physics_that_blows_up_is_counted_and_not_recorded(gap):
    """Two steps earn 1 / 2 and 1; the third and the four that were left count as the worst."""
    env = Fragile()
    env.gap = gap
    start = rollout.begin(RANDOM, env.reset(jax.random.key(0), {"end": jnp.float32(100)}))
    collect = jax.jit(lambda: rollout.collect(env, RANDOM, start, jax.random.key(1), 8, NEVER))
    carry, steps, finished = collect()
    assert (finished.blew_up, finished.count) == (2, 2)
    assert finished.return_sum == 2 * (0.5 + 1.0 + 5 * env.worst_reward)
    np.testing.assert_array_equal(np.flatnonzero(steps.truncated), [2, 5])
    np.testing.assert_array_equal(np.asarray(steps.reward)[[2, 5]], env.worst_reward)
    assert not np.asarray(steps.terminated).any()
    assert all((np.abs(leaf) < 1e10).all() for leaf in jax.tree.leaves((steps, carry.history)))
    play = jax.jit(lambda: rollout.episode(env, RANDOM, start, jax.random.key(1)))
    _, valid, finished, _ = play()
    assert finished.blew_up
    assert finished.return_sum == 0.5 + 1.0 + 5 * env.worst_reward
    assert valid.sum() == 3
