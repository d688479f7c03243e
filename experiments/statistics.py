"""What is said of returns over seeds and tasks: interquartile means and bootstrap intervals."""

from collections.abc import Callable

import numpy as np

Values = np.ndarray  # [S, N]: of seeds and tasks
Statistic = Callable[[np.ndarray], np.ndarray]  # [..., M] to [...]

_DRAWS = 2000


def mean(values: np.ndarray) -> np.ndarray:
    """Returns the mean [...] of values [..., M]."""
    return np.asarray(values.mean(-1))


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Returns the mean [...] of the middle half of values [..., M] (Agarwal et al. 2021)."""
    cut = values.shape[-1] // 4
    return mean(np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut])


def worst_fifth(values: np.ndarray) -> np.ndarray:
    """Returns the mean [...] of the lowest fifth of values [..., M]."""
    return mean(np.sort(values, axis=-1)[..., : -(-values.shape[-1] // 5)])


def interval(values: Values, statistic: Statistic) -> tuple[float, float]:
    """Returns a 95 % bootstrap interval of a statistic over all values.

    Seeds are drawn with replacement, and so are tasks, the same for all seeds: what a task has in
    common in all of them does not count as often as there are seeds.

    Args:
        values: [S, N], row s those of a seed on N tasks that all seeds share.
        statistic: of a sample.
    """
    rng = np.random.default_rng(0)
    seeds, tasks = values.shape
    found = []
    for _ in range(_DRAWS):
        rows, columns = rng.integers(seeds, size=(seeds, 1)), rng.integers(tasks, size=tasks)
        found.append(statistic(values[rows, columns].ravel()))
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def interval_of_mean(values: Values) -> tuple[float, float]:
    """Returns the same interval of the mean, at once: how often each seed and each task is drawn
    says what it weighs.
    """
    rng = np.random.default_rng(0)
    seeds, tasks = values.shape
    drawn = [rng.multinomial(n, np.full(n, 1 / n), _DRAWS) / n for n in (seeds, tasks)]
    means = np.einsum("ds,sk,dk->d", drawn[0], values, drawn[1], optimize=True)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
