"""Runs as W&B has them: one of its runs is one seed, with means over tasks and no single tasks."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from experiments.config import from_json
from experiments.report.source import Row, Source
from jmql.settings import ConfigError


def read(path: str) -> list[Source]:
    """Returns the runs of `ENTITY/PROJECT` or `ENTITY/PROJECT/GROUP`.

    Raises:
        ConfigError: there are none, or W&B does not say.
    """
    import wandb

    entity, _, rest = path.partition("/")
    project, _, group = rest.partition("/")
    if not entity or not project:
        raise ConfigError(f"wandb is {path!r}; it must be ENTITY/PROJECT or ENTITY/PROJECT/GROUP")
    try:
        filters = {"group": group} if group else {}
        found = [_source(one) for one in wandb.Api().runs(f"{entity}/{project}", filters)]
    except ConfigError:
        raise
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"W&B does not say what {path} has: {said}") from None
    runs = [one for one in found if one is not None]
    if not runs:
        raise ConfigError(f"{path} has no runs of JMQL; valid: what W&B has of a training")
    return runs


def _source(run: Any) -> Source | None:
    """Returns a run of W&B, or None where it is not a training of JMQL's."""
    record = dict(run.config)
    _, found, seed = run.id.rpartition("-s")
    if "config" not in record or not found or not seed.isdigit():
        return None
    config = from_json(json.dumps(record["config"]))
    config = dataclasses.replace(config, seed=int(seed), seeds=1)
    rows: list[Row] = [
        {"seed": config.seed} | {k: v for k, v in row.items() if isinstance(v, int | float)}
        for row in run.scan_history()
        if "time/env_steps_per_second" in row
    ]
    return Source(Path(run.url), config, record, rows, [], {}, {}, [], [])
