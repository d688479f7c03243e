"""Runs of P3O: many seeds, several devices, restored, and as a user meets them."""

import dataclasses
import functools
import html
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import checkpoint, population
from experiments.config import RunConfig
from jmql import settings
from jmql.config import Config, NetworkConfig, P3OConfig, TrainConfig
from jmql.settings import ConfigError, replaced
from tests import tiny
from tests.test_cli import command

# Off-policy steps begin within the run.
RUN = dataclasses.replace(
    tiny.CONFIG,
    algorithm="p3o",
    context_span="trial",
    network=NetworkConfig((16,), 4, normalize=True),
    p3o=P3OConfig(minibatch=8, off_policy_after=100, learning_rate=1e-2),
    task="point_goal",
    devices=1,
    train=TrainConfig(env_steps=240, rounds_per_cycle=2),
    **{name: getattr(Config(), name) for name in ("td3", "adapt", "propensity")},
)


# Each number that it reads has another value.
OTHER = replaced(
    RUN,
    {
        "p3o.learning_rate": 3e-3,
        "p3o.discount": 0.9,
        "p3o.gae_lambda": 0.8,
        "p3o.off_policy_steps": 3.0,
        "p3o.value_coef": 1.0,
        "p3o.entropy_coef": 0.1,
        "p3o.max_grad_norm": 0.2,
        "seed": 7,
    },
)


@functools.cache
def trained(*runs: RunConfig) -> tuple:
    """The program, its compiled cycle, the states after one cycle and two, the metrics of these."""
    built = tiny.build(runs[0]) if len(runs) == 1 else population.build(runs)
    made = dataclasses.replace(built, env=tiny.build(RUN).env)
    cycle = made.compile()
    true, false = jnp.array(True), jnp.array(False)
    state, *_ = cycle(made.init(made.keys), jnp.int32(2), true, false, made.numbers)
    state, *_ = cycle(state, jnp.int32(1), false, false, made.numbers)
    middle = jax.tree.map(jnp.copy, state)
    state, *results = cycle(state, jnp.int32(2), false, true, made.numbers)
    return made, cycle, middle, state, jax.device_get(results)


def refuse_other(here: tuple, there: tuple, index: int) -> None:
    """Refuses another state, metrics or returns of tasks of one seed than those of a run alone."""
    *_, one, (metrics, per_task) = here
    *_, many, (other_metrics, other_per_task) = there
    for mine, other in zip(*(host(x) for x in (one, many)), strict=True):
        np.testing.assert_allclose(mine[0], other[index], rtol=1e-3, atol=1e-4)
    for name, value in (metrics | per_task).items():
        other = (other_metrics | other_per_task)[name]
        np.testing.assert_allclose(value[0], other[index], rtol=1e-3, atol=1e-3, err_msg=name)


def test_seeds_and_devices_change_nothing():
    """Rows, fragments, statistics, gradients and effective sample sizes are of all devices."""
    one, many = trained(RUN), trained(dataclasses.replace(RUN, devices=4, seeds=2))
    assert many[0].mesh.size == 4
    refuse_other(one, many, 0)
    metrics, per_task = one[-1]
    assert metrics["train/off_policy_steps"][0] > 0
    assert 0 < metrics["train/ess"][0] <= 1
    names = {"return_pre", "return_episode2", "return_post"}
    assert names == {name for name in per_task if name.startswith("return")}
    assert not np.allclose(*many[-1][0]["eval/return_post"])


def test_every_number_of_a_member_is_that_of_a_run_alone():
    ours, theirs = settings.numbers(RUN), settings.numbers(OTHER)
    assert not [x for x in ours if x.startswith("p3o.") and ours[x] == theirs[x]]
    both = trained(RUN, OTHER)
    for i, config in enumerate((RUN, OTHER)):
        refuse_other(trained(config), both, i)


def host(state):
    return jax.device_get(jax.tree.leaves(checkpoint._plain(state)))


def test_a_restored_run_goes_on_bit_for_bit(tmp_path):
    """Its running statistics, too."""
    made, cycle, middle, straight, results = trained(RUN)
    assert middle.agent.returns.count[0] == 3 * made.config.steps_per_round
    with checkpoint.Checkpoints(tmp_path, {}) as files:
        files.save(1, middle)
        files.wait()
        restored = files.restore(made.shapes).state
    flags = jnp.array(False), jnp.array(True)
    state, *again = cycle(restored, jnp.int32(2), *flags, made.numbers)
    chex.assert_trees_all_equal(host(straight), host(state))
    chex.assert_trees_all_equal(results, jax.device_get(again))


def test_a_word_and_a_number_do_not_share_a_program():
    """A number is a value of what is compiled, the word is not."""
    number = replaced(RUN, {"p3o.clip": 0.5, "run_id": "a"})
    word = replaced(RUN, {"run_id": "b"})
    for runs in ([number, word], [word, number]):
        with pytest.raises(ConfigError, match=r"p3o\.clip differs between runs of one process"):
            population.build(runs)


WORDS = (
    "--network.hidden-sizes 16 --network.context-size 4 --collect.rows 4 --collect.unroll 10"
    " --collect.replay-capacity 400 --train.env-steps 240 --train.rounds-per-cycle 2"
    " --p3o.minibatch 8 --p3o.off-policy-after 0 --tasks.train 4 --tasks.held-out 3"
    " --tracking.wandb disabled"
).split()


def test_the_command_line_trains_evaluates_and_reports(tmp_path):
    done = command(
        *("train", "--task", "point_goal", "--algorithm", "p3o", "--context-span", "trial"),
        *(*WORDS, "--run-id", "a"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for name in ("untrained", "episode 1", "episode 2", "episode 3"):
        assert name in done.stdout
    folder = tmp_path / "runs/point_goal/a"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["updates"] > 5
    assert rows[-1].keys() >= {"eval/return_post_p20", "train/kl", "tasks/return_episode2"}
    assert (folder / "report.html").exists()
    done = command("report", "--run", str(folder), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "episodes.npz") as played:
        assert [*played["sides"]] == ["episode 1", "episode 3"]
        assert played["place"].shape == (3, 2, 200, 2)
        first, last = played["context"][:, :, 0].transpose(1, 0, 2)
    assert not first.any()  # nothing is known
    assert last.any(-1).all()
    assert "What a trial's memory adds" in html.unescape((folder / "report.html").read_text())
    done = command("compare", "--runs", str(folder), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "'after' is episode 3 of a trial" in done.stdout
    done = command("evaluate", "--run", str(folder), "--num-tasks", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "episode 3" in done.stdout
    row = json.loads((folder / "evaluations.jsonl").read_text())
    assert len(row["tasks/return_post"]) == 5
    for words, said in {
        ("--ablations",): "ablations is True; valid for runs that adapt, and p3o does not",
        ("--shots", "0", "1"): "shots is (0, 1); valid for runs that adapt, and p3o does not",
        ("--adapt.updates", "3"): "adapt.updates is 3, which algorithm p3o does not read",
    }.items():
        refused = command("evaluate", "--run", str(folder), *words, cwd=tmp_path)
        assert refused.returncode == 2
        assert said in refused.stderr
    refused = command("export", "--run", str(folder), "--out", "a.jmql", cwd=tmp_path)
    assert refused.returncode == 2
    assert "is of algorithm p3o; valid: a run of mql" in refused.stderr
