"""Checkpoints: whole or not there, damaged ones passed over, others refused by name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import checkpoint
from experiments.checkpoint import Checkpoints, Mismatch, Unreadable
from tests import tiny

# Torn files leave coroutines of orbax unfinished, which their end complains of.
TORN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
IDENTITY = {"task": "probe", "network.hidden_sizes": (8, 8)}


def state(value: float, size: int = 4000):
    return {
        "key": jax.random.key(3),
        "weights": jnp.arange(size, dtype=jnp.float32) + value,
        "count": jnp.int32(value),
        "nothing": {"of": jnp.zeros((2, 0)), "after": jnp.float32(value)},  # as in MJX's states
    }


def like(size: int = 4000):
    return jax.eval_shape(lambda: state(0.0, size))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Five saves, of which three are kept."""
    with Checkpoints(tmp_path / "run", IDENTITY) as files:
        for step in range(1, 6):
            files.save(step, state(step))
    return tmp_path / "run"


def restore(folder: Path, identity=IDENTITY, shapes=None):
    with Checkpoints(folder, identity) as files:
        return files.restore(shapes or like())


def same(found, value: float) -> bool:
    data = jax.tree.map(np.asarray, checkpoint._plain((found, state(value))))
    try:
        chex.assert_trees_all_equal(*data)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("normalize", [False, True])
def test_agents_of_before_there_was_a_scale_or_changes_are_read(normalize, tmp_path):
    """Where nothing is scaled a checkpoint holds what it did in 0.2.0, and nothing beside; where
    contexts see no changes, what it did before they could.
    """
    agent = tiny.filled(tiny.build(tiny.changed(network={"normalize": normalize}))).agent
    names = ("params", "target_params", "opt_state", "updates")
    saved = {name: getattr(agent, name) for name in names}
    if normalize:
        saved["scale"] = {
            name: getattr(agent.scale, name) for name in ("observation", "reward", "count")
        }
    with Checkpoints(tmp_path, IDENTITY) as files:
        files.save(1, saved)
        files.wait()
        found = files.restore(jax.eval_shape(lambda: agent)).state
    assert (found.scale is not None) == normalize
    chex.assert_trees_all_equal(found, agent)


def test_the_newest_three_are_kept_and_the_newest_is_read(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["3", "4", "5"]
    found = restore(saved)
    assert (found.step, found.damaged) == (5, {})
    assert same(found.state, 5.0)
    chex.assert_trees_all_equal_shapes_and_dtypes(found.state, like())


def test_a_state_may_be_donated_while_it_is_written(tmp_path):
    """And who is given it does not wait for the writing, which takes a second."""
    step = jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)
    big = {"x": jax.random.normal(jax.random.key(0), (20_000_000,))}
    first = np.array(big["x"][:100])
    step = step.lower(big).compile()
    with Checkpoints(tmp_path, IDENTITY) as files:
        files.save(1, big)
        for _ in range(3):
            big = step(big)
        jax.block_until_ready(big)
        assert files._manager.is_saving_in_progress()
    np.testing.assert_allclose(big["x"][:100], first + 3, rtol=1e-5)
    found = restore(tmp_path, shapes=jax.eval_shape(lambda: big)).state["x"]
    np.testing.assert_array_equal(found[:100], first)


TEAR = """
import shutil, sys
from pathlib import Path
from tests.test_checkpoint import restore, same
saved, copy = Path(sys.argv[1]), Path(sys.argv[2])
for damage in ("truncated", "empty", "missing"):
    for path in sorted(x for x in (saved / "5").rglob("*") if x.is_file()):
        shutil.copytree(saved, copy)
        torn = copy / path.relative_to(saved)
        content = torn.read_bytes()
        torn.unlink()
        if damage != "missing":
            torn.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
        found = restore(copy)
        right = same(found.state, found.step) and set(found.damaged) <= {5}
        right = right and found.step == (4 if found.damaged else 5) and (copy / "5").exists()
        print("torn", damage, path.name, found.step, right, flush=True)
        shutil.rmtree(copy)
"""


def test_a_torn_file_never_gives_a_wrong_state(saved, tmp_path):
    """Each file of the newest checkpoint in turn: the state is right, or the one before is used,
    and nothing is deleted. In a process of its own: tensorstore's threads complain long after.
    """
    done = subprocess.run(
        [sys.executable, "-c", TEAR, str(saved), str(tmp_path / "copy")],
        capture_output=True, text=True, cwd=Path(__file__).parents[1], env=os.environ, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("torn ")]
    assert len(lines) > 20
    for damage in ("truncated", "empty", "missing"):
        of_damage = [line for line in lines if line[0] == damage]
        assert all(right == "True" for *_, right in of_damage)
        assert sum(step == "4" for *_, step, _ in of_damage) >= 3


@TORN
def test_all_damaged_is_an_error_that_names_each_and_deletes_nothing(saved, capfd):
    for step in (3, 4, 5):
        (saved / str(step) / "state" / "_METADATA").write_text("{")
    with pytest.raises(Unreadable, match=r"step 5: .*; step 4: .*; step 3: "):
        restore(saved)
    assert len(list(saved.iterdir())) == 3


def test_a_reader_leaves_a_save_in_progress_alone(saved):
    writing = saved / "6.orbax-checkpoint-tmp"
    writing.mkdir()
    with Checkpoints(saved, IDENTITY, read_only=True) as files:
        assert files.restore(like()).step == 5
    assert writing.exists()
    with Checkpoints(saved, IDENTITY) as files:  # a writer, of which there is only one, cleans up
        assert files.restore(like()).step == 5
    assert not writing.exists()


def test_a_step_that_is_not_new_is_refused_and_dropping_makes_room(saved):
    with Checkpoints(saved, IDENTITY) as files:
        with pytest.raises(RuntimeError, match="step 5 is not past the newest checkpoint, 5"):
            files.save(5, state(5.5))
        files.drop([5])
        files.save(5, state(5.5))
        files.wait()
    assert same(restore(saved).state, 5.5)


def test_a_checkpoint_of_another_device_is_read(saved):
    """The file says `cuda:0`; the state comes to the device that is here."""
    sharding = saved / "5" / "state" / "_sharding"
    text = sharding.read_text()
    moved = text.replace("cpu:0", "cuda:0").replace("TFRT_CPU_0", "CUDA_0")
    assert moved != text
    sharding.write_text(moved)
    found = restore(saved)
    assert (found.step, found.damaged) == (5, {})
    assert same(found.state, 5.0)


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError):
        restore(tmp_path)


@pytest.mark.parametrize(
    ("identity", "shapes", "message"),
    [
        ({"task": "other"}, None, "task is probe there and other here"),
        ({"network.hidden_sizes": (8,)}, None, r"network.hidden_sizes is \[8, 8\] there and \[8\]"),
        ({"td3.new": 1}, None, "td3.new is None there and 1 here"),
        ({"format": 0}, None, f"format is {checkpoint.FORMAT} there and 0 here"),
        ({}, like(5), r"weights is float32\[4000\] there and float32\[5\] here"),
        ({}, like() | {"more": jnp.zeros(2)}, r"more is None there and float32\[2\] here"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_by_name(saved, identity, shapes, message):
    with pytest.raises(Mismatch, match=message):
        restore(saved, IDENTITY | identity, shapes)


def test_a_full_disk_keeps_what_was_good_and_leaves_no_half(saved):
    """A limit on the size of files stands for the full disk: both fail in the middle of a write."""
    code = f"""
import resource, time, jax.numpy as jnp, jax
from pathlib import Path
from tests.test_checkpoint import Checkpoints, IDENTITY, state
with Checkpoints(Path({str(saved)!r}), IDENTITY) as files:
    assert files.newest() == 5
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        files.save(6, {{"weights": jax.random.normal(jax.random.key(0), (1_000_000,))}})
        while files._manager.is_saving_in_progress():
            time.sleep(0.05)
        files.check()  # the next look notices
    except Exception as error:
        print("refused", type(error).__name__)
    assert files.newest() == 5
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[1], env=os.environ,
    )  # fmt: skip
    assert done.stdout.startswith("refused"), done.stderr
    assert sorted(path.name for path in saved.iterdir()) == ["3", "4", "5"]
    assert same(restore(saved).state, 5.0)


def test_a_full_disk_leaves_the_terminal_to_the_error(tmp_path):
    """Orbax closes its event loop at the first array that fails, which the others then call: most
    of the time its complaint has no caller.
    """
    code = f"""
import resource, time, numpy as np
from pathlib import Path
from experiments import cli, guard
from experiments.config import RunFailed
from experiments.checkpoint import Checkpoints
cli._quiet()
folder, random = Path({str(tmp_path)!r}), np.random.default_rng(0)
try:
    with guard.logged(folder), Checkpoints(folder / "checkpoints", {{}}) as files:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        files.save(1, {{str(i): random.normal(size=20_000 * (1 + i)) for i in range(20)}})
        try:
            files.wait()
        finally:
            time.sleep(0.5)  # they call when they are done
except RunFailed as error:
    print("refused", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[1], env=os.environ,
    )  # fmt: skip
    assert done.stdout.startswith("refused"), done.stderr
    assert done.stderr == ""
    assert re.search("Event loop is closed|File too large", (tmp_path / "log.txt").read_text())


WRITER = """
import sys
from pathlib import Path
import numpy as np
from experiments import tracking
from experiments.checkpoint import Checkpoints
from tests.test_checkpoint import IDENTITY, like, state
import json, os
folder = Path(sys.argv[1])
with Checkpoints(folder / "checkpoints", IDENTITY) as files:
    try:
        step = files.restore(like()).step
    except FileNotFoundError:
        step = 0
    tracking.drop_rows(folder, step)
    print("going on", step, flush=True)
    with (folder / tracking.METRICS).open("a") as file:
        while True:
            step += 1
            rows = [{"seed": s, "env_steps": step, "updates": 0} for s in (0, 1)]
            file.write("".join(json.dumps(row) + "\\n" for row in rows))
            file.flush()
            files.save(step, state(step))
"""


def test_kill_at_random_moments_leaves_a_good_state_and_every_row_once(tmp_path):
    random = np.random.default_rng(0)
    reached = []
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1], env=os.environ,
        )  # fmt: skip
        reached.append(int(process.stdout.readline().split()[-1]))
        try:
            process.wait(random.uniform(0.2, 1.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
    assert reached == sorted(reached)
    assert reached[-1] > 0  # it did go on
    found = restore(tmp_path / "checkpoints")  # opening cleans up
    assert found.damaged == {}
    assert same(found.state, found.step)
    assert all(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())
    from experiments import tracking

    tracking.drop_rows(tmp_path, found.step)
    rows = [(row["env_steps"], row["seed"]) for row in tracking.read(tmp_path)]
    assert rows == [(step, seed) for step in range(1, found.step + 1) for seed in (0, 1)]


def test_memory_for_a_save_is_one_more_copy(tmp_path):
    """Of 200 MB; a process of its own, for the peak is that of a process."""
    code = f"""
import resource, jax, jax.numpy as jnp
from pathlib import Path
from experiments.checkpoint import Checkpoints
x = {{"x": jnp.zeros(50_000_000)}}
jax.block_until_ready(x)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # MB
before = peak()
with Checkpoints(Path({str(tmp_path)!r}), {{}}) as files:
    for step in range(3):
        files.save(step, x)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[1], env=os.environ,
    )  # fmt: skip
    assert float(done.stdout) < 320
