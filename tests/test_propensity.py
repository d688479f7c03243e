"""The classifier against scikit-learn, and importance weights by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from jmql import propensity
from jmql.config import PropensityConfig


@functools.partial(jax.jit, static_argnums=0)
def fit(config, x, is_replay, weight=None, strength=None):
    """Compiled `propensity.fit`; a strength C that is given is traced, to compile once for all."""
    if strength is not None:
        config = dataclasses.replace(config, inverse_regularization=strength)
    return propensity.fit(config, x, is_replay, jnp.ones(len(x)) if weight is None else weight)


def make_problem(seed, new, replay, features, distance):
    """Two Gaussian classes, so far apart, in features of different scale and place."""
    rng = np.random.default_rng(seed)
    is_replay = np.arange(new + replay) >= new
    x = rng.normal(size=(new + replay, features))
    x = x + distance * is_replay[:, None] * rng.normal(size=features)
    x = x * rng.uniform(0.2, 3.0, features) + rng.normal(size=features)
    return x.astype(np.float32), is_replay


def fit_sklearn(config, x, is_replay, strength):
    model = LogisticRegression(
        C=strength,
        class_weight="balanced" if config.balanced else None,
        tol=1e-10,
        max_iter=10_000,
    )
    if config.standardized:
        model = make_pipeline(StandardScaler(), model)
    return model.fit(x.astype(np.float64), is_replay)


PROBLEMS = {
    "overlapping": (0, 200, 200, 3, 0.5),
    "few new": (1, 40, 300, 5, 1.0),
    "few replay": (2, 250, 30, 2, 1.0),
    "separable": (3, 60, 60, 4, 20.0),
    "separable by one feature": (4, 30, 90, 1, 40.0),
    "equal": (5, 100, 100, 4, 0.0),
    "wide": (6, 100, 120, 30, 1.0),
}


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("standardized", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_classifier_is_scikit_learns(problem, standardized, balanced):
    x, is_replay = make_problem(*PROBLEMS[problem])
    config = PropensityConfig(balanced=balanced, standardized=standardized)
    for strength in (0.05, 0.5, 10.0):
        classifier = fit(config, x, is_replay, strength=strength)
        model = fit_sklearn(config, x, is_replay, strength)
        last = model[-1] if standardized else model
        np.testing.assert_allclose(classifier.coef, last.coef_[0], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(classifier.intercept, last.intercept_[0], rtol=1e-3, atol=1e-3)
        odds = propensity.log_odds(classifier, x)
        np.testing.assert_allclose(odds, model.decision_function(x), rtol=1e-3, atol=1e-3)


def test_padding_changes_nothing():
    x, is_replay = make_problem(7, 50, 80, 3, 1.0)
    rng = np.random.default_rng(7)
    padding = 100 * rng.normal(size=(40, 3)).astype(np.float32)
    config = PropensityConfig()
    alone = fit(config, x, is_replay)
    padded = fit(
        config,
        np.concatenate([padding, x]),
        np.concatenate([rng.integers(0, 2, 40) == 1, is_replay]),
        np.concatenate([np.zeros(40), np.ones(len(x))]).astype(np.float32),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), padded, alone)


def test_a_constant_feature_is_harmless():
    x, is_replay = make_problem(8, 50, 50, 2, 1.0)
    config = PropensityConfig()
    constant = np.full((len(x), 1), 3.0, np.float32)
    alone = fit(config, x, is_replay)
    beside = fit(config, np.concatenate([x, constant], axis=1), is_replay)
    np.testing.assert_allclose(beside.coef, [*alone.coef, 0.0], rtol=1e-4, atol=1e-5)


def test_importance_weights_by_hand():
    config = PropensityConfig(log_odds_clip=1.5, zero_below=0.1)
    odds = jnp.array([-9.0, -1.6, -1.5, -1.0, 0.0, 2.0, 2.3, 2.31, 80.0])
    expected = [4.481689, 4.481689, 4.481689, 2.718282, 1.0, 0.135335, 0.100259, 0.0, 0.0]
    np.testing.assert_allclose(propensity.importance_weights(config, odds), expected, rtol=1e-5)


def test_effective_sample_size_by_hand():
    cases = [
        ([1.0, 1.0, 1.0], 1.0),
        ([0.3, 0.3], 1.0),
        ([0.0, 5.0, 0.0, 0.0], 0.25),
        ([0.0, 0.0, 0.0], 0.0),
        ([1.0, 2.0, 3.0], 36 / 42),
    ]
    for beta, expected in cases:
        actual = propensity.effective_sample_size(jnp.array(beta))
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_diagnostics_by_hand():
    """Two new samples and one of padding, four of replay; each class counts one half."""
    config = PropensityConfig(log_odds_clip=1.0, zero_below=0.1)
    logit = {p: float(np.log(p / (1 - p))) for p in (0.25, 0.75, 0.85, 0.95)}
    new = jnp.array([logit[0.25], logit[0.85], logit[0.95]])
    replay = jnp.array([logit[0.25], logit[0.75], logit[0.75], logit[0.95]])
    metrics = propensity.diagnostics(config, new, jnp.array([1.0, 1.0, 0.0]), replay)
    # exp(-log-odds) = (1 - p) / p: 3 (clipped to e), 1/3, 1/3, 1/19 (below 0.1).
    beta = np.array([np.e, 1 / 3, 1 / 3, 0.0])
    expected = {
        "ess": beta.sum() ** 2 / (4 * np.sum(beta**2)),
        "beta_mean": beta.mean(),
        "beta_p10": 0.1,  # 0.3 of the way from 0 to 1/3
        "beta_p50": 1 / 3,
        "beta_p90": 1 / 3 + 0.7 * (np.e - 1 / 3),
        "beta_zero_share": 0.25,
        # One of two new ones is taken for new, three of four of replay for replay.
        "classifier_accuracy": 0.5 / 2 + 0.5 * 3 / 4,
        # By bin, share of samples times (p - share of replay): at 0.25, 0.75, 0.85, 0.95.
        "classifier_calibration_error": abs(0.375 * 0.25 - 0.125)
        + abs(0.25 * (0.75 - 1))
        + 0.25 * 0.85
        + abs(0.125 * (0.95 - 1)),
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_odds_are_a_density_ratio_where_classes_are_balanced():
    """New data from N(1, 1), replay from N(0, 1): log p(replay)/p(new) = 1/2 - x."""
    rng = np.random.default_rng(9)
    new, replay = 4000, 16_000
    x = np.concatenate([rng.normal(1, 1, (new, 1)), rng.normal(0, 1, (replay, 1))])
    x, is_replay = x.astype(np.float32), np.arange(new + replay) >= new
    at = np.linspace(-1, 2, 7, dtype=np.float32)[:, None]
    odds = {
        balanced: propensity.log_odds(fit(PropensityConfig(balanced=balanced), x, is_replay), at)
        for balanced in (True, False)
    }
    np.testing.assert_allclose(odds[True], 0.5 - at[:, 0], atol=0.1)
    # Without the correction the odds contain n_replay / n_new.
    np.testing.assert_allclose(odds[False], 0.5 - at[:, 0] + np.log(4), atol=0.1)


CHANGED = {
    "inverse_regularization": 0.01,
    "log_odds_clip": 0.5,
    "zero_below": 0.5,
    "balanced": False,
    "standardized": False,
    "newton_steps": 1,
}
OF_ADAPT = {"observation", "recent_per_task"}  # what `adapt` shows to the classifier
FIELDS = [field.name for field in dataclasses.fields(PropensityConfig)]


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in OF_ADAPT])
def test_every_knob_changes_the_weights(name):
    x, is_replay = make_problem(10, 40, 160, 3, 1.0)
    config = PropensityConfig()

    def weights(config):
        classifier = fit(config, x, is_replay)
        odds = propensity.log_odds(classifier, x[is_replay])
        return propensity.importance_weights(config, odds)

    changed = weights(dataclasses.replace(config, **{name: CHANGED[name]}))
    assert np.max(np.abs(changed - weights(config))) > 1e-3


def test_a_column_is_refused_where_a_vector_belongs():
    x, is_replay = make_problem(11, 5, 5, 2, 1.0)
    ones = np.ones(10, np.float32)
    for arguments in (
        (x, is_replay[:, None], ones),
        (x, is_replay, ones[:, None]),
        (x, is_replay, ones[:5]),
    ):
        with pytest.raises(AssertionError):
            propensity.fit(PropensityConfig(), *arguments)
