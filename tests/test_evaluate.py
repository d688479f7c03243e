"""Evaluation on held-out tasks: who plays what, and what is reported."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.point import PointGoal
from jmql import evaluate
from jmql.learner import Adapted
from tests import tiny


@pytest.fixture(scope="module")
def state():
    return tiny.filled(tiny.build())


def test_all_stages_play_the_same_episodes(state):
    def returns(**changes):
        built = tiny.build(tiny.changed(**changes))

        @jax.jit
        def evaluated(agent, memory):
            return evaluate.evaluate(
                built.config,
                built.env,
                built.learner,
                agent,
                memory,
                built.held_out,
                jax.random.key(5),
            )[0]

        return jax.device_get(evaluated(state.agent, state.memory))

    idle = {"step1_updates": 0, "updates": 0}
    still = returns(adapt=idle)
    np.testing.assert_array_equal(still["return_pre"], still["return_step1"])
    np.testing.assert_array_equal(still["return_pre"], still["return_post"])
    # More data, other episodes and other histories are other numbers.
    much = returns(adapt=idle | {"episodes": 4})
    assert (much["beta_mean"] != still["beta_mean"]).any()
    # However much data there is, the evaluation is the same.
    np.testing.assert_allclose(much["return_pre"], still["return_pre"], rtol=1e-5)
    longer = returns(adapt=idle, evaluate={"history_length": 20})
    assert (longer["return_pre"] != still["return_pre"]).any()
    # The new data is collected with the history of training all the same.
    np.testing.assert_allclose(longer["beta_mean"], still["beta_mean"], rtol=1e-4)
    more = returns(adapt=idle, evaluate={"episodes": 3})
    assert (more["return_pre"] != still["return_pre"]).any()


def evaluated(built, **changed):
    """Returns the evaluation of an agent and a memory under a learner that is partly another."""
    learner, key = built.learner._replace(**changed), jax.random.key(5)
    return jax.jit(
        lambda agent, memory: evaluate.evaluate(
            built.config, built.env, learner, agent, memory, built.held_out, key
        )[0]
    )


def test_data_is_as_much_as_asked_for_from_starts_of_its_own(state):
    """Adaptation is replaced by a look at its data; every agent stays the meta-trained one."""

    def look(meta, agent, data, memory, key, shot):
        assert data.valid.shape == (1, 20)
        data_return = jnp.sum(data.transitions.reward * data.valid)
        return Adapted(agent, agent), {"data_return": data_return}

    def built(episodes):
        return tiny.build(tiny.changed(adapt={"episodes": 1}, evaluate={"episodes": episodes}))

    jax.eval_shape(evaluated(built(3), adapt=look), state.agent, state.memory)
    found = evaluated(built(1), adapt=look)(state.agent, state.memory)
    np.testing.assert_array_equal(found["return_pre"], found["return_step1"])
    np.testing.assert_array_equal(found["return_pre"], found["return_post"])
    assert (abs(found["data_return"] - found["return_pre"]) > 1e-3).all()


def test_a_failed_adaptation_is_the_worst_return_and_leaves_the_rest_alone(state):
    """Weights of the second step that are not finite, on the first of three tasks."""
    built = tiny.build()
    bad = built.held_out["goal"][0]

    def fail(meta, agent, data, memory, key, shot):
        # The distance of a first step tells the task.
        step = jax.tree.map(lambda x: x[0, 0], data.transitions)
        distance = -step.reward - jnp.linalg.norm(step.next_observation - bad)
        here = jnp.abs(distance) < 1e-5
        broken = jax.tree.map(lambda x: jnp.where(here, jnp.nan, x), agent.params)
        broken = agent.replace(params=broken)
        ess = jnp.where(here, jnp.nan, 1.0)
        return Adapted(agent, broken), {"ess": ess}

    found = jax.device_get(evaluated(built, adapt=fail)(state.agent, state.memory))
    np.testing.assert_array_equal(found["failed"], [True, False, False])
    assert found["return_post"][0] == built.env.worst_reward * 20
    np.testing.assert_array_equal(found["return_post"][1:], found["return_pre"][1:])
    assert np.isfinite(found["return_pre"]).all()
    assert not found["blew_up"].any()  # it is the weights that failed, not the physics
    summary = evaluate.summarize(built.learner, found)
    assert (summary["adapt/failed"], summary["adapt/ess"]) == (1, 1.0)


def test_summary_reports_means_and_the_worst_fifth():
    per_task = {
        "return_pre": jnp.arange(10.0),
        "return_step1": jnp.arange(10.0) + 1,
        "return_post": jnp.arange(10.0)[::-1] + 2,
        "ess": jnp.full(10, 0.5).at[9].set(jnp.nan),  # where adaptation failed there is none
        "blew_up": jnp.arange(10),
        "failed": jnp.arange(10) > 7,
    }
    summary = evaluate.summarize(tiny.build().learner, per_task)
    assert summary["eval/return_pre"] == 4.5
    assert summary["eval/return_post_p20"] == 2.5  # the mean of 2 and 3
    assert summary["adapt/ess"] == 0.5
    assert summary["adapt/failed"] == 2
    assert summary["eval/blew_up"] == 45  # a count, over all tasks


def test_a_shot_is_played_by_the_agent_of_the_one_before_and_its_data_stays(state):
    """Adaptation is replaced by weights that grow by one a shot, whatever the data."""
    config = tiny.changed(adapt={"shots": 3, "episodes": 2}, evaluate={"episodes": 1})
    built = tiny.build(config)

    def grown(agent, times):
        return agent.replace(params=jax.tree.map(lambda x: x * times, state.agent.params))

    def grow(meta, agent, data, memory, key, shot):
        first = jax.tree.map(lambda x: x[:, 0], data.transitions)
        shown = {"valid": data.valid.sum(-1), "shot": shot}
        shown |= {"observation": first.observation, "action": first.action}
        more = jax.tree.map(jnp.add, agent.params, state.agent.params)
        return Adapted(grown(agent, 10.0), agent.replace(params=more)), shown

    names = ("step1", "shot1", "shot2", "post")
    assert built.learner.stages == names
    play = evaluated(built, adapt=grow)
    found = jax.device_get(play(state.agent, state.memory))
    np.testing.assert_array_equal(found["valid"], 20 * np.ones((3, 6)))  # the last shot sees all
    np.testing.assert_array_equal(found["shot"], 2)
    # Each stage is what its weights earn.
    for stage, times in (("pre", 1), ("step1", 10), ("shot1", 2), ("shot2", 3), ("post", 4)):
        alone = jax.device_get(play(grown(state.agent, times), state.memory))
        np.testing.assert_allclose(alone["return_pre"], found[f"return_{stage}"], rtol=1e-5)
    # The first action of each shot's data is that of the agent before it.
    for i in range(6):
        actor = built.learner.actor(grown(state.agent, i // 2 + 1))
        policy, seen = built.learner.greedy(actor, jnp.int32(5)), found["observation"][0, i]
        action, _ = policy.act(seen, policy.start(seen), jax.random.key(0))
        np.testing.assert_allclose(found["action"][0, i], action, atol=1e-6)
    # No two episodes of data begin alike.
    assert len(np.unique(found["observation"][0], axis=0)) == 6


def test_more_shots_change_the_result_and_begin_as_one_does(state):
    def returns(shots):
        built = tiny.build(tiny.changed(adapt={"shots": shots, "learning_rate": 1e-2}))
        return jax.device_get(evaluated(built)(state.agent, state.memory))

    one, three = returns(1), returns(3)
    np.testing.assert_allclose(one["return_pre"], three["return_pre"], rtol=1e-5)
    np.testing.assert_allclose(one["return_step1"], three["return_step1"], rtol=1e-5)
    assert (abs(one["return_post"] - three["return_post"]) > 1e-4).all()


def test_new_data_may_have_noise_and_evaluations_have_none(state):
    def look(meta, agent, data, memory, key, shot):
        return Adapted(agent, agent), {"action": data.transitions.action[0]}

    def found(noise):
        built = tiny.build(tiny.changed(adapt={"exploration_noise": noise}))
        return jax.device_get(evaluated(built, adapt=look)(state.agent, state.memory))

    still, noisy = found(0.0), found(0.1)
    np.testing.assert_array_equal(still["return_pre"], noisy["return_pre"])
    np.testing.assert_array_equal(still["return_pre"], noisy["return_post"])
    first = noisy["action"][:, 0] - still["action"][:, 0]  # later ones see other places
    assert (np.abs(first) > 0).all()
    assert 0.02 < first.std() < 0.3


def test_each_shot_has_noise_of_its_own(state):
    """What an action has beside the greedy one, in the first step of every episode of data."""
    adapt = {"shots": 2, "episodes": 2, "exploration_noise": 0.01}
    built = tiny.build(tiny.changed(adapt=adapt, evaluate={"episodes": 1}))
    policy = built.learner.greedy(built.learner.actor(state.agent), jnp.int32(5))

    def look(meta, agent, data, memory, key, shot):
        first = jax.tree.map(lambda x: x[:, 0], data.transitions)
        greedy = jax.vmap(lambda x: policy.act(x, policy.start(x), key)[0])(first.observation)
        return Adapted(agent, agent), {"noise": first.action - greedy}

    found = jax.device_get(evaluated(built, adapt=look)(state.agent, state.memory))
    noise = found["noise"].reshape(-1, 2)  # of three tasks, two shots, two episodes
    assert (np.abs(noise) > 1e-6).all()
    apart = np.abs(noise[:, None] - noise[None]).max(-1)[np.triu_indices(12, 1)]
    assert apart.min() > 1e-6


def test_many_tasks_are_done_some_at_a_time(state, monkeypatch):
    """The same numbers, with less side by side; seven tasks do not divide."""
    built = tiny.build(tiny.changed(tasks={"held_out": 7}))
    whole = jax.device_get(evaluated(built)(state.agent, state.memory))
    monkeypatch.setattr(evaluate, "AT_ONCE", 3)
    parts = jax.device_get(evaluated(built)(state.agent, state.memory))
    for name, values in whole.items():
        np.testing.assert_allclose(values, parts[name], rtol=1e-4, atol=1e-5)


def test_an_algorithm_that_does_not_adapt_is_evaluated_all_the_same(state):
    built = tiny.build()
    found = evaluated(built, adapt=None, stages=())(state.agent, state.memory)
    assert found.keys() == {"return_pre", "failed", "blew_up"}
    assert (
        evaluate.summarize(built.learner._replace(stages=()), found)["eval/return_pre_p20"]
        == found["return_pre"].min()
    )


class Reporting(PointGoal):
    """Reports how far it has come, and whether that is beyond the half."""

    def extras(self, physics, task):
        distance = jnp.linalg.norm(physics)
        return {"distance": distance, "success": (distance > 0.5).astype(jnp.float32)}


def test_what_an_environment_reports_becomes_metrics(state):
    """Of the last state of each episode, whose place is known from the observations."""
    built = dataclasses.replace(tiny.build(), env=Reporting(episode_length=20))
    begin = built.init(built.keys)
    done, metrics, per_task = jax.jit(built.cycle)(
        begin, jnp.int32(2), jnp.array(True), jnp.array(True)
    )
    data = done.memory.data
    last = np.asarray(data.next_observation)[np.asarray(data.truncated)]
    far = np.linalg.norm(last, axis=-1)
    np.testing.assert_allclose(metrics["collect/distance"][0], far.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["collect/success"][0], (far > 0.5).mean(), rtol=1e-5)
    for stage in ("pre", "step1", "post"):
        assert metrics[f"eval/distance_{stage}"][0] > 0
        np.testing.assert_allclose(
            metrics[f"eval/success_{stage}"][0], per_task[f"success_{stage}"].mean(), rtol=1e-6
        )
