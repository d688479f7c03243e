"""Sweeps: what a file says as commands, what is refused, and a sweep that is stopped and killed."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import cli, guard, here, population, program, progress, run, sweep, tracking
from experiments.config import RunFailed
from experiments.stop import Stop
from jmql.settings import ConfigError
from tests.test_cli import SMALL

ROOT = Path(__file__).parents[1]


READY = sorted((ROOT / "experiments/sweeps").glob("*.yaml"))


def read(folder, text):
    path = folder / "lr.yaml"
    path.write_text(text)
    return sweep.read(path, cli._train_config)


def test_a_grid_with_points_and_seeds_becomes_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = read(
        tmp_path,
        """
base: {tasks.train: 8, network.hidden_sizes: [16, 16]}
grid: {task: [point_goal, point_sparse], td3.learning_rate: [3e-4, 1e-3]}
points: [{}, {network.normalize: false, split: ood}]
seeds: [0, 5]
""",
    )
    assert len(jobs) == 2 * 2 * 2 * 2
    assert sweep.command(jobs[:1]) == (
        "jmql train --task point_goal --tasks.train 8 --network.hidden-sizes 16 16"
        " --td3.learning-rate 3e-4 --tracking.tags lr --seed 0 --run-id lr-point_goal-lr3e-4-s0"
    )
    assert sweep.command(jobs[-1:]) == (
        "jmql train --task point_sparse --tasks.train 8 --network.hidden-sizes 16 16"
        " --td3.learning-rate 1e-3 --network.no-normalize --split ood --tracking.tags lr --seed 5"
        " --run-id lr-point_sparse-lr1e-3-no-normalize-ood-s5"
    )
    assert jobs[-1].folder == Path("runs/point_sparse/lr-point_sparse-lr1e-3-no-normalize-ood-s5")
    for job in jobs:  # a command says all of its configuration
        assert cli._members(shlex.split(sweep.command((job,)))[2:]) == [job.config]
    lines = [line for line in sweep.listing(sweep.batches(jobs, 1)) if line.startswith("#")]
    assert len(lines) == 16
    assert len(set(lines)) == 8  # seeds are a group


def test_returns_are_called_by_what_they_are_of(tmp_path, monkeypatch):
    """Before and after adaptation, or of the first and the last episode of a trial."""
    monkeypatch.chdir(tmp_path)
    jobs = read(
        tmp_path,
        """
base: {task: point_goal, algorithm: p3o}
points: [{}, {context_span: trial}, {algorithm: mql}]
""",
    )
    runs = [progress.Progress(job) for job in jobs]
    for of_run, row in zip(runs, ({"pre": 1}, {"pre": 2, "post": 3}, {}), strict=True):
        of_run.row = {f"eval/return_{stage}": value for stage, value in row.items()}
        of_run.state = "done"
    columns = {column.header: list(column.cells) for column in progress.table(runs).columns}
    assert columns.keys() - {"run", "state", "steps"} == {
        *("trained", "episode 1", "episode 3", "before", "after")
    }
    assert columns["trained"] == ["1.0", "", ""]
    assert columns["episode 3"] == ["", "3.0", ""]
    ends = [progress.line(of_run).rpartition(" steps")[2] for of_run in runs]
    assert ends == [" · return 1.0", " · return 2.0 → 3.0", ""]


def test_runs_that_differ_in_seeds_and_numbers_share_a_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = read(
        tmp_path,
        """
base: {task: point_goal}
grid: {td3.tau: [0.1, 0.2], td3.batch_size: [16, 32], td3.discount: [0.9]}
seeds: [0, 1, 2]
""",
    )
    assert [len(batch) for batch in sweep.batches(jobs, 1)] == [1] * 12
    whole = sweep.batches(jobs, 6)
    assert [len(batch) for batch in whole] == [6, 6]
    assert [len(batch) for batch in sweep.batches(jobs, 5)] == [3] * 4
    assert {len({job.config.td3.batch_size for job in batch}) for batch in whole} == {1}
    assert sorted(job.name for batch in whole for job in batch) == sorted(job.name for job in jobs)
    for batch in whole:
        text = sweep.command(batch)
        runs = cli._members(shlex.split(text.replace("\\\n", ""))[2:])
        assert runs == [job.config for job in batch]
        population.build(runs)  # and can be
    assert list(sweep.listing(whole[:1])) == [
        "# 6 runs side by side in one process, which differ in td3.tau, seed",
        f"# W&B groups {run.group(jobs[0].config)}, {run.group(jobs[6].config)}",
        """jmql train --task point_goal --td3.batch-size 16 --td3.discount 0.9 --tracking.tags lr \\
  --member '--td3.tau 0.1 --seed 0 --run-id lr-tau0.1-batch_size16-discount0.9-s0' \\
  --member '--td3.tau 0.1 --seed 1 --run-id lr-tau0.1-batch_size16-discount0.9-s1' \\
  --member '--td3.tau 0.1 --seed 2 --run-id lr-tau0.1-batch_size16-discount0.9-s2' \\
  --member '--td3.tau 0.2 --seed 0 --run-id lr-tau0.2-batch_size16-discount0.9-s0' \\
  --member '--td3.tau 0.2 --seed 1 --run-id lr-tau0.2-batch_size16-discount0.9-s1' \\
  --member '--td3.tau 0.2 --seed 2 --run-id lr-tau0.2-batch_size16-discount0.9-s2'""",
    ]


def test_the_last_row_may_be_long(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert tracking.last_row(tmp_path) is None
    rows = [{"env_steps": i, "tasks/return_pre": [0.123456789] * 20_000} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"env_st')
    assert tracking.last_row(tmp_path)["env_steps"] == 2
    path.write_text(json.dumps(rows[1]) + "\n")
    assert tracking.last_row(tmp_path)["env_steps"] == 1


def test_a_run_that_is_there_with_other_settings_is_refused(tmp_path, monkeypatch):
    """Else its rows would be taken for those of what the sweep says now."""
    monkeypatch.chdir(tmp_path)
    (job,) = read(tmp_path, "base: {task: point_goal, adapt.shots: 5}")
    run.create(program.build(job.config))
    assert read(tmp_path, "base: {task: point_goal, adapt.shots: 5}") == [job]
    with pytest.raises(ConfigError, match="adapted or evaluated with other settings"):
        read(tmp_path, "base: {task: point_goal}")
    with pytest.raises(ConfigError, match=r"td3.tau is 0.005 in .* cannot become 0.1"):
        read(tmp_path, "base: {task: point_goal, adapt.shots: 5, td3.tau: 0.1}")


def test_settings_of_one_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (
        "base: {task: point_goal}\ngrid: {td3.learning_rate: [1e-3], adapt.learning_rate: [1e-4]}"
    )
    (job,) = read(tmp_path, text)
    assert job.name == "lr-td3.learning_rate1e-3-adapt.learning_rate1e-4-s0"


@pytest.mark.parametrize(
    ("text", "said"),
    {
        "setting": ("grid: {td3.learningrate: [1]}", "did you mean td3.learning_rate?"),
        "part": ("gird: {}", "unknown part 'gird'; did you mean grid?"),
        "type": ("base: {task: point_goal, td3.tau: fast}", "s0 of .*lr.yaml: .*tau.*fast"),
        "bound": ("base: {task: point_goal, td3.tau: 7}", "td3.tau is 7.0; it must be above 0"),
        "task": ("base: {task: point_gaol}", "did you mean point_goal?"),
        "split": ("base: {task: point_goal, split: odd}", "did you mean ood?"),
        "ours": ("base: {task: point_goal, run_id: x}", "sets run_id, which a sweep makes"),
        "twice": ("base: {task: point_goal}\nseeds: [0, 0]", "has lr-s0 twice, the first as"),
        "both": ("base: {task: point_goal}\ngrid: {task: [point_goal]}", "task is in the grid"),
        "list": ("base: {task: point_goal}\ngrid: {td3.tau: 0.1}", "grid.td3.tau .* be a list"),
        "empty": ("base: {task: point_goal}\nseeds: []", "seeds in .* must be a list"),
        "long": (
            f"name: {'x' * 250}\nbase: {{task: point_goal}}",
            "of 253 bytes; it must have at",
        ),
        "flag": ("base: {task: point_goal, backend: --resume=x}", "must be a value or a list"),
        "seeds": (
            "base: {task: point_goal}\nseeds: [[0]]",
            "seeds in .* must be a value or a list",
        ),
        "nested": ("base: {td3.tau: {a: 1}}", "base.td3.tau in .* must be a value or a list"),
        "spelling": (
            "base: {task: point_goal}\ngrid: {td3.tau: [0.01, 1e-2]}",
            "the first as lr-tau0",
        ),
        "same key": (
            "base: {task: point_goal, td3.tau: 1, td3.tau: 0.1}",
            "td3.tau is there twice",
        ),
        "bool": (
            "base: {task: point_goal, observe_task: yes}",
            "is 'yes'; it must be true or false",
        ),
        "none": ("base: {task: point_goal}\ngrid: {td3.tau: [[]]}", "must be a value or a list"),
        "deep": ("[" * 3000, "is no YAML"),
        "yaml": ("grid: {", "is no YAML"),
        "nothing": ("", "is no sweep"),
        "no mapping": ("base: 3", "base in .* must be a mapping"),
    }.values(),
)
def test_what_cannot_work_is_refused_before_anything_starts(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        read(tmp_path, text)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_the_sweeps_of_the_project_can_be_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(sweep.read(path, cli._train_config)) > 10


def test_processes_have_as_many_cores_and_none_twice(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(9)))
    assert here._shares(4) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert here._shares(1) == [()]  # all


def test_a_folder_is_locked_while_a_run_is_at_it(tmp_path):
    """A sweep waits for what an earlier one has left, then."""
    assert not guard.is_locked(tmp_path / "nothing")
    with guard.locked(tmp_path):
        assert guard.is_locked(tmp_path)
    assert not guard.is_locked(tmp_path)


def test_a_disk_that_refuses_ends_a_sweep_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = read(tmp_path, "base: {task: point_goal}")
    (tmp_path / "runs").write_text("a file in the place of a folder")
    with pytest.raises(RunFailed, match=r"output.txt cannot be written: .*Not a directory"):
        here.sweep(sweep.batches(jobs, 1), 1, Stop())


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.cli", "sweep", "s.yaml", "--where", "local"]
    return subprocess.Popen(
        [*command, "--jobs", "2", "--population", "2"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rows(folder: Path) -> dict[str, list]:
    """What each run has written, but for how long it took."""
    return {
        path.parent.name: [
            {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
            for line in path.read_text().splitlines()
        ]
        for path in sorted(folder.glob("runs/*/*/metrics.jsonl"))
    }


def wait_for_rows(folder: Path, process: subprocess.Popen, more_than: int) -> None:
    """Waits until the runs have written more, together."""
    until = time.monotonic() + 300
    while sum(map(len, rows(folder).values())) <= more_than:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
def test_a_sweep_that_is_stopped_and_killed_ends_as_one_that_is_not(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = dict(zip(SMALL[::2], SMALL[1::2], strict=True))
    base = {k.removeprefix("--").replace("-", "_"): v for k, v in flags.items()}
    base |= {"task": "point_goal", "tracking.wandb": "disabled", "train.env_steps": "12000"}
    base |= {"train.updates_per_round": "100"}
    del base["collect.unroll"]
    for folder in (whole, broken):
        folder.mkdir()
        text = json.dumps(
            {
                "name": "s",
                "base": base,
                "grid": {"collect.unroll": ["40", "50"]},
                "seeds": ["0", "1"],
            }
        )
        (folder / "s.yaml").write_text(text)
    process = start(whole)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said

    process = start(broken)
    wait_for_rows(broken, process, 4)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 33, said
    assert "4 stopped · go on with: the same command" in said
    before = sum(map(len, rows(broken).values()))

    process = start(broken)
    wait_for_rows(broken, process, before)
    process.kill()
    process.communicate()
    folders = sorted(broken.glob("runs/point_goal/*"))
    assert [folder.name for folder in folders] == [
        f"s-unroll{n}-s{k}" for n in (40, 50) for k in (0, 1)
    ]
    until = time.monotonic() + 60
    while any(map(guard.is_locked, folders)):
        assert time.monotonic() < until
        time.sleep(0.1)
    # The jobs have ended with the sweep.
    assert sum(map(len, rows(broken).values())) < sum(map(len, rows(whole).values()))

    process = start(broken)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert "4 done" in said
    assert rows(broken) == rows(whole)

    # What is done is left alone, and what fails is named.
    outputs = [folders[i] / "output.txt" for i in (0, 2)]
    printed = [path.read_text() for path in outputs]
    assert "2 runs, which differ in seed" in printed[0]
    for path in folders[1].glob("checkpoints/*"):
        path.rename(broken / path.name)
    process = start(broken)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1, said
    assert "s-unroll40-s1 failed: jmql: " in said
    assert "has results but no checkpoint" in said
    assert "3 done, 1 failed" in said
    assert outputs[1].read_text() == printed[1]
