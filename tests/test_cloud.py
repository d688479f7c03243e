"""Cloud TPU, as far as it can be proved without an account."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from experiments import cli, cloud, guard, sweep
from experiments.config import RunFailed
from jmql.settings import ConfigError

# What Google calls them: an accelerator, and the image that a machine with it must have.
RUNTIMES = {"v6e": "v2-alpha-tpuv6e", "v5litepod": "v2-alpha-tpuv5-lite"}
BUCKET = "gs://b/jmql"
SWEEP = """
name: lr
base: {task: point_goal}
grid: {td3.learning_rate: [3e-4, 1e-3]}
"""
FILES = sorted(cloud.LAUNCH.glob("*.yaml"))


@pytest.fixture
def batches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    Path("lr.yaml").write_text(SWEEP)
    return sweep.batches(sweep.read(Path("lr.yaml"), cli._train_config), 8)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_job_files_name_what_there_is(path):
    """SkyPilot takes any name of an accelerator, and its own image for v5e is a wrong one."""
    job = yaml.safe_load(path.read_text())
    resources = job["resources"]
    tpu, kind, chips = resources["accelerators"].split("-")
    assert (tpu, resources["infra"]) == ("tpu", "gcp")
    assert resources["accelerator_args"] == {"runtime_version": RUNTIMES[kind]}
    assert path.stem.replace("v5e", "v5litepod") == (kind if chips == "1" else f"{kind}-{chips}")
    recovery = resources["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [33]
    assert recovery["strategy"] in ("EAGER_NEXT_REGION", "FAILOVER")
    assert recovery["max_restarts_on_errors"] <= 3
    for step in ("setup", "run"):
        program, script = job[step].split()
        assert program == "bash"
        assert (cloud.LAUNCH.parents[1] / script).exists()


@pytest.mark.parametrize("path", sorted(cloud.LAUNCH.glob("*.sh")), ids=lambda path: path.stem)
def test_scripts_are_shell(path):
    subprocess.run(["bash", "-n", path], check=True)


def test_what_is_submitted(batches, monkeypatch):
    (command,) = cloud.submissions(batches, f"{BUCKET}/", "v6e").values()
    file = "experiments/launch/v6e.yaml"
    jmql = (
        "jmql train --task point_goal --tracking.tags lr --seed 0"
        " --member '--td3.learning-rate 3e-4 --run-id lr-lr3e-4-s0'"
        " --member '--td3.learning-rate 1e-3 --run-id lr-lr1e-3-s0'"
        " --mirror gs://b/jmql/runs"
    )
    assert command == [
        *"sky jobs launch --yes --detach-run --name jmql-lr-lr3e-4-s0".split(),
        *("--env", f"JMQL_BUCKET={BUCKET}", "--env", f"JMQL_COMMAND={jmql}", file),
    ]
    for config, job in zip(cli._members(shlex.split(jmql)[2:]), batches[0], strict=True):
        assert config.run_id == job.name
        assert config.mirror == "gs://b/jmql/runs"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    (command,) = cloud.submissions(batches, BUCKET, "v6e").values()
    assert command[-3:] == ["--secret", "WANDB_API_KEY", file]  # by its name, not its value
    # On a slice each run is alone, and every host has the same command.
    for command, job in zip(
        cloud.submissions(batches, BUCKET, "v6e-16").values(), batches[0], strict=True
    ):
        (said,) = (word for word in command if word.startswith("JMQL_COMMAND="))
        assert shlex.split(said)[2:] == [*job.words, "--mirror", f"{BUCKET}/runs", "--distributed"]
        assert command[-1].endswith("v6e-16.yaml")
    with pytest.raises(ConfigError, match="bucket is ''; it must be gs://BUCKET"):
        cloud.submissions(batches, "", "v6e")
    with pytest.raises(ConfigError, match=r"tpu is 'v7x'; valid: v5e, .*v6e"):
        cloud.submissions(batches, BUCKET, "v7x")


def stand_in(folder: Path, name: str, code: int = 0) -> Path:
    """Makes a program that writes down its arguments, a line each call; returns where."""
    log = folder / f"{name}.log"
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        f'#!/bin/bash\necho "$@" >> {log}\n/bin/cat > {folder}/stdin.last\nexit {code}\n'
    )
    path.chmod(0o755)
    return log


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """No program can be found but those that are made here: none of this machine's is called."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def test_submitting_and_cancelling(batches, programs, monkeypatch, capsys):
    there = programs / "there"
    monkeypatch.setattr(cloud, "_folder", lambda bucket: str(there))
    commands = cloud.submissions(batches, BUCKET, "v5e")
    with pytest.raises(ConfigError, match="SkyPilot is not here; valid: after `uv tool install"):
        cloud.submit(batches, BUCKET, "v5e")
    said = capsys.readouterr().out.splitlines()  # usable all the same
    assert (Path(said[0].removeprefix("cd ")) / "experiments/launch/run.sh").exists()
    assert said[1:] == [shlex.join(command) for command in commands.values()]
    log = stand_in(programs, "sky")
    assert cloud.submit(batches, BUCKET, "v5e") == 0
    assert cloud.stop(batches) == 0
    launch, *cancels = log.read_text().splitlines()
    assert launch == " ".join(commands["jmql-lr-lr3e-4-s0"][1:])
    assert cancels == [  # also where they were submitted one by one
        "jobs cancel --yes --name jmql-lr-lr3e-4-s0",
        "jobs cancel --yes --name jmql-lr-lr1e-3-s0",
    ]
    # What the bucket has to its end is not paid for again.
    for job in batches[0]:
        place = there / "runs/point_goal" / job.name
        place.mkdir(parents=True)
        (place / "mirror.json").write_text('{"steps": 64000, "files": {}, "row": null}')
    log.unlink()
    assert cloud.submit(batches, BUCKET, "v5e") == 0
    assert "0 jobs submitted, 1 are done" in capsys.readouterr().out
    assert not log.exists()
    stand_in(programs, "sky", code=1)
    with pytest.raises(RunFailed, match="`sky jobs cancel` has failed"):
        cloud.stop(batches)


def test_status_is_read_from_the_bucket(batches, programs, monkeypatch, capsys):
    with pytest.raises(ConfigError, match=r"bucket is 'x'; it must be gs://BUCKET"):
        cloud.status(batches, "x")
    monkeypatch.setattr(cloud, "_folder", lambda path: path.rstrip("/"))
    there = programs / "there" / "runs" / "point_goal" / "lr-lr3e-4-s0"
    there.mkdir(parents=True)
    (there / "mirror.json").write_text(
        '{"steps": 32000, "files": {}, "row": {"env_steps": 33600, "eval/return_pre": -12.34}}'
    )
    assert cloud.status(batches, f"{programs / 'there'}/") == 0
    said = capsys.readouterr().out
    assert "saved, 52%" in said
    assert "-12.3" in said
    assert "1 saved, 1 waiting" in said
    folder = batches[0][0].folder
    folder.mkdir(parents=True)
    with guard.locked(folder):
        assert cloud.status(batches, "") == 0
    assert "1 running, 1 waiting" in capsys.readouterr().out


def test_the_command_of_a_job_is_run_as_it_was_said(tmp_path):
    """Through SkyPilot's variable, quotes and all, and its exit code is the job's."""
    clone = tmp_path / "clone"
    (clone / ".venv/bin").mkdir(parents=True)
    (clone / "experiments/launch").mkdir(parents=True)
    (clone / "experiments/launch/run.sh").write_text((cloud.LAUNCH / "run.sh").read_text())
    jmql = clone / ".venv/bin/jmql"
    jmql.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        "print(sys.argv[1:], os.environ['JAX_COMPILATION_CACHE_DIR'])\nsys.exit(33)\n"
    )
    jmql.chmod(0o755)
    done = subprocess.run(
        ["bash", "experiments/launch/run.sh"],
        cwd=clone,
        env=os.environ | {"JMQL_BUCKET": BUCKET, "JMQL_COMMAND": "jmql train --member '--seed 1'"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 33
    assert done.stdout == "['train', '--member', '--seed 1'] gs://b/jmql/compiled\n"


def test_without_skypilot_gcloud_alone_asks_for_the_same_machine(tmp_path):
    log = stand_in(tmp_path, "gcloud")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def run(tpu: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", cloud.LAUNCH / "gcloud.sh", "a", "jmql train --member '--seed 1'"],
            env=os.environ | {"PATH": path, "JMQL_BUCKET": BUCKET, "ZONE": "z", "TPU": tpu},
            capture_output=True,
            text=True,
            check=False,
        )

    done = run("v5litepod-1")
    assert done.returncode == 0, done.stderr
    code, command, delete, create = log.read_text().splitlines()
    assert code == "storage cp - gs://b/jmql/jobs/a/code.tar.gz"
    assert command == "storage cp - gs://b/jmql/jobs/a/command"
    assert delete.startswith("compute tpus queued-resources delete a --zone z")
    assert create == (
        "compute tpus queued-resources create a --node-id a --zone z"
        " --accelerator-type v5litepod-1 --runtime-version v2-alpha-tpuv5-lite --spot"
        f" --metadata jmql-name=a,jmql-zone=z,jmql-bucket={BUCKET}"
        " --metadata-from-file startup-script=experiments/launch/startup.sh"
    )
    assert run("v6e-1").returncode == 0
    assert "--runtime-version v2-alpha-tpuv6e" in log.read_text()
    wrong = run("v7-1")
    assert wrong.returncode == 2
    assert wrong.stderr == "TPU is v7-1; valid: v6e-N, v5litepod-N, N 1, 4 or 8\n"
    assert run("v6e-16").returncode == 2  # every host of it would run the command alone
