"""The learner: against the authors' numbers, against NumPy, and rule by rule."""

import ast
import dataclasses
import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from jmql import mql, networks, propensity, td3, train
from jmql.config import (
    CollectConfig,
    Config,
    NetworkConfig,
    PropensityConfig,
    TaskConfig,
    TD3Config,
    TrainConfig,
)
from jmql.types import Batch, History, Transition
from tests import numpy_mql

O, A, H, Z, B = 3, 2, 3, 2, 6
NETWORKS = networks.make(NetworkConfig(hidden_sizes=(5,), context_size=Z, history_length=H), A)
GOLDEN = pathlib.Path(__file__).parent / "golden" / "reference_update.npz"


@functools.partial(jax.jit, static_argnums=(0, 1))
def update(config, modules, agent, batches, noise, anchor=None, coefs=None):
    """Takes a block: an update for each batch [D, B], the delayed steps with the first of them.

    Returns the learner after and the means of its metrics.
    """

    def step(agent, inputs):
        first, batch, noise, coef = inputs
        return td3.update(config, modules, agent, batch, noise, first, anchor, coef)

    coefs = np.zeros(len(noise), np.float32) if coefs is None else coefs
    inputs = (np.arange(len(noise)) == 0, batches, noise, coefs)
    agent, metrics = jax.lax.scan(step, agent, inputs)
    actor_loss = metrics.pop("actor_loss")
    return agent, jax.tree.map(jnp.mean, metrics) | {"actor_loss": actor_loss.sum()}


@jax.jit
def make_agent(seed):
    """Returns a learner whose targets differ from its weights, as in the midst of training."""
    keys = jax.random.split(jax.random.key(seed), 3)
    agent, other = (
        td3.init(NETWORKS, key, jnp.zeros(O), jnp.zeros(A)) for key in (keys[0], keys[1])
    )
    return agent.replace(target_params=other.params)


def make_batches(seed, *leading):
    """Random batches [*leading, B] of every kind of sample: padded, terminated, truncated."""
    rng = np.random.default_rng(seed)
    shape = (*leading, B)
    step = rng.integers(0, H + 2, shape)
    end = rng.integers(0, 3, shape)

    def normal(*rest):
        return rng.normal(size=(*shape, *rest)).astype(np.float32)

    def uniform(*rest):
        return rng.uniform(-1, 1, size=(*shape, *rest)).astype(np.float32)

    def window(newest):
        mask = np.arange(H) >= H - newest[..., None]
        return History(normal(H, O), uniform(H, A), normal(H), mask)

    transition = Transition(
        normal(O), uniform(A), normal(), end == 1, end == 2, normal(O), step.astype(np.int32)
    )
    weight = rng.uniform(0, 2, size=shape).astype(np.float32)
    return Batch(transition, window(step), window(step + 1), weight)


def take(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    """Every number within rtol of the expected one, or within atol."""

    def check(actual, expected):
        error = np.abs(np.asarray(actual) - expected)
        assert np.all((error <= atol) | (error <= rtol * np.abs(expected))), error.max()

    jax.tree.map(check, actual, expected)


# --- the authors' numbers ---


def golden_weights(golden, stage):
    """Returns the four networks of a stage in the shape that `jmql` has them in."""

    def linear(name):
        return {"kernel": golden[f"{name}.weight"].T, "bias": golden[f"{name}.bias"]}

    def network(name, **layers):
        gru = f"{stage}/{name}/context.recurrent"
        encoder = {
            "input_kernel": golden[f"{gru}.weight_ih_l0"].T,
            "hidden_kernel": golden[f"{gru}.weight_hh_l0"].T,
            "input_bias": golden[f"{gru}.bias_ih_l0"],
            "hidden_bias": golden[f"{gru}.bias_hh_l0"],
        }
        parts = {
            part: {f"Dense_{i}": linear(f"{stage}/{name}/{x}") for i, x in enumerate(names)}
            for part, names in layers.items()
        }
        return {"params": {"encoder": encoder} | parts}

    heads = {head: [f"{head}.{i}" for i in (0, 2, 4)] for head in ("q1", "q2")}
    return tuple(
        {
            "actor": network(f"{prefix}actor", policy=["actor.0", "actor.2", "out"]),
            "critic": network(f"{prefix}critic", **heads),
        }
        for prefix in ("", "target_")
    )


def golden_batches(golden, indices):
    """Returns batches [D, B] and their noise [D, B, A]."""

    def read(index):
        part = {
            key.split("/")[1]: golden[key]
            for key in golden.files
            if key.startswith(f"batch{index}/")
        }
        reward = part["reward"][:, 0]
        terminated = part["terminated"][:, 0] > 0

        def window(prefix):
            observation, action, reward = (
                part[f"{prefix}hist_{x}"] for x in ("obs", "action", "reward")
            )
            return History(observation, action, reward, np.ones(reward.shape, bool))

        transition = Transition(
            part["obs"],
            part["action"],
            reward,
            terminated,
            np.zeros_like(terminated),
            part["next_obs"],
            np.full(len(reward), 4, np.int32),
        )
        weight = np.ones_like(reward)
        return Batch(transition, window(""), window("next_"), weight), part["noise"]

    return jax.tree.map(lambda *x: np.stack(x), *(read(index) for index in indices))


@functools.cache
def golden_setting():
    """Returns the file, modules, a learner with the file's first weights, and its config."""
    golden = np.load(GOLDEN)
    sizes = ast.literal_eval(str(golden["meta"].item()))
    modules = networks.make(
        NetworkConfig((sizes["HID"], sizes["HID"]), sizes["C"], sizes["H"]), sizes["A"]
    )
    config = TD3Config(
        learning_rate=sizes["lr_train"],
        discount=sizes["discount"],
        tau=sizes["tau"],
        policy_delay=sizes["policy_delay"],
        target_noise=sizes["noise_std"],
        target_noise_clip=sizes["noise_clip"],
    )
    agent = td3.AgentState(*golden_weights(golden, "init"), {}, jnp.int32(0))
    return golden, sizes, modules, config, td3.fresh_optimizer(agent)


def assert_golden(agent, golden, stage):
    params, targets = golden_weights(golden, stage)
    assert_close(agent.params, params)
    assert_close(agent.target_params, targets)


def test_training_is_the_authors():
    golden, _, modules, config, agent = golden_setting()
    for block in ((0, 1), (2, 3)):
        batches, noise = golden_batches(golden, block)
        agent, _ = update(config, modules, agent, batches, noise)
    assert_golden(agent, golden, "train4")


def test_adaptation_is_the_authors():
    golden, sizes, modules, config, agent = golden_setting()
    params, targets = golden_weights(golden, "train4")
    agent = td3.fresh_optimizer(agent.replace(params=params, target_params=targets))
    config = dataclasses.replace(config, learning_rate=sizes["lr_adapt"])
    coefs = np.full(2, sizes["prox"], np.float32)
    for block in ((4, 5), (6, 7)):
        batches, noise = golden_batches(golden, block)
        weight = np.stack([golden[f"adapt/beta{i - 4}"][:, 0] for i in block])
        batches = batches.replace(weight=weight)
        agent, _ = update(config, modules, agent, batches, noise, params, coefs)
    assert_golden(agent, golden, "adapt4")


def test_importance_weights_are_the_authors():
    """The context is that of the actor of the moment, so the weights are followed along."""
    golden, sizes, modules, config, agent = golden_setting()
    params, targets = golden_weights(golden, "train4")
    agent = td3.fresh_optimizer(agent.replace(params=params, target_params=targets))
    config = dataclasses.replace(config, learning_rate=sizes["lr_adapt"])
    size = sizes["C"]
    classifier = propensity.Classifier(
        golden["cs/coef"][0].astype(np.float32),
        golden["cs/intercept"][0].astype(np.float32),
        np.zeros(size, np.float32),
        np.ones(size, np.float32),
    )
    weighting = PropensityConfig(log_odds_clip=1.5, zero_below=0.1)
    expected = [golden[f"adapt/beta{i}"][:, 0] for i in range(4)]

    def beta(agent, history):
        apply = functools.partial(modules.actor.apply, method="context")
        context = jax.jit(apply)(agent.params["actor"], history)
        return propensity.importance_weights(weighting, propensity.log_odds(classifier, context))

    coefs = np.full(2, sizes["prox"], np.float32)
    for index in (0, 2):
        batches, noise = golden_batches(golden, (4 + index, 5 + index))
        weight = [beta(agent, take(batches.history, 0))]
        # The actor moves after the first batch of a block.
        batches = batches.replace(weight=np.stack(expected[index : index + 2]))
        agent, _ = update(config, modules, agent, batches, noise, params, coefs)
        weight.append(beta(agent, take(batches.history, 1)))
        for i in range(2):
            assert_close(weight[i], expected[index + i])
            ess = propensity.effective_sample_size(weight[i])
            assert_close(ess, golden["ess/normalised"][index + i])


# --- NumPy ---


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_blocks_are_the_numpy_blocks(delay):
    """Two blocks, so that the moments of Adam show the size of every gradient."""
    rate, blocks = 3e-3, 2
    config = TD3Config(rate, discount=0.9, tau=0.1, policy_delay=delay, target_noise=0.4)
    agent, anchor = make_agent(delay), make_agent(10 + delay).params
    batches = make_batches(delay, blocks, delay)
    rng = np.random.default_rng(20 + delay)
    noise = rng.normal(size=(blocks, delay, B, A)).astype(np.float32)
    coefs = rng.uniform(0, 0.2, size=(blocks, delay)).astype(np.float32)
    # Actions that reach the bound, so that the clip of the smoothed action matters.
    shifted = agent.target_params["actor"]["params"]["policy"]["Dense_1"]
    shifted["bias"] = shifted["bias"] + np.float32([1.5, -1.5])

    params, targets, centre = jax.tree.map(
        lambda x: np.asarray(x, np.float64), (agent.params, agent.target_params, anchor)
    )
    state = numpy_mql.learner(params, targets)
    for i in range(blocks):
        agent, metrics = update(
            config, NETWORKS, agent, take(batches, i), noise[i], anchor, coefs[i]
        )
        several = [take(batches, (i, d)) for d in range(delay)]
        expected = numpy_mql.block(config, state, several, noise[i], rate, centre, coefs[i])
        assert_close(metrics, expected | {"task_loss": 0.0})
    assert_close(agent.params, {name: state[name] for name in ("actor", "critic")})
    assert_close(agent.target_params, state["target"])
    assert agent.updates == blocks * delay


# --- rules ---

# Without a context and small: quick to compile where the networks do not matter.
PLAIN = networks.make(NetworkConfig(hidden_sizes=(4,), context_size=0, history_length=H), A)
CONFIG = TD3Config(learning_rate=3e-3)


@functools.cache
def plain_agent(seed=0):
    init = jax.jit(functools.partial(td3.init, PLAIN))
    return init(jax.random.key(seed), jnp.zeros(O), jnp.zeros(A))


@functools.partial(jax.jit, static_argnums=(0, 3))
def learn(config, agent, key, num, batch, anchor, active, earlier=0):
    """Trains on one batch whose rewards and lambda depend on the key of the draw."""

    def draw(key):
        transition = batch.transition
        reward = transition.reward + jax.random.normal(key, transition.reward.shape)
        drawn = batch.replace(transition=transition.replace(reward=reward))
        return drawn, jax.random.uniform(key)

    return td3.train(config, PLAIN, agent, key, num, draw, anchor, active, earlier)


def test_termination_stops_the_bootstrap_and_a_limit_does_not():
    agent, batch = plain_agent(), make_batches(0)
    yes, no = np.ones(B, bool), np.zeros(B, bool)

    def target(terminated, truncated):
        transition = batch.transition.replace(terminated=terminated, truncated=truncated)
        changed = batch.replace(transition=transition)
        return td3.td_target(
            CONFIG, PLAIN, agent.target_params, changed, np.zeros((B, A), np.float32)
        )

    reward = batch.transition.reward
    np.testing.assert_array_equal(target(yes, no), reward)
    assert np.all(target(no, no) != reward)
    np.testing.assert_array_equal(target(no, yes), target(no, no))


def test_weight_zero_removes_a_sample():
    batches = make_batches(1, 2)
    batches.weight[:, 0] = 0
    other = jax.tree.map(np.copy, make_batches(2, 2).replace(weight=batches.weight))
    changed = jax.tree.map(np.copy, batches)
    for old, new in zip(jax.tree.leaves(changed), jax.tree.leaves(other), strict=True):
        old[:, 0] = new[:, 0]
    noise = np.zeros((2, B, A), np.float32)
    learned = [update(CONFIG, PLAIN, plain_agent(), x, noise)[0] for x in (batches, changed)]
    assert not np.array_equal(batches.transition.reward, changed.transition.reward)
    assert_close(learned[1], learned[0])

    changed.weight[:, 0] = 1
    counted, _ = update(CONFIG, PLAIN, plain_agent(), changed, noise)
    with pytest.raises(AssertionError):
        assert_close(counted, learned[0])


def test_contexts_learn_the_tasks_that_a_batch_says():
    """Each head its own, within some hundred steps, and nothing else moves it."""
    modules = networks.make(NetworkConfig((5,), Z, H, task_head=True), A, task_size=2)
    batch = take(make_batches(4, 1), 0)
    told = batch.replace(task=0.1 * batch.history.observation[:, -1, :2])
    fresh = td3.init(modules, jax.random.key(0), jnp.zeros(O), jnp.zeros(A))
    config = TD3Config(learning_rate=1e-2)

    @jax.jit
    def learned(batch):
        none = jnp.zeros(())
        return td3.train(config, modules, fresh, jax.random.key(1), 600, lambda _: (batch, none))

    agent, sums = learned(told)
    assert sums.task_loss > 0
    for name, module in modules._asdict().items():
        before, after = (td3.task_loss(module, x.params[name], told) for x in (fresh, agent))
        assert after < 0.2 * before, name
    agent, sums = learned(batch)
    assert sums.task_loss == 0
    for name in ("actor", "critic"):
        heads = [x.params[name]["params"]["head"] for x in (fresh, agent)]
        chex.assert_trees_all_equal(*heads)


def test_the_critic_does_not_learn_from_the_policy_gradient():
    batches = make_batches(3, 1)
    noise = np.zeros((1, B, A), np.float32)
    agent, other = plain_agent(), plain_agent(1)
    stranger = agent.replace(params=agent.params | {"actor": other.params["actor"]})
    one, two = (update(CONFIG, PLAIN, x, batches, noise)[0] for x in (agent, stranger))
    chex.assert_trees_all_equal(one.params["critic"], two.params["critic"])


@jax.jit
def one_update(agent, batch, noise, move_actor, anchor, coef):
    return td3.update(CONFIG, PLAIN, agent, batch, noise, move_actor, anchor, coef)


@pytest.mark.parametrize(("num", "delay", "earlier"), [(5, 2, 0), (2, 3, 0), (0, 2, 0), (4, 3, 7)])
def test_train_is_update_by_hand(num, delay, earlier):
    """The same keys give the same steps, also where the last block is shorter."""
    config = dataclasses.replace(CONFIG, policy_delay=delay)
    batch, key = make_batches(4), jax.random.key(5)
    anchor = plain_agent(1).params
    trained, sums = learn(config, plain_agent(), key, num, batch, anchor, True, earlier)
    means = td3.means(sums)
    metrics = {
        name: getattr(means, name)
        for name in ("critic_loss", "actor_loss", "q", "prox_coef", "task_loss")
    }

    agent, several = plain_agent(), {name: [] for name in metrics}
    for index in range(num):
        draw_key, noise_key = jax.random.split(jax.random.fold_in(key, index))
        reward = batch.transition.reward + jax.random.normal(draw_key, (B,))
        drawn = batch.replace(transition=batch.transition.replace(reward=reward))
        coef = jax.random.uniform(draw_key)
        noise = jax.random.normal(noise_key, (B, A))
        move_actor = (earlier + index) % delay == 0
        agent, new = one_update(agent, drawn, noise, move_actor, anchor, coef)
        for name, value in (new | {"prox_coef": coef}).items():
            if move_actor or name != "actor_loss":
                several[name].append(value)

    assert_close(trained, agent)
    assert_close(metrics, {name: np.mean(x) if x else 0.0 for name, x in several.items()})
    assert trained.updates == num
    steps = {name: state[0].count for name, state in trained.opt_state.items()}
    turns = [index for index in range(earlier, earlier + num) if index % delay == 0]
    assert steps == {"critic": num, "actor": len(turns)}
    assert (sums.critic_steps, sums.actor_steps) == (num, len(turns))


def test_inactive_training_takes_no_step():
    config, batch, key = TD3Config(policy_delay=2), make_batches(4), jax.random.key(5)
    agent, anchor = plain_agent(), plain_agent(1).params
    trained, metrics = learn(config, agent, key, 5, batch, anchor, False)
    chex.assert_trees_all_equal(trained, agent)
    assert not any(jax.tree.leaves(metrics))


def test_updates_are_deterministic():
    batches = make_batches(6, 2)
    noise = np.ones((2, B, A), np.float32)
    runs = [update(CONFIG, PLAIN, plain_agent(), batches, noise) for _ in range(2)]
    chex.assert_trees_all_equal(*runs)


def test_every_sample_has_its_own_noise():
    """Equal samples, of which only one counts: which one it is must matter."""
    config = dataclasses.replace(CONFIG, policy_delay=1, target_noise=1.0)
    batch = jax.tree.map(lambda x: np.stack([x[0]] * B), make_batches(7))
    batch.transition.terminated[:] = False

    @jax.jit
    def loss(weight):
        def draw(key):
            return batch.replace(weight=weight), jnp.zeros(())

        return td3.train(config, PLAIN, plain_agent(), jax.random.key(0), 1, draw)[1]

    losses = {float(loss(weight).critic_loss) for weight in np.eye(B, dtype=np.float32)}
    assert len(losses) == B


def test_a_fresh_optimizer_keeps_the_weights():
    batches = make_batches(8, 1)
    agent, _ = update(CONFIG, PLAIN, plain_agent(), batches, np.zeros((1, B, A), np.float32))
    fresh = td3.fresh_optimizer(agent)
    chex.assert_trees_all_equal(fresh.replace(opt_state=agent.opt_state), agent)
    for state in jax.tree.leaves(fresh.opt_state):
        assert not np.any(state)


@pytest.mark.parametrize("name", ["weight", "reward", "terminated"])
def test_a_column_is_refused_where_a_vector_belongs(name):
    batches = make_batches(9, 1)
    if name == "weight":
        batches = batches.replace(weight=batches.weight[..., None])
    else:
        column = getattr(batches.transition, name)[..., None]
        batches = batches.replace(transition=batches.transition.replace(**{name: column}))
    with pytest.raises(AssertionError):
        update(CONFIG, PLAIN, plain_agent(), batches, np.zeros((1, B, A), np.float32))


def test_noise_must_be_drawn_for_every_action():
    batches = make_batches(9, 1)
    for noise in (np.zeros((1, B), np.float32), np.zeros((1, B, 1), np.float32)):
        with pytest.raises(AssertionError, match="shape"):
            update(CONFIG, PLAIN, plain_agent(), batches, noise)


CHANGED = {
    "learning_rate": 1e-2,
    "discount": 0.5,
    "tau": 0.5,
    "policy_delay": 1,
    "target_noise": 0.1,
    "target_noise_clip": 0.05,
    "batch_size": 7,
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def learned(policy_delay, batch_size, numbers):
    """Returns all weights after one round of training. Numbers are traced, to compile once."""
    config = Config(
        network=NetworkConfig(hidden_sizes=(4,), context_size=0, history_length=2),
        td3=TD3Config(policy_delay=policy_delay, batch_size=batch_size, **numbers),
        collect=CollectConfig(rows=2, unroll=4, replay_capacity=16),
        train=TrainConfig(updates_per_round=4),
        tasks=TaskConfig(train=2),
    )
    env = envs.make("point_goal")
    learner = mql.learner(config, env.action_size)
    key = jax.random.key(0)
    state = train.init(config, env, learner, env.sample_tasks(key, 2), key)
    agent = train.round(config, env, learner, state, jnp.zeros((), bool), jnp.int32(0))[0].agent
    return agent.params, agent.target_params


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TD3Config)])
def test_every_knob_changes_what_is_learned(name):
    config = dataclasses.asdict(TD3Config(batch_size=6))
    one, two = (
        numpy_mql.flatten(learned(x.pop("policy_delay"), x.pop("batch_size"), x))[0]
        for x in (dict(config), config | {name: CHANGED[name]})
    )
    assert np.max(np.abs(one - two)) > 1e-6
