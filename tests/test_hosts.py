"""Several hosts train one run: two processes with a device each, against one process with two."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import tracking
from tests.test_cli import SMALL

TRAIN = [
    *("train", "--task", "tests.tiny:PointAndNothing", "--run-id", "r", *SMALL),
    *("--tracking.wandb", "disabled", "--train.env-steps", "8000"),
    *("--train.updates-per-round", "50", "--devices", "2"),
]
ENDLESS = ("--train.env-steps", "8000000")


def process(folder: Path, devices: int, *words: str, **variables: str) -> subprocess.Popen:
    flags = os.environ["XLA_FLAGS"].replace("device_count=4", f"device_count={devices}")
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.cli", *TRAIN, *words],
        cwd=folder,
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.getcwd()} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def hosts(folder: Path, *words: str) -> list[subprocess.Popen]:
    """Two hosts; the second has a disk of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = []
    for index, place in enumerate((folder, folder / "other")):
        place.mkdir(exist_ok=True)
        variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        variables["JAX_PROCESS_ID"] = str(index)
        started.append(process(place, 1, "--distributed", *words, **variables))
    return started


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    said = [one.communicate(timeout=200)[0] for one in processes]
    return [(one.returncode, text) for one, text in zip(processes, said, strict=True)]


def rows(folder: Path) -> list[dict]:
    found = tracking.read(folder / "runs/PointAndNothing/r")
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in found]


def wait_for_rows(folder: Path, count: int, started: list[subprocess.Popen]) -> None:
    until = time.monotonic() + 200
    while len(rows(folder)) < count:
        assert time.monotonic() < until
        for one in started:
            assert one.poll() is None, ended(started)
        time.sleep(0.1)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> list[dict]:
    """The rows of two hosts that nothing stopped."""
    folder = tmp_path_factory.mktemp("straight")
    (first, said), (second, silence) = ended(hosts(folder))
    assert first == second == 0, said + silence
    assert "x2" in said  # devices
    assert [line for line in silence.splitlines() if "[Gloo]" not in line] == []
    assert not list((folder / "other").iterdir())  # the first alone writes
    return rows(folder)


def test_two_hosts_compute_what_one_with_two_devices_does(straight, tmp_path):
    ((code, said),) = ended([process(tmp_path, 2)])
    assert code == 0, said
    one = rows(tmp_path)
    assert [row["env_steps"] for row in one] == [row["env_steps"] for row in straight]
    for row, other in zip(one[:3], straight[:3], strict=True):  # learning amplifies last bits
        for name in row:
            np.testing.assert_allclose(other[name], row[name], rtol=1e-3, atol=1e-3)


def test_hosts_that_are_stopped_or_lost_go_on_together(straight, tmp_path):
    started = hosts(tmp_path)
    wait_for_rows(tmp_path, 3, started)
    started[1].send_signal(signal.SIGTERM)  # one alone is told
    (first, said), (second, more) = ended(started)
    assert first == second == 33, said + more
    assert "saved at" in said
    before = len(rows(tmp_path))
    assert before < len(straight)

    started = hosts(tmp_path, *ENDLESS)
    wait_for_rows(tmp_path, before + 2, started)
    started[1].kill()
    begun = time.monotonic()
    (first, said), _ = ended(started)
    assert first == 1, said
    assert time.monotonic() - begun < 60
    last = said.strip().splitlines()[-1]
    assert last.startswith("jmql: another host has failed or gone")
    assert "the same command on all of them goes on" in last

    (first, said), (second, more) = ended(hosts(tmp_path))
    assert first == second == 0, said + more
    assert "going on at" in said
    assert rows(tmp_path) == straight  # bit for bit


def test_what_several_hosts_cannot(tmp_path):
    ((code, said),) = ended([process(tmp_path, 2, "--distributed")])
    assert code == 2
    assert "jmql: distributed is set, and the hosts are not known" in said
