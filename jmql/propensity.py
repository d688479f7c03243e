"""Which replay data look like the new task's (docs/method.md section 2).

Logistic regression tells replay from new data; its odds give importance weights.
"""

import chex
import jax
import jax.numpy as jnp
from flax import struct

from jmql.config import PropensityConfig
from jmql.types import Array, Metrics


class Classifier(struct.PyTreeNode):
    """Log-odds of "replay" = intercept + coef . (x - mean) / scale."""

    coef: Array  # [F]
    intercept: Array  # []
    mean: Array  # [F]
    scale: Array  # [F]


def fit(
    config: PropensityConfig, features: Array, is_replay: Array, sample_weight: Array
) -> Classifier:
    """Fits an L2-regularised logistic regression with damped Newton steps.

    Minimises |coef|^2 / 2 + C sum_i w_i log(1 + exp(-y_i f_i)), the objective of scikit-learn's
    LogisticRegression; `balanced` is its class_weight.

    Args:
        config: C, scaling, balance and the number of steps.
        features: [N, F].
        is_replay: [N] bool, the class.
        sample_weight: [N], 0 for padding.
    """
    chex.assert_rank([features, is_replay, sample_weight], [2, 1, 1])
    chex.assert_equal_shape_prefix([features, is_replay, sample_weight], 1)
    total = sample_weight.sum()
    mean, scale = jnp.zeros(features.shape[1]), jnp.ones(features.shape[1])
    if config.standardized:
        share = (sample_weight / total)[:, None]
        mean = jnp.sum(share * features, axis=0)
        variance = jnp.sum(share * jnp.square(features - mean[None]), axis=0)
        scale = jnp.where(variance > 1e-12, jnp.sqrt(variance), 1.0)
    x = (features - mean[None]) / scale[None]
    x = jnp.concatenate([x, jnp.ones((len(x), 1))], axis=1)  # the last column is the intercept
    y = jnp.where(is_replay, 1.0, -1.0)
    weight = sample_weight
    if config.balanced:
        replay = jnp.sum(weight * is_replay)
        weight = weight * total / (2 * jnp.where(is_replay, replay, total - replay))
    weight = config.inverse_regularization * weight
    penalty = jnp.ones(x.shape[1]).at[-1].set(0.0)

    def objective(theta: Array) -> Array:
        return 0.5 * jnp.sum(penalty * theta**2) + weight @ jax.nn.softplus(-y * (x @ theta))

    def newton(theta: Array, _: None) -> tuple[Array, None]:
        miss = jax.nn.sigmoid(-y * (x @ theta))  # probability of the wrong class
        gradient = penalty * theta - x.T @ (weight * y * miss)
        # The small ridge keeps the step finite where a separable problem leaves no curvature.
        curvature = (x * (weight * miss * (1 - miss))[:, None]).T @ x + jnp.diag(penalty + 1e-6)
        direction = jax.scipy.linalg.solve(curvature, gradient, assume_a="pos")
        candidates = theta[None] - 0.5 ** jnp.arange(8.0)[:, None] * direction[None]
        candidates = jnp.concatenate([candidates, theta[None]])
        values = jax.vmap(objective)(candidates)
        return candidates[jnp.argmin(jnp.where(jnp.isnan(values), jnp.inf, values))], None

    theta = jnp.zeros(x.shape[1])
    theta, _ = jax.lax.scan(newton, theta, None, length=config.newton_steps)
    return Classifier(theta[:-1], theta[-1], mean, scale)


def log_odds(classifier: Classifier, features: Array) -> Array:
    """Returns the log-odds [N] that features [N, F] come from replay."""
    scaled = (features - classifier.mean[None]) / classifier.scale[None]
    return scaled @ classifier.coef + classifier.intercept


def importance_weights(config: PropensityConfig, odds: Array) -> Array:
    """Returns beta = exp(-max(f, -clip)) [N], 0 where below `zero_below`, of log-odds f [N].

    With balanced classes beta estimates p(new | x) / p(replay | x).
    """
    beta = jnp.exp(-jnp.maximum(odds, -config.log_odds_clip))
    return jnp.where(beta < config.zero_below, 0.0, beta)


def effective_sample_size(beta: Array) -> Array:
    """Returns (sum beta)^2 / (N sum beta^2), [] in [0, 1], of weights [N]; 0 if all are 0.

    Source: P3O, Fakoor et al. 2019.
    """
    square = jnp.sum(jnp.square(beta))
    return jnp.square(jnp.sum(beta)) / (len(beta) * jnp.where(square > 0, square, 1.0))


def diagnostics(
    config: PropensityConfig, new_odds: Array, new_weight: Array, replay_odds: Array
) -> Metrics:
    """Describes a classifier on the data it was fitted to, both classes counting the same.

    Args:
        config: for the weights.
        new_odds: log-odds of "replay" [N] of new-task samples.
        new_weight: [N], 0 for padding.
        replay_odds: log-odds of "replay" [M] of replay samples.

    Returns:
        Accuracy, expected calibration error over ten bins, and of the weights of the replay
        samples: effective sample size, mean, quantiles 10, 50 and 90, share of zeros. [] each.
    """
    odds = jnp.concatenate([new_odds, replay_odds])
    is_replay = jnp.arange(len(odds)) >= len(new_odds)
    share = jnp.concatenate(
        [0.5 * new_weight / new_weight.sum(), jnp.full(len(replay_odds), 0.5 / len(replay_odds))]
    )
    p = jax.nn.sigmoid(odds)
    bins = jax.nn.one_hot(jnp.clip((10 * p).astype(jnp.int32), 0, 9), 10)
    gap = jnp.sum(bins * (share * (p - is_replay))[:, None], axis=0)
    beta = importance_weights(config, replay_odds)
    low, median, high = jnp.quantile(beta, jnp.array([0.1, 0.5, 0.9]))
    return {
        "ess": effective_sample_size(beta),
        "beta_mean": beta.mean(),
        "beta_p10": low,
        "beta_p50": median,
        "beta_p90": high,
        "beta_zero_share": jnp.mean(beta == 0),
        "classifier_accuracy": jnp.sum(share * ((odds > 0) == is_replay)),
        "classifier_calibration_error": jnp.abs(gap).sum(),
    }
