"""P3O: against NumPy, part by part, and on problems whose answer is known."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from envs import probes
from envs.base import Environment
from jmql import evaluate, inputs, p3o, policy_gradient, replay, rollout, train
from jmql.config import (
    CollectConfig,
    Config,
    EvaluateConfig,
    NetworkConfig,
    P3OConfig,
    TaskConfig,
    TrainConfig,
)
from jmql.networks import ActorCritic
from jmql.settings import ConfigError, replaced
from jmql.types import Transition
from tests import numpy_mql

O, A, Z, N, T = 3, 2, 4, 5, 6
MODULES = ActorCritic((5, 4), Z, A, initial_std=0.7)
SMALL = Config(
    algorithm="p3o",
    network=NetworkConfig((5, 4), Z, normalize=True),
    collect=CollectConfig(rows=4, unroll=T, warmup_steps=1, replay_capacity=240),
    train=TrainConfig(env_steps=2400),
    p3o=P3OConfig(minibatch=N, off_policy_after=0, initial_std=0.7),
)


def make_steps(seed, count=N, length=T) -> Transition:
    """Random fragments [count, length]: some steps end the task, some reach a limit."""
    rng = np.random.default_rng(seed)

    def normal(*rest):
        return rng.normal(size=(count, length, *rest)).astype(np.float32)

    end = rng.integers(0, 5, (count, length))
    return Transition(
        observation=normal(O),
        action=0.8 * normal(A),
        reward=normal(),
        terminated=end == 1,
        truncated=end == 2,
        next_observation=normal(O),
        step=rng.integers(0, 2, (count, length)).astype(np.int32),
        behaviour=policy_gradient.Behaviour(
            mean=0.3 * normal(A), log_std=0.2 * normal(A) - 0.3, context=0.5 * normal(Z)
        ),
    )


@functools.cache
def make_params():
    """Weights whose means and values are not next to 0."""
    agent = p3o.learner(SMALL, A).init(jax.random.key(0), jnp.zeros(O), jnp.zeros(A))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), agent.params
    )


# What networks see is not what was collected, nor is what they learn from what was earned.
SCALE = inputs.Scale(
    inputs.Moments(np.array([0.5, -0.2, 0.1], np.float32), np.array([2.0, 0.5, 0.01], np.float32)),
    inputs.Moments(np.float32(0.3), np.float32(0.6)),
    np.float32(9),
)
RETURNS = policy_gradient.Returns(
    np.zeros(4, np.float32), inputs.Moments(np.float32(1.0), np.float32(4.0)), np.float32(9)
)


@jax.jit
def see(params, steps):
    return policy_gradient.see(MODULES, params, SCALE, steps)


# --- Written anew in NumPy and float64.


def numpy_gae(config, reward, value, next_value, terminated, ended):
    """The definition: the sum of discounted errors up to the end, for each step anew."""
    found = np.zeros_like(reward)
    for row in range(len(reward)):
        for t in range(reward.shape[1]):
            weight = 1.0
            for later in range(t, reward.shape[1]):
                beyond = 0.0 if terminated[row, later] else next_value[row, later]
                miss = reward[row, later] + config.discount * beyond - value[row, later]
                found[row, t] += weight * miss
                if ended[row, later]:
                    break
                weight *= config.discount * config.gae_lambda
    return found


def numpy_mlp(weights, x):
    for i in range(len(weights)):
        layer = weights[f"Dense_{i}"]
        x = (np.tanh(x) if i else x) @ layer["kernel"] + layer["bias"]
    return x


def normal(moments, x):
    return np.clip((x - moments.mean) / np.sqrt(np.asarray(moments.variance) + 1e-8), -10, 10)


def numpy_see(weights, steps):
    """Mean, standard deviation, value and value of the successor, of fragments."""
    seen, earned = SCALE.observation, SCALE.reward
    weights = weights["params"]
    found = {name: [] for name in ("mean", "value", "next_value")}
    context = steps.behaviour.context[:, 0].astype(float)
    for t in range(steps.reward.shape[1]):
        one = jax.tree.map(lambda x, t=t: np.asarray(x[:, t], float), steps)
        began = (one.step == 0)[:, None]
        x = [np.clip(one.action, -1, 1), normal(earned, one.reward)[:, None]]
        x += [normal(seen, one.observation), began]
        following = numpy_mql.gru_step(weights["encoder"], context, np.concatenate(x, 1))
        at = np.concatenate([normal(seen, one.observation), context], 1)
        found["mean"].append(numpy_mlp(weights["policy"], at))
        found["value"].append(numpy_mlp(weights["critic"], at)[:, 0])
        after = np.concatenate([normal(seen, one.next_observation), following], 1)
        found["next_value"].append(numpy_mlp(weights["critic"], after)[:, 0])
        ended = (one.terminated + one.truncated > 0)[:, None]
        context = np.where(ended, 0.0, following)
    return {k: np.stack(v, 1) for k, v in found.items()} | {"std": np.exp(weights["log_std"])}


def numpy_loss(config, weights, fixed, steps, off_policy):
    """The loss of weights, where `fixed` are the weights of what carries no gradient."""
    now, was = numpy_see(weights, steps), numpy_see(fixed, steps)
    ended = steps.terminated | steps.truncated
    reward = steps.reward.astype(float)
    advantage = numpy_gae(config, reward, was["value"], was["next_value"], steps.terminated, ended)
    value_loss = 0.5 * np.mean((advantage + was["value"] - now["value"]) ** 2)

    def log_prob(seen):
        return stats.norm.logpdf(steps.action, seen["mean"], seen["std"]).sum(-1)

    whole = config.value_coef * value_loss
    if not off_policy:
        entropy = stats.norm.entropy(scale=now["std"]).sum()
        return whole - np.mean(advantage * log_prob(now)) - config.entropy_coef * entropy
    beta = steps.behaviour
    mean, std = beta.mean.astype(float), np.exp(beta.log_std.astype(float))
    rho = np.exp(log_prob(was) - stats.norm.logpdf(steps.action, mean, std).sum(-1))
    ess = rho.sum() ** 2 / (rho.size * (rho**2).sum())
    kl = np.log(std / now["std"]) + (now["std"] ** 2 + (now["mean"] - mean) ** 2) / (2 * std**2)
    kl = (kl - 0.5).sum(-1).mean()
    clip = ess if config.clip == "ess" else config.clip
    coef = 1 - ess if config.kl_coef == "ess" else config.kl_coef
    policy = -np.mean(np.minimum(rho, clip) * advantage * log_prob(now))
    return whole + policy + coef * kl


@pytest.mark.parametrize(
    ("off_policy", "changes"),
    [(False, {}), (True, {}), (True, {"clip": 1.5, "kl_coef": 0.3}), (False, {"gae_lambda": 0.5})],
)
def test_loss_and_gradient_are_those_of_numpy(off_policy, changes):
    config = dataclasses.replace(SMALL.p3o, **changes)
    params, steps = make_params(), make_steps(2)

    def objective(params):
        seen = policy_gradient.see(MODULES, params, SCALE, steps)
        return policy_gradient.loss(config, seen, steps, jnp.asarray(steps.reward), off_policy)

    (loss, _), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    double = jax.tree.map(lambda x: np.asarray(x, float), params)
    vector, unflatten = numpy_mql.flatten(double)

    def expected(vector):
        return numpy_loss(config, unflatten(vector), double, steps, off_policy)

    np.testing.assert_allclose(loss, expected(vector), rtol=1e-5)
    slope = numpy_mql.gradient(expected, vector)
    np.testing.assert_allclose(numpy_mql.flatten(gradient)[0], slope, rtol=2e-4, atol=2e-5)


def test_gae_against_a_slow_loop():
    steps = make_steps(4, 40, 5)
    rng = np.random.default_rng(5)
    value, next_value = rng.normal(size=(2, 40, 5)).astype(np.float32)
    found = policy_gradient.gae(SMALL.p3o, jnp.asarray(steps.reward), value, next_value, steps)
    ended = steps.terminated | steps.truncated
    assert ended.any(1).any()
    assert not ended.any(1).all()
    args = (steps.reward, value, next_value, steps.terminated, ended)
    np.testing.assert_allclose(found, numpy_gae(SMALL.p3o, *args), rtol=1e-4, atol=1e-5)


def test_divergence_and_entropy_against_sampling():
    rng = np.random.default_rng(6)
    mean, other = rng.normal(size=(2, A)).astype(np.float32)
    log_std, other_log_std = (0.4 * rng.normal(size=(2, A))).astype(np.float32)
    drawn = mean + np.exp(log_std) * rng.normal(size=(400_000, A)).astype(np.float32)
    own = policy_gradient.log_density(
        drawn, *np.broadcast_arrays(mean[None], drawn)[:1], log_std[None]
    )
    gap = own - policy_gradient.log_density(drawn, other[None], other_log_std[None])
    np.testing.assert_allclose(
        policy_gradient.divergence(mean, log_std, other, other_log_std), gap.mean(), rtol=0.01
    )
    np.testing.assert_allclose(policy_gradient.entropy(log_std), -own.mean(), rtol=0.01)
    assert policy_gradient.divergence(mean, log_std, mean, log_std) == 0


def test_off_policy_is_on_policy_where_the_policy_is_the_one_that_acted():
    """At rho = 1 the effective sample size is 1, lambda 0, and the gradient the on-policy one."""
    config, params = dataclasses.replace(SMALL.p3o, entropy_coef=0.0), make_params()
    steps = make_steps(7)
    seen = see(params, steps)
    behaviour = steps.behaviour.replace(mean=seen.mean, log_std=seen.log_std)
    steps = steps.replace(behaviour=behaviour)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(off_policy):
        def objective(params):
            seen = policy_gradient.see(MODULES, params, SCALE, steps)
            return policy_gradient.loss(config, seen, steps, jnp.asarray(steps.reward), off_policy)

        return jax.grad(objective, has_aux=True)(params)

    (on, _), (off, found) = gradient(False), gradient(True)
    np.testing.assert_allclose(found["ess"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(found["kl_coef"], 0.0, atol=1e-6)
    np.testing.assert_allclose(*(numpy_mql.flatten(x)[0] for x in (on, off)), rtol=1e-4, atol=1e-6)


def test_one_step_that_outweighs_all_others_leaves_an_effective_sample_of_one():
    """And all others next to nothing: rho is clipped, the policy held to the one that acted."""
    steps, params = make_steps(8), make_params()
    seen = see(params, steps)
    mean = np.array(seen.mean)
    mean[0, 0] = steps.action[0, 0] + 6 * np.exp(seen.log_std[0, 0])  # who acted never acts so
    steps = steps.replace(behaviour=steps.behaviour.replace(mean=mean, log_std=seen.log_std))
    _, found = policy_gradient.loss(SMALL.p3o, seen, steps, jnp.asarray(steps.reward), True)
    np.testing.assert_allclose(found["ess"], 1 / steps.reward.size, rtol=1e-3)
    assert found["clip"] == found["ess"]
    np.testing.assert_allclose(found["kl_coef"], 1 - found["ess"])


def test_an_update_is_rmsprop_of_a_clipped_gradient():
    """With eps outside the root, as the release has it, and no momentum."""
    config = dataclasses.replace(SMALL.p3o, max_grad_norm=0.05)
    agent = p3o.learner(SMALL, A).init(jax.random.key(0), jnp.zeros(O), jnp.zeros(A))
    agent = agent.replace(params=make_params(), scale=SCALE, returns=RETURNS)
    update = jax.jit(policy_gradient.update, static_argnums=(0, 1, 5))
    vector, _ = numpy_mql.flatten(agent.params)
    square = np.zeros_like(vector)
    for i, rate in enumerate((0.01, 0.005)):
        steps = make_steps(10 + i)

        def objective(params, steps=steps):
            seen = policy_gradient.see(MODULES, params, SCALE, steps)
            reward = jnp.asarray(np.clip(steps.reward / 2, -10, 10))  # their variance is 4
            return policy_gradient.loss(config, seen, steps, reward, False)[0]

        slope, _ = numpy_mql.flatten(jax.jit(jax.grad(objective))(agent.params))
        norm = np.linalg.norm(slope)
        assert norm > 0.05
        slope = slope * 0.05 / norm
        square = 0.99 * square + 0.01 * slope**2
        vector = vector - rate * slope / (np.sqrt(square) + 1e-5)
        agent, found = update(config, MODULES, agent, steps, jnp.float32(rate), False)
        np.testing.assert_allclose(found["grad_norm"], norm, rtol=1e-4)
        np.testing.assert_allclose(numpy_mql.flatten(agent.params)[0], vector, rtol=1e-3, atol=1e-5)
    assert agent.updates == 2


def test_rewards_are_scaled_by_the_spread_of_discounted_returns():
    """Over all steps so far, row by row, from zero after each end."""
    returns = p3o.learner(SMALL, A).init(jax.random.key(0), jnp.zeros(O), jnp.zeros(A)).returns
    so_far, seen = np.zeros(4), []
    for i in range(3):
        steps = make_steps(20 + i, 4)
        returns = policy_gradient.counted(SMALL.p3o, returns, steps)
        for t in range(T):
            so_far = SMALL.p3o.discount * so_far + steps.reward[:, t]
            seen.append(so_far)
            so_far = np.where(steps.terminated[:, t] | steps.truncated[:, t], 0, so_far)
    np.testing.assert_allclose(returns.so_far, so_far, rtol=1e-5)
    np.testing.assert_allclose(returns.moments.mean, np.mean(seen), rtol=1e-4)
    np.testing.assert_allclose(returns.moments.variance, np.var(seen), rtol=1e-4)
    assert returns.count == 3 * 4 * T
    reward = jnp.array([0.5, -2.0, 100.0])
    expected = np.clip(np.asarray(reward) / np.std(seen), -10, 10)
    np.testing.assert_allclose(policy_gradient.scaled(returns, reward), expected, rtol=1e-4)
    assert expected[-1] == 10
    np.testing.assert_array_equal(policy_gradient.scaled(None, reward), reward)


# --- A round.


def filled(config=SMALL, rounds=3):
    """Returns a fresh agent and a replay of a few rounds."""
    learner = p3o.learner(config, A)
    agent = learner.init(jax.random.key(0), jnp.zeros(O), jnp.zeros(A))
    example = jax.tree.map(lambda x: jnp.asarray(x[0, 0]), make_steps(0))
    memory = replay.init(example, 4, config.slots_per_row)
    for i in range(rounds):
        memory = replay.add(memory, jax.tree.map(jnp.asarray, make_steps(30 + i, 4)))
    return learner, agent, memory


@functools.cache
def compiled(config):
    """Returns a function of keys [N], a flag, the rounds so far and P3O's numbers: one round."""
    _, agent, memory = filled(config)

    def one(key, active, rounds, numbers):
        learner = p3o.learner(replaced(config, numbers), A)
        return learner.learn(agent.replace(rounds=rounds), memory, {}, key, active, jnp.int32(0))

    return jax.jit(jax.vmap(one, in_axes=(0, None, None, None)))


def learned(config=SMALL, active=True, before=0, **numbers):
    """Returns the agents and sums of one round under many keys."""
    keys = jax.random.split(jax.random.key(1), 400)
    numbers = {f"p3o.{name}": jnp.float32(x) for name, x in numbers.items()}
    numbers = {"p3o.off_policy_steps": jnp.float32(2)} | numbers
    return compiled(config)(keys, jnp.array(active), jnp.int32(before), numbers)


def test_the_number_of_off_policy_steps_is_poisson():
    _, sums = learned()
    counts = np.asarray(sums.off_steps)
    assert abs(counts.mean() - 2) < 4 * (2 / 400) ** 0.5
    assert 1.5 < counts.var() < 2.5
    np.testing.assert_array_equal(sums.on_steps, 1)


def test_off_policy_steps_wait_and_without_them_it_is_a2c():
    later = dataclasses.replace(SMALL, p3o=dataclasses.replace(SMALL.p3o, off_policy_after=240))
    agents, sums = learned(later, before=8)  # 9 rounds of 24 steps with that of warm-up
    assert not sums.off_steps.any()
    assert (agents.updates == 1).all()
    assert learned(later, before=9)[1].off_steps.any()
    agents, sums = learned(off_policy_steps=0.0)
    assert not sums.off_steps.any()
    assert np.ptp(agents.params["params"]["log_std"], axis=0).max() == 0  # no draw is left


def test_warm_up_counts_what_it_sees_and_learns_nothing():
    _, before, _ = filled()
    agents, sums = learned(active=False)
    after = jax.tree.map(lambda x: x[0], agents)
    np.testing.assert_array_equal(
        numpy_mql.flatten(before.params)[0], numpy_mql.flatten(after.params)[0]
    )
    assert after.scale.count == 4 * T
    assert after.returns.count == 4 * T
    assert after.updates == after.rounds == sums.on_steps[0] == sums.off_steps[0] == 0


def test_the_learning_rate_falls_to_zero_at_the_end():
    whole = SMALL.total_rounds - SMALL.warmup_rounds
    learner = p3o.learner(SMALL, A)
    steps = []
    for rounds in (0, whole // 2, whole - 1, whole):
        agents, sums = learned(before=rounds, off_policy_steps=0.0)
        _, before, _ = filled()
        moved = jax.tree.map(lambda x, y: x[None] - y, before.params, agents.params)
        steps.append(np.abs(numpy_mql.flatten(moved)[0]).max())
        metrics = learner.metrics(jax.tree.map(lambda x: x[0], agents), sums)
    assert steps[0] > 1.5 * steps[1] > steps[2] > 1e-6 > 1e-9 > steps[3]
    assert metrics["learning_rate"] < 1e-9
    agents, sums = learned(before=whole)
    assert sums.off_steps.any()
    for here, there in zip(*map(jax.tree.leaves, (before.params, agents.params)), strict=True):
        np.testing.assert_allclose(np.broadcast_to(here, there.shape), there, atol=1e-8)


# Those that are values of what is compiled, and the others.
NUMBERS = {
    "learning_rate": 1e-3,
    "discount": 0.9,
    "gae_lambda": 0.5,
    "off_policy_steps": 4.0,
    "value_coef": 0.1,
    "entropy_coef": 0.5,
    "max_grad_norm": 0.01,
}
OTHERS = {
    "off_policy_after": 240,
    "minibatch": 4,
    "clip": 0.1,
    "kl_coef": 2.0,
    "initial_std": 0.3,
}


@functools.cache
def two_rounds(config):
    """RMSProp's first step hides the size of a gradient that is not clipped, so there are two."""
    _, agent, memory = filled(config)

    @jax.jit
    def one(agent, key, numbers):
        learner = p3o.learner(replaced(config, numbers), A)
        return learner.learn(agent, memory, {}, key, jnp.array(True), jnp.int32(0))[0]

    return lambda numbers: (
        one(one(agent, jax.random.key(4), numbers), jax.random.key(5), numbers).params
    )


def weights_after(numbers, **others):
    config = dataclasses.replace(SMALL, p3o=dataclasses.replace(SMALL.p3o, **others))
    numbers = {f"p3o.{name}": numbers.get(name, getattr(SMALL.p3o, name)) for name in NUMBERS}
    return numpy_mql.flatten(two_rounds(config)(numbers))[0]


@pytest.mark.parametrize("name", [*NUMBERS, *OTHERS])
def test_every_setting_changes_the_result(name):
    assert {*NUMBERS, *OTHERS, "trial_episodes"} == {item.name for item in SMALL.p3o.items()}
    numbers = {name: NUMBERS[name]} if name in NUMBERS else {}
    others = {name: OTHERS[name]} if name in OTHERS else {}
    assert np.abs(weights_after(numbers, **others) - weights_after({})).max() > 1e-6


def test_what_the_algorithm_does_not_read_is_refused():
    for name, value in {"td3.tau": 0.1, "adapt.updates": 3, "network.history_length": 5}.items():
        with pytest.raises(ConfigError, match=f"{name} is {value}, which algorithm p3o does not"):
            replaced(SMALL, {name: value}).validate()
    with pytest.raises(
        ConfigError, match=r"p3o\.minibatch is 7, which algorithm mql does not read"
    ):
        replaced(Config(), {"p3o.minibatch": 7}).validate()
    with pytest.raises(ConfigError, match="context_span is trial; valid with algorithm p3o"):
        replaced(Config(), {"context_span": "trial"}).validate()
    with pytest.raises(ConfigError, match=r"p3o\.clip is 'esss'; valid: ess, or a number"):
        replaced(SMALL, {"p3o.clip": "esss"}).validate()
    with pytest.raises(ConfigError, match="is not read where context_span is episode"):
        replaced(SMALL, {"p3o.trial_episodes": 5}).validate()
    with pytest.raises(ConfigError, match=r"collect\.replay_capacity is 20; it must hold a round"):
        replaced(SMALL, {"collect.replay_capacity": 20}).validate()
    with pytest.raises(ConfigError, match=r"network\.context_size 0; it must be at least 1"):
        replaced(SMALL, {"context_span": "trial", "network.context_size": 0}).validate()


# --- Fragments.


def test_fragments_are_rounds_of_one_row_all_equally_often():
    rows, slots, length = 4, 12, 3
    memory = None
    for i in range(6):  # the ring of four rounds has wrapped
        time = np.broadcast_to(np.arange(i * length, (i + 1) * length), (rows, length))
        steps = jax.tree.map(jnp.asarray, make_steps(0, rows, length))
        steps = steps.replace(step=jnp.asarray(time, jnp.int32))
        steps = steps.replace(reward=jnp.broadcast_to(jnp.arange(4.0)[:, None], (rows, length)))
        if memory is None:
            memory = replay.init(jax.tree.map(lambda x: x[0, 0], steps), rows, slots)
        memory = replay.add(memory, steps)
        np.testing.assert_array_equal(replay.newest(memory, length).step, time)
    drawn = jax.jit(replay.fragments, static_argnums=(2, 3))(memory, jax.random.key(0), 8000, 3)
    assert (np.asarray(drawn.step) == np.asarray(drawn.step[:, :1]) + np.arange(3)).all()
    assert (drawn.reward == drawn.reward[:, :1]).all()
    whole = np.asarray(drawn.step[:, 0]) + 100 * np.asarray(drawn.reward[:, 0])
    kinds, counts = np.unique(whole, return_counts=True)
    assert {*kinds % 100} == {6, 9, 12, 15}  # the last four rounds
    assert len(kinds) == 16
    assert stats.chisquare(counts).pvalue > 1e-4


# --- Acting, and what is remembered.


def test_a_fragment_is_seen_as_it_was_when_it_was_collected():
    """The contexts that are run over it anew are those that acted, over ends of episodes too."""
    for span in ("episode", "trial"):
        config = tiny_config(context_span=span)
        state, env, learner = started(config)
        modules = ActorCritic((16, 16), 8, 1, initial_std=1.0)
        policy = learner.explore(learner.actor(state.agent), jnp.array(False))

        def collect(carry, key, env=env, policy=policy):
            return rollout.collect(env, policy, carry, key, 23, 1000)[1]

        steps = jax.jit(jax.vmap(collect))(state.actors, jax.random.split(jax.random.key(3), 16))
        # The scale changes with learning, not from step to step.
        seen = policy_gradient.see(modules, state.agent.params, state.agent.scale, steps)
        np.testing.assert_allclose(seen.mean, steps.behaviour.mean, atol=1e-5)
        np.testing.assert_allclose(seen.log_std, steps.behaviour.log_std, atol=1e-6)
        ended = np.asarray(steps.terminated | steps.truncated)
        every = {"episode": 5, "trial": 10}[span]
        np.testing.assert_array_equal(
            ended, np.broadcast_to(np.arange(1, 24) % every == 0, (16, 23))
        )
        np.testing.assert_array_equal(steps.step, np.broadcast_to(np.arange(23) % 5, (16, 23)))
        began = np.asarray(steps.behaviour.context) == 0
        assert (began.all(-1) == (np.arange(23) % every == 0)[None]).all()


class Numbered(probes.Probe):
    """Sees which start it is, drawn anew at each reset, and how many steps were taken."""

    def start(self, key, task):
        return jnp.stack([jax.random.uniform(key), jnp.zeros(())])

    def advance(self, physics, action, task):
        return physics + jnp.array([0.0, 1.0])

    def observe(self, physics, task):
        return physics

    def reward(self, before, after, action, task):
        return jnp.ones(())

    def unhealthy(self, physics):
        return physics[1] >= 3


def untrained():
    """Returns a policy that explores, for two numbers to see, in trials of two episodes."""
    learner = p3o.learner(tiny_config(context_span="trial"), 1)
    agent = learner.init(jax.random.key(0), jnp.zeros(2), jnp.zeros(1))
    return learner.explore(learner.actor(agent), jnp.array(False))


def test_within_a_trial_the_successor_of_a_last_step_is_the_next_first_one():
    env, policy = Numbered(episode_length=10), untrained()
    start = rollout.begin(policy, env.reset(jax.random.key(0), {}))
    _, steps, finished = jax.jit(lambda key: rollout.collect(env, policy, start, key, 12, 1000))(
        jax.random.key(1)
    )
    np.testing.assert_array_equal(steps.terminated, np.arange(1, 13) % 6 == 0)
    assert not steps.truncated.any()
    following, successor = steps.observation[1:], steps.next_observation[:-1]
    same = (following == successor).all(-1)
    np.testing.assert_array_equal(same, ~steps.terminated[:-1])
    assert steps.next_observation[-1, 1] == 3  # of the end of a trial the true one
    assert finished.count == 4
    assert finished.return_sum == 12


def test_what_comes_after_an_early_end_is_not_remembered():
    env, policy = Numbered(episode_length=10), untrained()
    starts = jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(jax.random.key(0), 2), {})
    steps, valid, *_ = jax.jit(lambda key: rollout.trial(env, policy, starts, key))(
        jax.random.key(1)
    )
    np.testing.assert_array_equal(valid, np.broadcast_to(np.arange(10) < 3, (2, 10)))
    memory = policy.start(jnp.zeros(2))
    for i in range(3):
        memory = policy.remember(memory, jax.tree.map(lambda x, i=i: x[0, i], steps))
    np.testing.assert_allclose(steps.behaviour.context[1, 0], memory.context, atol=1e-6)
    assert memory.context.any()


# --- Problems whose answer is known.


def tiny_config(**changes):
    discount = changes.pop("discount", 0.8)
    p3o_changes = changes.pop("p3o", {})
    context_size = changes.pop("context_size", 8)
    learner = dict(
        learning_rate=5e-3,
        discount=discount,
        off_policy_after=0,
        off_policy_steps=1.0,
        minibatch=16,
        trial_episodes=2,
        entropy_coef=0.0,
    )
    return Config(
        algorithm="p3o",
        network=NetworkConfig((16, 16), context_size),
        collect=CollectConfig(rows=16, unroll=10, warmup_steps=1, replay_capacity=3200),
        train=TrainConfig(env_steps=160 * 400),
        p3o=P3OConfig(**learner | p3o_changes),
        evaluate=EvaluateConfig(episodes=16),
        tasks=TaskConfig(train=16, held_out=2),
        **changes,
    )


def started(config, env: Environment | None = None):
    env = env or probes.HiddenBandit(episode_length=5)
    learner = p3o.learner(config, 1)
    tasks = env.sample_tasks(jax.random.key(0), config.tasks.train)
    init = jax.jit(functools.partial(train.init, config, env, learner, tasks))
    return init(jax.random.key(1)), env, learner


def trained(config, env, rounds=400):
    """Returns what is left of training on a probe: the agent, and its metrics."""
    state, env, learner = started(config, env)

    @jax.jit
    def run(state):
        none = jnp.int32(0)
        epoch = functools.partial(train.epoch, config, env, learner)
        state, _ = epoch(state, jnp.int32(1), jnp.array(True), none)
        return epoch(state, jnp.int32(rounds), jnp.array(False), none)

    state, metrics = run(state)
    return state, learner, metrics


def value(config, state, observation):
    modules = ActorCritic((16, 16), config.network.context_size, 1, config.p3o.initial_std)
    context = jnp.zeros(config.network.context_size)
    seen = jnp.full(1, observation)
    return modules.apply(state.agent.params, seen, context, method="value")


class Single(probes.Probe):
    """A task that has a leaf, for rows to be bound to."""

    def draw_task(self, key, ranges):
        return {"none": jnp.zeros(0)}


def with_task(probe):
    return type(probe.__name__, (Single, probe), {"draw_task": Single.draw_task})


def test_values_of_the_probes():
    blind = tiny_config(context_size=0)
    state, _, _ = trained(blind, with_task(probes.ObservationReward)())
    found = [value(blind, state, x) for x in (-1.0, 1.0)]
    np.testing.assert_allclose(found, [-1, 1], atol=0.1)
    state, _, _ = trained(blind, with_task(probes.TwoStep)())
    found = [value(blind, state, x) for x in (0.0, 1.0)]
    np.testing.assert_allclose(found, [0.8, 1.0], atol=0.05)


def test_a_time_limit_bootstraps():
    blind = tiny_config(context_size=0)
    state, _, _ = trained(blind, with_task(probes.Endless)(episode_length=5), 400)
    np.testing.assert_allclose(value(blind, state, 0.0), 5.0, atol=0.3)


def test_the_policy_climbs_to_the_best_action():
    blind = tiny_config(context_size=0)
    state, learner, _ = trained(blind, with_task(probes.ActionReward)(), 400)
    policy = learner.greedy(learner.actor(state.agent), jnp.int32(0), 0.0)
    action, _ = policy.act(jnp.zeros(1), policy.start(jnp.zeros(1)), jax.random.key(0))
    np.testing.assert_allclose(action, 0.5, atol=0.1)


def returns(config, rounds=400):
    """Returns of the hidden bandit by stage, means over both goals; the most is 4 of 5 steps."""
    state, learner, _ = trained(config, probes.HiddenBandit(episode_length=5), rounds)
    env = probes.HiddenBandit(episode_length=5)
    tasks = env.sample_tasks(jax.random.key(0), 2)

    @jax.jit
    def play(state):
        return evaluate.evaluate(
            config, env, learner, state.agent, state.memory, tasks, jax.random.key(2)
        )[0]

    found = play(state)
    return [float(found[f"return_{name}"].mean()) for name in ("pre", *learner.stages)]


def test_a_hidden_bandit_is_solved_with_a_context_and_not_without():
    assert returns(tiny_config())[0] > 3.5
    assert abs(returns(tiny_config(context_size=0))[0]) < 0.5


def test_a_context_that_lasts_over_a_trial_knows_the_task_from_the_first_step_of_the_second():
    first, second = returns(tiny_config(context_span="trial"))
    assert 3.0 < first < 4.5
    assert second > 4.5
