"""The context encoder against its recurrence, and what actor and critic share and do not."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jmql import gru, networks, td3
from jmql.config import NetworkConfig
from jmql.types import History
from tests import numpy_mql

O, A, H, Z = 3, 2, 5, 4
CONFIG = NetworkConfig(hidden_sizes=(8, 6), context_size=Z, history_length=H)


def make_history(seed, *batch, length=H):
    """Random windows [*batch, length] with 0 to `length` steps of padding at the front."""
    rng = np.random.default_rng(seed)
    padding = rng.integers(0, length + 1, batch)
    return History(
        observation=rng.normal(size=(*batch, length, O)).astype(np.float32),
        action=rng.uniform(-1, 1, size=(*batch, length, A)).astype(np.float32),
        reward=rng.normal(size=(*batch, length)).astype(np.float32),
        mask=np.arange(length) >= padding[..., None],
    )


def make_gru(history):
    """Returns the encoder as a compiled function of (weights, history), and weights for it."""
    module = networks.ContextGRU(Z)
    return jax.jit(module.apply), module.init(jax.random.key(0), history)


@functools.cache
def make_agent(config=CONFIG):
    """Returns compiled functions of (weights, ...) for actor and critic, and fresh weights."""
    modules = networks.make(config, A)
    init = jax.jit(functools.partial(td3.init, modules))
    params = init(jax.random.key(0), jnp.zeros(O), jnp.zeros(A)).params
    return jax.jit(modules.actor.apply), jax.jit(modules.critic.apply), params


def in_double(weights):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), weights)["params"]


def test_gru_is_its_recurrence():
    history = make_history(1, 64)
    apply, weights = make_gru(history)
    expected = numpy_mql.gru(in_double(weights), history)
    np.testing.assert_allclose(apply(weights, history), expected, rtol=1e-5, atol=1e-6)
    empty, full = ~history.mask.any(axis=1), history.mask.all(axis=1)
    assert empty.any()
    assert full.any()
    assert not expected[empty].any()


def test_padding_is_not_read():
    history = make_history(2, 16)
    apply, weights = make_gru(history)
    hole = ~history.mask

    def loss(weights, history):
        return jnp.sum(apply(weights, history) ** 2)

    def fill(value):
        return history.replace(
            observation=np.where(hole[..., None], value, history.observation),
            action=np.where(hole[..., None], value, history.action),
            reward=np.where(hole, value, history.reward),
        )

    small, huge = fill(np.float32(0)), fill(np.float32(1e30))
    np.testing.assert_array_equal(apply(weights, small), apply(weights, huge))
    gradients = [jax.jit(jax.grad(loss))(weights, history) for history in (small, huge)]
    jax.tree.map(np.testing.assert_array_equal, *gradients)


def test_long_window_equals_a_carried_gru():
    length = 7
    episode = make_history(3, length=length).replace(mask=np.ones(length, bool))
    apply, weights = make_gru(episode)
    inputs = np.concatenate([episode.action, episode.reward[:, None], episode.observation], axis=1)
    hidden = np.zeros((1, Z))
    for time in range(length):
        # The history at `time` in a window of the episode's length: `time` steps, at its end.
        window = jax.tree.map(lambda x, shift=time: np.roll(x, -shift, axis=0), episode)
        window = window.replace(mask=np.arange(length) >= length - time)
        np.testing.assert_allclose(apply(weights, window), hidden[0], rtol=1e-5, atol=1e-6)
        hidden = numpy_mql.gru_step(in_double(weights), hidden, inputs[time : time + 1])


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_the_slopes_of_the_gru_are_those_of_finite_differences(batch):
    random, inputs = np.random.default_rng(8), O + A + 1
    shapes = (inputs, 3 * Z), (Z, 3 * Z), (3 * Z,), (3 * Z,)
    with jax.enable_x64(True):
        weights = gru.Weights(*(random.normal(size=shape) for shape in shapes))
        windows, begin = random.normal(size=(H, inputs, *batch)), random.normal(size=(Z, *batch))
        mask = jnp.asarray(random.random((H, *batch)) < 0.7).at[2].set(False)

        def last(weights, windows, begin):
            return gru.last(weights, windows, mask, begin)

        check_grads(last, (weights, windows, begin), order=1, modes=["rev"], rtol=1e-6, atol=1e-8)


def test_every_part_of_the_history_counts():
    history = make_history(4, 1).replace(mask=np.ones((1, H), bool))
    apply, weights = make_gru(history)
    slopes = jax.grad(lambda history: apply(weights, history).sum(), allow_int=True)(history)
    for name in ("observation", "action", "reward"):
        assert np.all(np.asarray(getattr(slopes, name)) != 0), name


def test_actor_and_critic_are_their_formulas():
    actor, critic, params = make_agent()
    history = make_history(5, 32)
    rng = np.random.default_rng(6)
    observation, action = rng.normal(size=(32, O)), rng.uniform(-1, 1, size=(32, A))
    double = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    np.testing.assert_allclose(
        actor(params["actor"], observation, history),
        numpy_mql.actor(double["actor"], observation, history),
        rtol=1e-5,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        critic(params["critic"], observation, history, action),
        numpy_mql.critic(double["critic"], observation, history, action),
        rtol=1e-5,
        atol=1e-6,
    )


def test_actor_and_critic_own_their_encoders_and_the_heads_share_one():
    _, _, params = make_agent()
    actor, critic = params["actor"]["params"], params["critic"]["params"]
    assert set(actor) == {"encoder", "policy"}
    assert set(critic) == {"encoder", "q1", "q2"}
    hidden = [part["encoder"]["hidden_kernel"] for part in (actor, critic)]
    assert not np.any(np.isclose(*hidden))
    heads = [critic[head]["Dense_0"]["kernel"] for head in ("q1", "q2")]
    assert not np.any(np.isclose(*heads))


def test_heads_tell_tasks_from_contexts_alone():
    config = NetworkConfig(hidden_sizes=(8,), context_size=Z, task_head=True)
    modules = networks.make(config, A, task_size=3)
    params = td3.init(modules, jax.random.key(0), jnp.zeros(O), jnp.zeros(A)).params
    history = make_history(9, 6)
    for name, module in modules._asdict().items():
        weights = params[name]["params"]
        context = modules.context({"params": {"encoder": weights["encoder"]}}, history)
        (head,) = weights["head"].values()
        told = np.asarray(context) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
        found = module.apply(params[name], history, method="tell")
        np.testing.assert_allclose(found, told, rtol=1e-5, atol=1e-6)
        assert found.shape == (6, 3)


def test_without_a_context_history_is_ignored():
    config = NetworkConfig(hidden_sizes=(8,), context_size=0)
    actor, critic, params = make_agent(config)
    observation, action = jnp.ones((6, O)), jnp.ones((6, A))
    one, other = make_history(7, 6), make_history(8, 6)
    context = networks.make(config, A).actor.apply(params["actor"], one, method="context")
    assert context.shape == (6, 0)
    np.testing.assert_array_equal(
        actor(params["actor"], observation, one), actor(params["actor"], observation, other)
    )
    np.testing.assert_array_equal(
        critic(params["critic"], observation, one, action),
        critic(params["critic"], observation, other, action),
    )


def test_with_a_context_history_matters():
    actor, critic, params = make_agent()
    observation, action = jnp.ones((6, O)), jnp.ones((6, A))
    one, other = make_history(7, 6), make_history(8, 6)
    for module, name, rest in ((actor, "actor", ()), (critic, "critic", (action,))):
        values = [module(params[name], observation, h, *rest) for h in (one, other)]
        assert not np.allclose(*values)


def test_actions_are_within_bounds():
    actor, _, params = make_agent()
    observation = 1e4 * np.random.default_rng(9).normal(size=(64, O)).astype(np.float32)
    action = actor(params["actor"], observation, make_history(9, 64))
    assert -1 <= action.min() < -0.99
    assert 0.99 < action.max() <= 1


@pytest.mark.parametrize("batch", [(), (6,), (2, 3), (2, 1, 3)])
def test_leading_axes_are_a_batch(batch):
    actor, critic, params = make_agent()
    rng = np.random.default_rng(10)
    history = make_history(10, *batch)
    observation = rng.normal(size=(*batch, O)).astype(np.float32)
    action = rng.uniform(-1, 1, size=(*batch, A)).astype(np.float32)

    def both(observation, history, action):
        return (
            actor(params["actor"], observation, history),
            critic(params["critic"], observation, history, action),
        )

    one_by_one = both
    for _ in batch:
        one_by_one = jax.vmap(one_by_one)
    chosen, values = both(observation, history, action)
    assert chosen.shape == (*batch, A)
    assert values[0].shape == values[1].shape == batch
    expected = one_by_one(observation, history, action)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        (chosen, values),
        expected,
    )


@pytest.mark.parametrize(("hidden_sizes", "size"), [((8, 6), 3), ((7,), 5)])
def test_sizes_are_the_configured_ones(hidden_sizes, size):
    config = NetworkConfig(hidden_sizes=hidden_sizes, context_size=size)
    modules = networks.make(config, A)
    history = make_history(0)
    observation, action = jnp.zeros(O), jnp.zeros(A)
    key = jax.random.key(0)
    actor = jax.eval_shape(modules.actor.init, key, observation, history)["params"]
    critic = jax.eval_shape(modules.critic.init, key, observation, history, action)["params"]

    def kernels(weights):
        return [weights[f"Dense_{i}"]["kernel"].shape for i in range(len(weights))]

    def expected(inputs, outputs):
        sizes = (inputs, *hidden_sizes, outputs)
        return list(itertools.pairwise(sizes))

    for weights in (actor, critic):
        assert weights["encoder"]["hidden_kernel"].shape == (size, 3 * size)
    assert kernels(actor["policy"]) == expected(O + size, A)
    for head in ("q1", "q2"):
        assert kernels(critic[head]) == expected(O + A + size, 1)


def test_fresh_weights_are_small_as_in_pytorch():
    _, _, params = make_agent()
    actor, critic = params["actor"]["params"], params["critic"]["params"]
    for layers in (actor["policy"], critic["q1"], critic["q2"]):
        for layer in layers.values():
            bound = layer["kernel"].shape[0] ** -0.5
            assert 0.5 * bound < np.abs(layer["kernel"]).max() <= bound
    for encoder in (actor["encoder"], critic["encoder"]):
        for weights in encoder.values():
            assert 0.5 * Z**-0.5 < np.abs(weights).max() <= Z**-0.5
