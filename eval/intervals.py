"""Means, win rates at equal length and win rates corrected for a judge's errors, each with its 95 % interval."""

import math
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import expit

NEAR_EQUAL_LENGTH = 5  # posts needed where the response is not longer, and where it is not shorter
Z = float(stats.norm.ppf(0.975))


def mean_interval(values, posts, resamples: int, seed: int, shares: bool = False) -> dict[str, float | None]:
    """Mean and its 95 % bootstrap interval; whole posts are resampled, so that what belongs to a post stays together.

    Where all values are equal, resampling sees no spread: for shares, which may be all 0 or all 1 by chance, the
    interval is then the exact one of the binomial.

    Args:
        values: [N] numbers; NaN are left out.
        posts: [N] which post each belongs to.
        shares: whether the values are wins, or other things that happen or do not.

    Returns:
        `mean`, `low`, `high`; None where there is no value, and for the ends where one post has different ones.
    """
    values, posts = np.asarray(values, float), np.asarray(posts)
    values, posts = values[~np.isnan(values)], posts[~np.isnan(values)]
    if len(values) == 0:
        return {"mean": None, "low": None, "high": None}
    _, codes = np.unique(posts, return_inverse=True)
    sums, counts = np.bincount(codes, values), np.bincount(codes).astype(float)
    mean = float(values.mean())
    if np.ptp(values) == 0:
        if not shares or mean not in (0.0, 1.0):
            return {"mean": mean, "low": mean, "high": mean}
        exact = stats.binomtest(int(mean * len(counts)), len(counts)).proportion_ci()
        return {"mean": mean, "low": float(exact.low), "high": float(exact.high)}
    if len(counts) == 1:
        return {"mean": mean, "low": None, "high": None}
    found = stats.bootstrap(
        (sums, counts), lambda s, c, axis: s.sum(axis) / c.sum(axis), paired=True, vectorized=True,
        n_resamples=resamples, method="percentile", batch=max(1, 10**7 // len(sums)), rng=np.random.default_rng(seed),
    )  # fmt: skip
    low, high = found.confidence_interval
    return {"mean": mean, "low": float(low), "high": float(high)}


def length_controlled_win_rate(outcomes, length_differences, posts) -> dict[str, float | None]:
    """Win rate at equal length: logistic regression of the outcome on the difference in length, read at 0.

    Longer summaries win more often, and PPO's are longer. The idea is that of the length-controlled AlpacaEval (Dubois
    et al. 2024, arXiv 2404.04475), here with two covariates, so that a taste for length may grow or level off:
    logit P(win) = a + b z + c tanh(2 z), z = difference / its standard deviation. Firth's (1993) estimate stays finite
    where length alone decides. The 95 % interval of `a` is from the sandwich estimator (HC3), clustered by post.

    The curve is smooth: where many pairs are equal texts, and so ties, it passes above or below what is seen at equal
    length. The report therefore also has what is seen there (`near_equal_length`).

    Args:
        outcomes: [N] 1, 0.5 or 0; NaN are left out.
        length_differences: [N] words of the response minus words of the reference.
        posts: [N] which post each belongs to.

    Returns:
        `mean`, `low`, `high` of sigmoid(a), None where lengths or outcomes do not differ, or one side is nearly always
        the longer one; and `standard_deviation` of the differences in words.
    """
    y, x, posts = np.asarray(outcomes, float), np.asarray(length_differences, float), np.asarray(posts)
    x, posts, y = x[~np.isnan(y)], posts[~np.isnan(y)], y[~np.isnan(y)]
    _, codes = np.unique(posts, return_inverse=True)
    n, deviation = len(np.unique(codes)), float(x.std()) if len(x) else 0.0
    unknown = {"mean": None, "low": None, "high": None, "standard_deviation": deviation}
    # at equal length there must be something to look at, or the curve would say more than the data
    if n < 10 or deviation == 0 or np.ptp(y) == 0 or min((x <= 0).sum(), (x >= 0).sum()) < NEAR_EQUAL_LENGTH:
        return unknown
    z = x / deviation
    X = np.stack([np.ones_like(z), z, np.tanh(2 * z)], 1)  # [N, 3]
    if np.linalg.matrix_rank(X) < 3:  # two lengths only, or three of equal distance: the two covariates are one
        X = X[:, :2]
    information = lambda p: X.T @ (np.maximum(p * (1 - p), 1e-12)[:, None] * X)
    beta, objective = np.zeros(X.shape[1]), -math.inf
    for _ in range(500):  # Newton's method on the penalised likelihood, steps halved until they gain
        p = expit(X @ beta)
        inverse = np.linalg.inv(information(p))
        leverage = np.maximum(p * (1 - p), 1e-12) * np.einsum("ni,ij,nj->n", X, inverse, X)
        step = inverse @ (X.T @ (y - p + leverage * (0.5 - p)))  # Firth's score
        while np.abs(step).max() > 1e-8:
            p = np.clip(expit(X @ (beta + step)), 1e-12, 1 - 1e-12)
            gained = (y * np.log(p) + (1 - y) * np.log1p(-p)).sum() + 0.5 * np.linalg.slogdet(information(p))[1]
            if gained > objective:
                break
            step = step / 2
        else:
            break
        beta, objective = beta + step, gained
    p = expit(X @ beta)
    residuals = ((y - p) / np.maximum(1 - leverage, 0.01))[:, None] * X
    by_post = np.stack([np.bincount(codes, column) for column in residuals.T], 1)  # [posts, 3]
    error = math.sqrt((inverse @ (by_post.T @ by_post) @ inverse)[0, 0])
    margin = stats.t.ppf(0.975, n - X.shape[1]) * error
    low, mean, high = (float(expit(beta[0] + m)) for m in (-margin, 0.0, margin))
    return {"mean": mean, "low": low, "high": high, "standard_deviation": deviation}


def mean_and_variance(values: Any, posts: Any) -> tuple[float, float]:
    """Mean of the values that are not NaN, and the variance of this mean; what belongs to a post stays together.

    Where all are 0, or all are 1, the values show no spread: the variance is then that of Agresti and Coull's estimate.
    """
    values, posts = np.asarray(values, float), np.asarray(posts)
    values, posts = values[~np.isnan(values)], posts[~np.isnan(values)]
    if len(values) == 0:
        return math.nan, math.nan
    _, codes = np.unique(posts, return_inverse=True)
    mean, n = float(values.mean()), codes.max() + 1
    if mean in (0.0, 1.0) and np.ptp(values) == 0:
        p = (n * mean + 2) / (n + 4)
        return mean, p * (1 - p) / (n + 4)
    sums = np.bincount(codes, values - mean)
    return mean, float((sums**2).sum() / len(values) ** 2 * n / (n - 1)) if n > 1 else math.nan


def corrected_win_rate(observed: tuple[float, float], agreement: tuple[float, float]) -> dict[str, float | None]:
    """The win rate that a judge without errors would give (Rogan and Gladen 1978), with a 95 % interval.

    A judge that decides right with probability a, whichever side is better, sees w = p a + (1 - p) (1 - a) wins where
    p are right. So p = (w + a - 1) / (2 a - 1), a ratio of two estimates; its interval is Fieller's (1954).

    Args:
        observed: win rate w and its variance.
        agreement: a and its variance, from other posts.

    Returns:
        `mean`, `low`, `high`, from 0 to 1; all None where the judge is not clearly better than a coin, or too few
        verdicts tell what it is.
    """
    unknown = {"mean": None, "low": None, "high": None}
    if any(number is None or not math.isfinite(number) for number in (*observed, *agreement)):
        return unknown
    (w, w_variance), (a, a_variance) = observed, agreement
    top, bottom = w + a - 1, 2 * a - 1
    top_variance, bottom_variance, covariance = w_variance + a_variance, 4 * a_variance, 2 * a_variance
    # all p with (top - p bottom)^2 <= Z^2 (variance of top - p bottom): a quadratic in p, an interval where A > 0
    A = bottom**2 - Z**2 * bottom_variance
    B = top * bottom - Z**2 * covariance
    C = top**2 - Z**2 * top_variance
    if not (A > 0 and bottom > 0):
        return unknown
    half = math.sqrt(max(0.0, B**2 - A * C))
    low, mean, high = (min(1.0, max(0.0, p)) for p in ((B - half) / A, top / bottom, (B + half) / A))
    return {"mean": mean, "low": low, "high": high}


def show(value: dict[str, float | None]) -> str:
    """`0.723 [0.690, 0.755]`"""
    if value["mean"] is None or value["low"] is None:
        return "-" if value["mean"] is None else f"{value['mean']:.3f} [-]"
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
