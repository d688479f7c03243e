"""W&B's view of the same: a workspace that compares groups of seeds over environment steps."""

from wandb_workspaces import reports, workspaces

from experiments.config import RunFailed
from experiments.terminal import console
from jmql.settings import ConfigError

# Panels by section; of each, its title and metrics, or a pattern of their names.
_SECTIONS: dict[str, dict[str, list[str] | str]] = {
    "Returns on held-out tasks": {
        "before adaptation": ["eval/return_pre"],
        "after adaptation": ["eval/return_post"],
        "worst fifth after adaptation": ["eval/return_post_p20"],
        "after each shot, in each episode of a trial": r"eval/return_(step1|shot\d+|episode\d+)",
    },
    "Propensity": {
        "effective sample size": ["adapt/ess"],
        "weights, 10th, 50th and 90th percentile": r"adapt/beta_p\d+",
        "share of weights that are zero": ["adapt/beta_zero_share"],
        "classifier": r"adapt/classifier_.*",
    },
    "P3O": {
        "effective sample size of replay": ["train/ess"],
        "KL divergence from the past": ["train/kl"],
        "entropy": ["train/entropy"],
        "value loss": ["train/value_loss"],
    },
    "Training": {
        "return while collecting": ["collect/return"],
        "critic loss": ["train/critic_loss"],
        "mean Q": ["train/q"],
        "norm of all weights": ["train/weight_norm"],
        "loss of the head that tells the task": ["train/task_loss"],
    },
    "Speed": {
        "environment steps a second": ["time/env_steps_per_second"],
        "updates a second": ["time/updates_per_second"],
        "seconds to compile": ["time/compile_seconds"],
    },
}


def build(entity: str, project: str) -> workspaces.Workspace:
    """Returns the workspace, which is W&B's only once it is saved."""
    sections = [
        workspaces.Section(
            name=name,
            is_open=True,
            panels=[
                reports.v2.LinePlot(
                    title=title,
                    x="env_steps",
                    **({"metric_regex": what} if isinstance(what, str) else {"y": what}),
                    groupby_aggfunc="mean",
                    groupby_rangefunc="stddev",
                )
                for title, what in panels.items()
            ],
        )
        for name, panels in _SECTIONS.items()
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="JMQL: groups of seeds",
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis="env_steps"),
        runset_settings=workspaces.RunsetSettings(groupby=[workspaces.Metric("Group")]),
    )


def save(entity: str, project: str) -> None:
    """Saves the workspace as a new view and says where it is.

    Args:
        entity: of W&B; empty: the default of the account.
        project: of W&B.

    Raises:
        ConfigError: there is no account here.
        RunFailed: W&B refuses.
    """
    import wandb

    try:
        entity = entity or wandb.Api(timeout=10).default_entity or ""
    except Exception as error:
        said = str(error).splitlines()[0]
        raise ConfigError(f"no W&B account here ({said}); valid: after wandb login") from None
    if not entity:
        raise ConfigError("no W&B account here; valid: after wandb login, or --entity NAME")
    view = build(entity, project)
    try:
        view.save()
    except Exception as error:
        raise RunFailed(f"W&B does not take the workspace: {error}") from None
    console.print(f"saved: {view.url}", soft_wrap=True)
