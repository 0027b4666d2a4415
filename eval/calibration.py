"""How far a judge can be trusted: its agreement with people (or gold) on comparisons, and win rates corrected for it.

Reads raw comparisons in OpenAI's schema, those of `tldr_dataset.py`. Used by `judge.py --calibrate`.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas
from intervals import mean_and_variance, mean_interval, show

from summarize_from_feedback_details.common.arguments import refuse


def read_pairs(path: str, split: str, num_rows: int | None, seed: int) -> pandas.DataFrame:
    """Comparisons as pairs for a judge; which of the two summaries is the response is drawn for each.

    Returns:
        One row a comparison: query, response, reference; truth: 1 where people chose the response, else 0; strength:
        confidence in that choice, 0 (equal) to 4 (sure), NaN where it is not known.

    Raises:
        SystemExit: code 2, where the comparisons cannot be read.
    """
    from summarize_from_feedback_details.common.check_inputs import find_rows
    from summarize_from_feedback_details.tldr_dataset import (
        COMPARISON_COLUMNS,
        TldrHParams,
        check_comparison,
        cnndm_defaults,
        split_off_cnndm,
    )

    raw = find_rows("calibrate", path, None)
    for name, rows in raw.items():
        missing = [column for column in COMPARISON_COLUMNS if column not in rows.column_names]
        if missing:
            found = f"no column {', '.join(missing)} in the split '{name}' of '{path}'"
            refuse("calibrate", found, "raw comparisons in OpenAI's schema")
    raw = split_off_cnndm(raw)
    if split not in raw:
        refuse("calibrate_split", f"'{split}', which '{path}' does not have", f"one of {', '.join(raw)}")
    hparams = cnndm_defaults() if split == "validation_cnndm" else TldrHParams()
    rows = raw[split].select(range(min(len(raw[split]), num_rows or len(raw[split]))))
    swapped = np.random.default_rng(seed).random(len(rows)) < 0.5
    pairs = []
    for i, (row, swap) in enumerate(zip(rows, swapped)):
        check_comparison("calibrate", f"row {i} (counted from 0) of the split '{split}'", row, hparams)
        texts = [summary["text"] for summary in row["summaries"]]
        confidence = (row["extra"] or {}).get("confidence")
        pairs.append({
            "query": hparams.format_str.format(**row["info"]),
            "response": texts[int(swap)], "reference": texts[1 - int(swap)],
            "truth": float(row["choice"] == int(swap)),
            "strength": math.nan if confidence is None else float(abs(confidence - 5)),
        })  # fmt: skip
    return pandas.DataFrame(pairs)


def agreements(outcomes: Any, truth: Any) -> np.ndarray:
    """1 where the judge decides as the truth, 0 where against it, 0.5 at its tie, NaN without verdict or truth: [N]."""
    outcomes, truth = np.asarray(outcomes, float), np.asarray(truth, float)
    return np.where(np.isnan(truth), math.nan, np.where(truth == 1, outcomes, 1 - outcomes))


def position_bias(verdicts: pandas.DataFrame, interval: Callable) -> dict[str, Any]:
    """Of a server's answers that can be read: the share that prefers the summary shown first."""
    posts = np.tile(verdicts["query"], 2)
    answers = np.concatenate([verdicts["first_answer"], verdicts["second_answer"]])
    first = np.array([math.nan if pandas.isna(a) else float(a == "A") for a in answers])
    unreadable = int(np.isnan(first).sum()) - 2 * int(verdicts["same"].sum())
    return {"first_position_preferred": interval(first, posts), "unreadable_answers": unreadable}


def summarise_calibration(verdicts: pandas.DataFrame, bootstrap: int, seed: int) -> dict[str, Any]:
    """A judge's agreement with the truth, in all and by the confidence in it."""
    interval = lambda rows: mean_interval(rows["agreement"], rows["query"], bootstrap, seed, shares=True)
    _, variance = mean_and_variance(verdicts["agreement"], verdicts["query"])
    report = {
        "comparisons": len(verdicts),
        "no_verdict": int(verdicts["agreement"].isna().sum()),
        "agreement": interval(verdicts),
        "agreement_variance": variance if math.isfinite(variance) else None,
        "by_confidence": [
            {"confidence": int(strength), "comparisons": len(rows), "agreement": interval(rows)}
            for strength, rows in verdicts.groupby("strength")
        ],
    }
    if "first_answer" in verdicts:
        report |= position_bias(verdicts, lambda v, p: mean_interval(v, p, bootstrap, seed, shares=True))
    return report


def calibration_rows(report: dict[str, Any]) -> dict[str, str]:
    """What is shown of a calibration: label -> text."""
    rows = {"comparisons": str(report["comparisons"]), "without a verdict": str(report["no_verdict"])}
    rows["agreement"] = show(report["agreement"])
    for part in report["by_confidence"]:
        label = f"where the confidence is {part['confidence']} of 4"
        rows[label] = f"{show(part['agreement'])} ({part['comparisons']})"
    if "first_position_preferred" in report:
        rows["first one preferred"] = show(report["first_position_preferred"])
    return rows
