"""Draws the pictures of the documents, in docs/ of the current folder.

Run with `python -m experiments.figures` for all that need no more than what is committed (some
minutes, for the most part to compile MJX), or with names to draw some of them. `python -m
experiments.figures paths RUN PICTURE` draws where the ants of a run walk, `goals RUN PICTURE` how
its points adapt, and `grasp RUN PICTURE` how its arm picks up an object of each kind; runs are not
committed.
"""

import sys
from pathlib import Path

import matplotlib as mpl

from experiments.config import RunFailed
from experiments.figures import (
    adaptation,
    beside,
    families,
    goals,
    grasp,
    kinds,
    learning,
    paths,
    single,
)
from jmql.settings import ConfigError

PICTURES = {
    "learning": learning.draw,
    "adaptation": adaptation.draw,
    "kinds": kinds.draw,
    "p3o": single.draw,
    "beside": beside.draw,
    "families": families.draw,
}
OF_RUNS = {"paths": paths.draw, "goals": goals.draw, "grasp": grasp.draw}
USAGE = (
    f"usage: python -m experiments.figures [{' '.join(PICTURES)}], or"
    f" {' | '.join(OF_RUNS)} RUN PICTURE"
)


def main(words: list[str]) -> None:
    """Draws what the words of the command line name."""
    mpl.use("agg")
    try:
        if len(words) == 3 and words[0] in OF_RUNS:
            OF_RUNS[words[0]](Path(words[1]), Path(words[2]))
        elif set(words) <= PICTURES.keys():
            for name in words or PICTURES:
                PICTURES[name](Path(f"docs/{name}.png"))
        else:
            sys.exit(USAGE)
    except (ConfigError, RunFailed) as error:
        sys.exit(f"figures: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
