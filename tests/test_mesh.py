"""One run over several devices: the same draws, the same numbers, one message for a step."""

import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments import cli, devices, memory, program, run
from experiments.program import Program
from jmql import mesh, replay
from jmql.settings import ConfigError
from tests import tiny

COUNTS = (1, 2, 4)


def built(count: int, **changed: int) -> Program:
    """Its states have an array without elements, which XLA puts where it likes."""
    config = tiny.changed(network={"changes": True, "task_head": True})
    config = dataclasses.replace(config, task="tests.tiny:PointAndNothing")
    return tiny.build(dataclasses.replace(config, devices=count, **changed))


@functools.cache
def trained(count: int, seeds: int = 1) -> tuple:
    """The state after warm-up and two cycles, the metrics of the last, and what went on."""
    made = built(count, seeds=seeds)
    cycle = made.compile()
    state = made.init(made.keys)
    true, false = jnp.array(True), jnp.array(False)
    state, *_ = cycle(state, jnp.int32(2), true, false, made.numbers)
    middle = jax.tree.map(jnp.copy, state)
    state, *results = cycle(state, jnp.int32(2), false, true, made.numbers)
    return made, cycle, middle, state, jax.device_get(results)


def plain(state):
    """The numbers of a state, keys as their data."""
    state = state.replace(key=jax.random.key_data(state.key))
    return jax.device_get(jax.tree.leaves(state))


@pytest.mark.parametrize(("count", "seeds"), [(4, 1), (2, 3)])
def test_any_number_of_devices_computes_the_same(count, seeds):
    """Two devices share each of three seeds, which are vectorised."""
    *_, one, results = trained(1)
    made, _, _, many, others = trained(count, seeds)
    assert made.mesh.devices.shape == (1, count)
    assert len(many.memory.data.reward.sharding.device_set) == count
    for here, there in zip(plain(one), plain(many), strict=True):
        np.testing.assert_allclose(here[0], there[0], rtol=1e-4, atol=1e-5)
    for here, there in zip(jax.tree.leaves(results), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(here[0], there[0], rtol=1e-3, atol=1e-4)


def test_a_step_sends_one_message_for_each_gradient():
    made, cycle, _, state, _ = trained(2)
    sizes = {name: memory.size(part) // 4 for name, part in state.agent.params.items()}
    sent = re.findall(r"= (\S+|\(.+?\)) all-(?:reduce|gather)\(", cycle.as_text())
    # With the critic's go its losses and its mean value, with the actor's its loss.
    for size in (sizes["critic"] + 3, sizes["actor"] + 1):
        assert len([what for what in sent if what.startswith(f"f32[{size}]")]) == 1
    # No other is larger than these or than the histories that an adaptation draws; the replay is.
    most = max(sizes["critic"] + 3, 2 * 16 * 5 * 2)
    shapes = [shape for what in sent for shape in re.findall(r"\[([0-9,]*)\]", what)]
    assert max(math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes) <= most
    assert made.shapes.memory.data.observation.size > most


def test_a_lone_device_and_seeds_apart_send_no_message():
    for made, cycle, *_ in (trained(1), trained(2, seeds=2)):
        assert made.mesh.shape[mesh.AXIS] == 1
        assert "all-reduce" not in cycle.as_text()
        assert "all-gather" not in cycle.as_text()


def test_a_seed_on_a_device_of_its_own_is_that_of_a_lone_run():
    *_, one, _ = trained(1)
    *_, two, _ = trained(2, seeds=2)
    for here, there in zip(plain(one), plain(two), strict=True):
        np.testing.assert_allclose(here[0], there[0], rtol=1e-4, atol=1e-5)
        assert len(there) == 2


def test_a_checkpoint_moves_between_devices_and_goes_on_bit_for_bit_on_as_many(tmp_path):
    made, cycle, middle, end, _ = trained(2)
    with run.checkpoints(tmp_path, made.config) as files:
        files.save(80, middle)
        files.wait()
        for count in COUNTS:
            there = built(count)
            state, _ = run.restore(tmp_path, there, files)
            assert len(state.memory.data.reward.sharding.device_set) == count
            assert all(map(np.array_equal, plain(state), plain(middle)))
            if count == 2:
                flags = jnp.array(False), jnp.array(True)
                again, *_ = cycle(state, jnp.int32(2), *flags, made.numbers)
                assert all(map(np.array_equal, plain(again), plain(end)))


@pytest.mark.parametrize("count", COUNTS)
def test_devices_draw_what_one_draws(count):
    """Each its share of a batch; or all of them all of it, tasks in turn."""
    made = built(count)
    state = tiny.filled(built(1))
    key = jax.random.key(1)

    def draw(memory: replay.ReplayState) -> tuple:
        return (
            replay.sample(memory, key, 12, 5),
            replay.sample_whole(memory, key, 6, 5),
            replay.sample_whole(memory, key, 8, 5, recent=3, tasks=4),
        )

    rows = P(mesh.AXIS)
    place = replay.ReplayState(rows, P(), P())
    there = jax.shard_map(
        draw, mesh=made.mesh, in_specs=(place,), out_specs=(rows, P(), P()), check_vma=False
    )
    for here, other in zip(
        jax.tree.leaves(draw(state.memory)),
        jax.tree.leaves(jax.jit(there)(state.memory)),
        strict=True,
    ):
        assert np.array_equal(here, other)


def test_each_block_of_rows_gives_the_same_share():
    memory = tiny.filled(built(1)).memory
    rows = jnp.broadcast_to(jnp.arange(4.0)[:, None], memory.data.reward.shape)
    memory = memory.replace(data=memory.data.replace(reward=rows))
    batch = replay.sample(memory, jax.random.key(0), 12, 5)
    assert batch.transition.reward.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert replay.strata(64, 256) == 64
    assert replay.strata(4, 6) == 2
    drawn = replay.sample(memory, jax.random.key(0), 6, 5).transition.reward
    assert jnp.all((drawn >= 2) == (jnp.arange(6) >= 3))
    assert len(set(drawn.tolist())) > 2


def test_how_many_devices():
    """All that get a share worth having, or as many as are asked for."""
    assert [built(n).mesh.size for n in (0, *COUNTS)] == [1, *COUNTS]  # 4 samples are too few
    large = tiny.changed(td3={"batch_size": 128})
    assert program.build(large).mesh.shape == {"seeds": 1, "rows": 4}
    assert [devices.count(large, there) for there in (1, 2, 3, 8)] == [1, 2, 2, 4]
    six = dataclasses.replace(large, seeds=6)
    assert devices.choose(six).shape == {"seeds": 2, "rows": 2}
    assert [devices.count(six, there) for there in (2, 3, 6, 16)] == [2, 3, 6, 12]
    for many in (3, 8):
        with pytest.raises(ConfigError, match=f"devices is {many}; valid here: 1, 2, 4 "):
            built(many)


def least(made, held_out=3):
    """Returns what `memory.at_least` finds, in its order."""
    found = memory.at_least(made.config, 200, held_out, made.shapes, made.mesh)
    return list(found.values())


def test_memory_is_counted_on_each_device():
    """Cores share one memory; what is divided is there once."""
    one, two = built(1), built(2)
    agent = memory.size(one.shapes.agent)
    state = [memory.in_one(memory.of_state(made.shapes), made.mesh) for made in (one, two)]
    assert agent < state[1] - state[0] < 1.1 * agent
    # Of three tasks each device adapts to two.
    (training, episodes, data, agents), halves = least(one), least(two)
    assert halves == [training // 2, episodes // 3 * 2, data // 3 * 2, agents - agent]


def test_what_is_refused_could_not_have_fitted():
    """The least that is counted before a program is compiled, of all that can be made large."""
    config = tiny.changed(
        td3={"batch_size": 2000},
        adapt={"episodes": 40, "batch_multiple": 10},
        evaluate={"episodes": 300, "history_length": 500},
    )
    made = program.build(dataclasses.replace(config, devices=1))
    assert max(least(made)) > 5e6
    assert max(least(made)) < memory.of_program(made.compile())
    # Nobody looks into a history without a context, and then it takes nothing.
    blind = {"network": {"context_size": 0}, "propensity": {"observation": True}}
    longer = [
        least(program.build(tiny.changed(**blind, evaluate={"history_length": length})))
        for length in (0, 2**31 - 1)
    ]
    assert longer[0] == longer[1]


def test_cores_become_devices_before_jax_starts(monkeypatch):
    many, late = "--xla_force_host_platform_device_count=", "terminate_timeout_seconds=604800"
    monkeypatch.setattr(devices.os, "cpu_count", lambda: 6)
    for said, wanted, count in (("", 2, 2), ("--a", 9, 6), (f"{many}4", 2, 4), (f"{many}4", 1, 4)):
        monkeypatch.setenv("XLA_FLAGS", said)
        devices.prepare(wanted)
        flags = devices.os.environ["XLA_FLAGS"].split()
        assert f"{many}{count}" in flags
        assert "--xla_cpu_multi_thread_eigen=false" in flags
        assert flags[-1].endswith(late)
        assert len(flags) == 4 + (said == "--a")
    monkeypatch.setenv("XLA_FLAGS", "--a")
    devices.prepare(1)
    assert devices.os.environ["XLA_FLAGS"] == "--a"
    monkeypatch.undo()
    assert 1 <= devices.cores() <= devices.os.cpu_count()


def test_a_quota_of_cores_is_kept_to(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "CGROUPS", tmp_path)
    monkeypatch.setattr(devices.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(devices.psutil, "cpu_count", lambda logical: 64)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    for version1, version2, cores in (("-1", "max", 64), ("300000", "max", 3), ("-1", "50000", 1)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(version1)
        (tmp_path / "cpu.max").write_text(f"{version2} 100000")
        assert devices.cores() == cores


def test_a_run_is_evaluated_where_there_are_fewer_devices(monkeypatch, tmp_path):
    """What it was trained on says nothing about where it is evaluated."""
    seen = []
    monkeypatch.setenv("XLA_FLAGS", devices.os.environ["XLA_FLAGS"])
    monkeypatch.setattr("experiments.evaluate.evaluate", lambda _, config, *__: seen.append(config))
    record = {"config": dataclasses.asdict(dataclasses.replace(tiny.CONFIG, devices=64))}
    (tmp_path / "config.json").write_text(json.dumps(record))
    for words in ([], ["--devices", "2"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["evaluate", "--run", str(tmp_path), *words])
        assert stop.value.code == 0
    assert [config.devices for config in seen] == [0, 2]


MANY_MATRICES = """
import os, sys
from experiments import devices

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
devices.prepare(2)
import jax
import jax.numpy as jnp

def solved(matrices):
    def step(_, total):
        changed = matrices + total[:, None, None]
        factor = jax.scipy.linalg.cho_factor(changed, lower=True)
        found = jax.scipy.linalg.cho_solve(factor, changed[..., :1])[..., 0].sum(1)
        return 0 * (found + jnp.sin(changed).sum((1, 2)) + jnp.cos(changed @ changed).sum((1, 2)))

    return jax.lax.fori_loop(0, 3000, step, jnp.zeros(len(matrices)))

mesh = jax.sharding.Mesh(jax.devices(), ("rows",))
everywhere = jax.jit(jax.shard_map(solved, mesh=mesh, check_vma=False,
    in_specs=jax.P("rows"), out_specs=jax.P("rows")))
matrices = jnp.broadcast_to(10 * jnp.eye(23), (128 * len(jax.devices()), 23, 23))
jax.block_until_ready(everywhere(matrices))
factors = jax.jit(jnp.linalg.cholesky)(jnp.stack([4 * jnp.eye(3), -jnp.eye(3)]))
assert (factors[0] == 2 * jnp.eye(3)).all()
assert jnp.isnan(factors[1]).any()
print(len(jax.devices()), "devices are done")
"""


def test_devices_that_factorise_many_matrices_do_not_wait_for_each_other_forever():
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-c", MANY_MATRICES]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert f"{min(2, os.cpu_count())} devices are done" in done.stdout
