"""Eight runs in one process against eight processes, one after the other: wall time and memory.

    taskset -c 0 .venv/bin/python experiments/results/sweeps/population.py point_goal 64000
    taskset -c 0 .venv/bin/python experiments/results/sweeps/population.py cheetah_dir 112000

Each begins with an empty compilation cache and adds a line to population.jsonl.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import psutil

HERE = Path(__file__).parent
task, env_steps = sys.argv[1], int(sys.argv[2])
SWEEP = {
    "name": "p",
    "base": {"task": task, "train.env_steps": str(env_steps), "tracking.wandb": "disabled"},
    "grid": {"td3.learning_rate": ["5e-4", "1e-3"]},
    "seeds": ["0", "1", "2", "3"],
}


def memory(process: psutil.Process) -> int:
    """Returns the bytes that a process and all below it have in memory."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


for most in ("8", "off"):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "s.yaml").write_text(json.dumps(SWEEP))
        words = ["sweep", "s.yaml", "--where", "local", "--jobs", "1", "--population", most]
        begun = time.monotonic()
        process = psutil.Popen(
            [sys.executable, "-m", "experiments.cli", *words],
            cwd=folder,
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"},
            stdout=subprocess.DEVNULL,
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, memory(process))
            time.sleep(0.5)
        seconds = time.monotonic() - begun
        assert process.returncode == 0
        files = sorted(Path(folder).glob("runs/*/*/metrics.jsonl"))
        rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in files]
    row = {
        "task": task,
        "env_steps": env_steps,
        "population": most,
        "seconds": round(seconds),
        "peak_gb": round(peak / 1e9, 2),
        # Of each run in its last but one cycle.
        "updates_per_second": [round(some[-2]["time/updates_per_second"]) for some in rows],
        "compile_seconds": [round(some[-1]["time/compile_seconds"]) for some in rows],
        "returns": [round(some[-1]["eval/return_post"], 1) for some in rows],
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
    }
    print(json.dumps(row), flush=True)
    with (HERE / "population.jsonl").open("a") as out:
        out.write(json.dumps(row) + "\n")
