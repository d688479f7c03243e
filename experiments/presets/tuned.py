"""Our best numbers on MuJoCo's physics so far, for minutes to half an hour on one core."""

import dataclasses
from typing import Any

from experiments.presets import quick


def _longer(task: str, env_steps: int) -> dict[str, Any]:
    numbers = quick.PRESETS[task]
    return numbers | dict(train=dataclasses.replace(numbers["train"], env_steps=env_steps))


# What they give is measured in experiments/results/tuned.
PRESETS: dict[str, dict[str, Any]] = {
    # Larger networks and batches pay for the ant; for cheetah and walker they did not.
    "ant_dir": _longer("ant_dir", 1_000_000)
    | dict(
        network=dataclasses.replace(quick.PRESETS["ant_dir"]["network"], hidden_sizes=(256, 256)),
        td3=dataclasses.replace(
            quick.PRESETS["ant_dir"]["td3"], batch_size=256, learning_rate=5e-4, tau=0.01
        ),
    ),
    "cheetah_dir": _longer("cheetah_dir", 1_000_000)
    | dict(td3=dataclasses.replace(quick.PRESETS["cheetah_dir"]["td3"], tau=0.01)),
    "cheetah_vel": _longer("cheetah_vel", 1_000_000),
    "walker_params": _longer("walker_params", 1_000_000),
}
