"""Effects of the twelve changes that were tried at once, from tries.jsonl beside this file.

Run with `python experiments/results/tuning/effects.py`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

CHANGES: dict[str, Any] = {
    "network.normalize": True,
    "collect.exploration_noise": 0.1,
    "network.layer_norm": True,
    "td3.learning_rate": 4e-4,
    "td3.n_step": 3,
    "network.history_length": 5,
    "td3.target_noise": 0.1,
    "td3.reward_scale": 0.1,
    "td3.batch_size": 256,
    "td3.policy_delay": 1,
    "td3.discount": 0.97,
    "td3.tau": 0.01,
}
PENALTY = 1.0  # of the ridge regression

lines = Path(__file__).with_name("tries.jsonl").read_text(encoding="utf-8").splitlines()
rows = [row for row in map(json.loads, lines) if row["try"][0] == "d" and row["try"][1:].isdigit()]
design = np.array(
    [[1.0] + [0.5 - (r["changed"].get(k) != v) for k, v in CHANGES.items()] for r in rows]
)
late = np.array([np.mean(row["eval/return_pre"][-2:]) for row in rows])
early = np.array([row["eval/return_pre"][row["env_steps"].index(144_000)] for row in rows])
penalty = PENALTY * np.diag([0.0] + [1.0] * len(CHANGES))
effects = np.linalg.solve(design.T @ design + penalty, design.T @ np.stack([late, early], 1))
print(f"{len(rows)} runs, at the end and at 144,000 steps")
for name, (at_end, before) in zip(CHANGES, effects[1:], strict=True):
    print(f"{name:<28}{CHANGES[name]!s:>8}{at_end:8.0f}{before:8.0f}")
