"""How far a judge can be trusted: its agreement with people (or gold) on comparisons, and win rates corrected for it.

Reads raw comparisons in OpenAI's schema, those of `tldr_dataset.py`. Used by `judge.py --calibrate`.
"""

import math
from typing import Any

import numpy as np
import pandas
from scipy import stats

from summarize_from_feedback_details.common.arguments import refuse
from summarize_from_feedback_details.common.check_inputs import find_rows
from summarize_from_feedback_details.tldr_dataset import (
    COMPARISON_COLUMNS,
    TldrHParams,
    cnndm_defaults,
    split_off_cnndm,
)

Z = float(stats.norm.ppf(0.975))


def read_pairs(path: str, split: str, num_rows: int | None, seed: int) -> pandas.DataFrame:
    """Comparisons as pairs for a judge; which of the two summaries is the response is drawn for each.

    Returns:
        One row a comparison: query, response, reference; truth: 1 where people chose the response, else 0; strength:
        confidence in that choice, 1 (nearly equal) to 4 (sure), NaN where it is not known.

    Raises:
        SystemExit: code 2, where the comparisons cannot be read.
    """
    raw = find_rows("calibrate", path, None)
    if split not in raw:
        refuse("calibrate", f"'{path}' without a split '{split}' (it has {', '.join(raw)})", "that --split in it")
    missing = [name for name in COMPARISON_COLUMNS if name not in raw[split].column_names]
    if missing:
        found = f"no column {', '.join(missing)} in the split '{split}' of '{path}'"
        refuse("calibrate", found, "raw comparisons in OpenAI's schema")
    found = split_off_cnndm(raw)
    if split not in found:
        refuse("calibrate", f"'{path}' without comparisons of posts in its split '{split}'", "some besides CNN/DM")
    form = (cnndm_defaults() if split == "validation_cnndm" else TldrHParams()).format_str
    rows = found[split].select(range(min(len(found[split]), num_rows or len(found[split]))))
    swapped = np.random.default_rng(seed).random(len(rows)) < 0.5
    pairs = []
    for row, swap in zip(rows, swapped):
        texts = [summary["text"] for summary in row["summaries"]]
        confidence = (row["extra"] or {}).get("confidence")
        pairs.append({
            "query": form.format(**row["info"]), "response": texts[int(swap)], "reference": texts[1 - int(swap)],
            "truth": float(row["choice"] == int(swap)),
            "strength": math.nan if confidence is None else float(abs(confidence - 5)),
        })  # fmt: skip
    return pandas.DataFrame(pairs)


def agreements(outcomes: Any, truth: Any) -> np.ndarray:
    """1 where the judge decides as the truth, 0 where against it, 0.5 at a tie, NaN where it gave no verdict: [N]."""
    outcomes, truth = np.asarray(outcomes, float), np.asarray(truth, float)
    return np.where(truth == 1, outcomes, 1 - outcomes)


def mean_and_variance(values: Any, posts: Any) -> tuple[float, float]:
    """Mean of the values that are not NaN, and the variance of this mean; what belongs to a post stays together."""
    values, posts = np.asarray(values, float), np.asarray(posts)
    values, posts = values[~np.isnan(values)], posts[~np.isnan(values)]
    if len(values) == 0:
        return math.nan, math.nan
    _, codes = np.unique(posts, return_inverse=True)
    mean, n = float(values.mean()), codes.max() + 1
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
        `mean`, `low`, `high`, from 0 to 1; all None where the judge is not clearly better than a coin.
    """
    (w, w_variance), (a, a_variance) = observed, agreement
    top, bottom = w + a - 1, 2 * a - 1
    top_variance, bottom_variance, covariance = w_variance + a_variance, 4 * a_variance, 2 * a_variance
    # all p with (top - p bottom)^2 <= Z^2 (variance of top - p bottom): a quadratic in p, an interval where A > 0
    A = bottom**2 - Z**2 * bottom_variance
    B = top * bottom - Z**2 * covariance
    C = top**2 - Z**2 * top_variance
    if not (A > 0 and bottom > 0):
        return {"mean": None, "low": None, "high": None}
    half = math.sqrt(max(0.0, B**2 - A * C))
    low, mean, high = (min(1.0, max(0.0, p)) for p in ((B - half) / A, top / bottom, (B + half) / A))
    return {"mean": mean, "low": low, "high": high}
