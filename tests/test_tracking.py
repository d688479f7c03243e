"""W&B, by the real package: what it holds, and that it is never in the way."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from tests.test_cli import SMALL

ROWS = [{"env_steps": 200, "updates": 0, "eval/return_pre": -3.5, "tasks/return_pre": [1.0]}] * 2

# A run of two seeds and two cycles as the host loop does it; then it is stopped, and goes on.
SCRIPT = f"""
import dataclasses, os, sys, time
from pathlib import Path
from experiments.presets import preset
from experiments.tracking import Tracker
from experiments import cli, guard, run
cli._quiet()
config = dataclasses.replace(preset("point_goal", "quick"), seed=5, seeds=2)
folder = Path(os.environ.get("FOLDER", "runs/point_goal/ID"))
folder.mkdir(parents=True, exist_ok=True)
record = run.describe(config)
with guard.logged(folder):
    begun = time.monotonic()
    with Tracker(folder, config, record, int(sys.argv[1])) as tracker:
        started = time.monotonic()
        for step in map(int, sys.argv[2:]):
            tracker.log([row | {{"env_steps": step}} for row in {ROWS!r}])
        tracker.tasks(["task", "before"], [[["goal 1", -1.5]]] * 2)
print(tracker.wandb, started - begun, time.time() - (time.monotonic() - started))
"""


def track(cwd: Path, *steps: int, **environment: str) -> tuple[str, float, float]:
    """Returns the mode, and the seconds that starting took, and all the rest, the exit included."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, steps)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env=clean | {"PYTHONPATH": str(Path(__file__).parents[1]), "HOME": str(cwd)} | environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    mode, start, stop = done.stdout.split()
    return mode, float(start), time.time() - float(stop)


def inspect(folder: Path) -> list[dict]:
    """Reads an offline run with W&B's own command line."""
    wandb = Path(sys.executable).parent / "wandb"
    done = subprocess.run(
        [wandb, "leet", "inspect", "--json", folder], capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> tuple[Path, float, float]:
    """A run that went offline by itself and was resumed, and the seconds of the first part."""
    tmp_path = tmp_path_factory.mktemp("offline")
    mode, start, rest = track(tmp_path, 0, 200, 400)
    inside = {"FOLDER": ".", "HOME": str(tmp_path)}  # as with `--resume .`
    assert track(tmp_path / "runs/point_goal/ID", 400, 600, **inside)[0] == mode == "offline"
    return tmp_path, start, rest


def test_an_offline_run_can_be_read_back_and_a_resumed_one_has_the_same_id(offline):
    tmp_path = offline[0]
    folders = sorted((tmp_path / "runs/point_goal/ID/wandb").glob("offline-run-*-ID-s5"))
    assert len(folders) == 2
    seen = []
    for folder in folders:
        records = inspect(folder)
        (run,) = [record["run"] for record in records if record["type"] == "run"]
        assert run["run_id"] == "ID-s5"
        assert run["project"] == "jmql"
        assert run["run_group"].startswith("point_goal-quick-")
        assert run["config"]["update"]["config"]["td3"]["batch_size"] == 128
        assert {"versions", "device", "git_commit"} <= run["config"]["update"].keys()
        rows = [record["history"]["item"] for record in records if record["type"] == "history"]
        seen += [row["env_steps"] for row in rows if row.get("eval/return_pre") == -3.5]
        assert [row["eval/tasks._type"] for row in rows if "eval/tasks._type" in row] == [
            "table-file"  # of single tasks
        ]
        by = {x["metric"]["glob_name"]: x["metric"] for x in records if x["type"] == "metric"}
        assert by["eval/*"]["step_metric"] == "env_steps"
    assert seen == [200, 400, 600]


@pytest.mark.parametrize("server", ["refuses", "never answers"])
def test_an_unreachable_server_costs_seconds_at_the_start_and_nothing_later(
    server, offline, tmp_path
):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        accepted = []
        if server == "never answers":
            listening.listen(50)

            def accept() -> None:
                while True:
                    try:
                        accepted.append(listening.accept()[0])
                    except OSError:
                        return

            threading.Thread(target=accept, daemon=True).start()
        mode, start, rest = track(
            tmp_path,
            0,
            200,
            WANDB_API_KEY="a" * 40,
            WANDB_BASE_URL=f"http://127.0.0.1:{port}",
        )
        for connection in accepted:
            connection.close()
    assert mode == "offline"
    # Far from the 90 s and more that W&B itself would wait; three are ours.
    assert start < offline[1] + 12
    assert rest < offline[2] + 12
    log = (tmp_path / "runs/point_goal/ID/log.txt").read_text()
    assert "does not answer, recording offline" in log
    assert list((tmp_path / "runs/point_goal/ID/wandb").glob("offline-run-*-ID-s6"))


def test_disabled_writes_nothing_but_the_record(tmp_path):
    assert track(tmp_path, 0, 200, WANDB_MODE="disabled")[0] == "disabled"
    assert [path.name for path in (tmp_path / "runs/point_goal/ID").iterdir()] == ["metrics.jsonl"]


def test_the_command_of_a_wandb_sweep_runs_as_its_agent_runs_it(tmp_path):
    """And its numbers go to the run that W&B has made for it."""
    path = Path(__file__).parents[1] / "experiments/sweeps/bayes/point_goal.yaml"
    asked = yaml.safe_load(path.read_text())
    chosen = {
        k: {"value": v.get("min", v.get("values", [0])[0])} for k, v in asked["parameters"].items()
    }
    words = create_sweep_command_args({"args": chosen})
    command = []
    for word in create_sweep_command(asked["command"]):
        command += words["args"] if word == "${args}" else [word]
    assert command[:2] == ["jmql", "train"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cli", *command[1:], *SMALL],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {"WANDB_MODE": "offline", "WANDB_SWEEP_ID": "it", "WANDB_RUN_ID": "theirs"},
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs/point_goal").iterdir()
    config = json.loads((folder / "config.json").read_text())["config"]
    assert config["td3"]["learning_rate"] == asked["parameters"]["td3.learning-rate"]["min"]
    (tracked,) = folder.glob("wandb/offline-run-*")
    assert tracked.name.endswith("-theirs")
    assert asked["metric"]["name"] in json.loads(
        (folder / "metrics.jsonl").read_text().splitlines()[-1]
    )
