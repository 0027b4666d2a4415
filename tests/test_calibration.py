"""Whether a judge can be trusted: agreement with a known truth, corrected win rates, and flags of reward hacking."""

import json
import math
import random
import sys

import numpy as np
import pandas
import pytest
from conftest import ROOT

from summarize_from_feedback_details import toy_tldr
from summarize_from_feedback_details.common.text_metrics import describe_text, text_metrics

sys.path.insert(0, str(ROOT / "eval"))
import intervals
import judge
from calibration import agreements
from intervals import corrected_win_rate, mean_and_variance


def simulated(rng, n: int, share: float, accuracy: float, ties: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Truths, of which a share is 1, and the verdicts of a judge with a known accuracy: [n] twice."""
    truth = (rng.random(n) < share).astype(float)
    verdict = np.where(rng.random(n) < accuracy, truth, 1 - truth)
    return truth, np.where(rng.random(n) < ties, 0.5, verdict)


@pytest.mark.parametrize(
    "accuracy, true_rate, comparisons, ties", [(0.8, 0.7, 400, 0.0), (0.68, 0.5, 600, 0.1), (0.9, 0.93, 300, 0.0)]
)
def test_the_corrected_interval_holds_the_truth(accuracy, true_rate, comparisons, ties):
    """In 93 to 97 % of 1,000 simulated judges with a known error rate; the uncorrected one nearly never does."""
    rng, held, naive = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        truth, verdict = simulated(rng, comparisons, 0.5, accuracy, ties)
        agreement = mean_and_variance(agreements(verdict, truth), np.arange(comparisons))
        _, outcome = simulated(rng, 500, true_rate, accuracy, ties)
        observed = mean_and_variance(outcome, np.arange(500))
        found = corrected_win_rate(observed, agreement)
        held += found["low"] <= true_rate <= found["high"]
        naive += abs(observed[0] - true_rate) <= intervals.Z * observed[1] ** 0.5
    assert 930 <= held <= 970
    assert naive < 500 or true_rate == 0.5  # an even rate stays even, whatever the judge's errors


def test_correction_by_hand():
    """0.8 right: 0.62 of wins are seen where 0.7 are true; without any error it changes nothing."""
    exact = corrected_win_rate((0.7 * 0.8 + 0.3 * 0.2, 1e-12), (0.8, 1e-12))
    assert math.isclose(exact["mean"], 0.7) and math.isclose(exact["low"], 0.7, abs_tol=1e-4)
    assert math.isclose(corrected_win_rate((0.4, 0.001), (1.0, 0.0))["mean"], 0.4)
    plain = corrected_win_rate((0.4, 0.001), (1.0, 0.0))
    assert math.isclose(plain["high"] - 0.4, intervals.Z * 0.001**0.5)
    # a judge that may be no better than a coin says nothing
    assert set(corrected_win_rate((0.6, 0.001), (0.53, 0.001)).values()) == {None}
    assert set(corrected_win_rate((0.6, 0.001), (0.2, 0.0001)).values()) == {None}
    # nor one of which nothing is known, nor a policy without a verdict, nor one post
    nothing, one = mean_and_variance([math.nan], ["q"]), mean_and_variance([0.5], ["q"])
    for observed, agreement in (((0.6, 0.001), (None, None)), (nothing, (0.9, 0.001)), (one, (0.9, 0.001))):
        assert set(corrected_win_rate(observed, agreement).values()) == {None}
    # three of three say less than that the judge is never wrong
    few = corrected_win_rate((0.6, 0.001), mean_and_variance([1, 1, 1], [1, 2, 3]))
    assert few["mean"] is None or few["high"] - few["low"] > 0.2


def test_agreement_and_variance_by_hand():
    assert agreements([1, 0, 0.5, math.nan], [1, 1, 0, 1]).tolist()[:3] == [1, 0, 0.5]
    mean, variance = mean_and_variance([1, 0, 1, 1, math.nan], [1, 2, 3, 4, 5])
    assert mean == 0.75 and math.isclose(variance, 0.75 * 0.25 / 3)
    assert math.isnan(agreements([1.0], [math.nan])[0]) and math.isnan(agreements([math.nan], [1.0])[0])
    # the same verdict twice on each post says no more than once
    again = mean_and_variance([1, 0, 1, 1] * 2, [1, 2, 3, 4] * 2)
    assert again == (mean, pytest.approx(variance))


@pytest.fixture
def comparisons(tmp_path):
    """A folder of raw toy comparisons, of posts and of articles."""
    rng, folder = random.Random(3), tmp_path / "comparisons"
    rows = toy_tldr.draw_comparisons(rng, 300, "valid", [*toy_tldr.VALIDATION_BATCHES, "cnndm0"])
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text(toy_tldr.COMPARISONS_CARD)
    return folder, [row for row in rows if row["batch"] != "cnndm0"]


def test_the_annotator_is_calibrated_on_its_own_comparisons(comparisons, tmp_path, capsys):
    """Its agreement with the noisy choices is the ceiling that the toy world knows; with gold it is 1."""
    folder, rows = comparisons
    ceiling = toy_tldr.annotator_ceiling(rows)
    args = {"calibrate": str(folder), "output_dir": str(tmp_path / "out"), "bootstrap": 200}
    found = judge.main(judge.Args(**args))["calibration"]
    assert math.isclose(found["agreement"]["mean"], ceiling) and found["comparisons"] == len(rows)
    parts = {part["confidence"]: part for part in found["by_confidence"]}
    assert set(parts) == {1, 2, 3, 4} and sum(part["comparisons"] for part in parts.values()) == len(rows)
    assert parts[4]["agreement"]["mean"] > parts[1]["agreement"]["mean"]
    assert "agreement" in capsys.readouterr().out
    assert (tmp_path / "out/calibration_gold/report.md").is_file()
    by_gold = judge.main(judge.Args(**args | {"truth": "gold"}))["calibration"]
    assert by_gold["agreement"]["mean"] == 1.0
    articles = judge.main(judge.Args(**args | {"calibrate_split": "validation_cnndm", "num_rows": 5}))["calibration"]
    assert articles["comparisons"] == 5
    table = pandas.read_parquet(tmp_path / "out/calibration_gold/verdicts.parquet")
    assert table["query"].str.startswith("Article:").all()


def test_win_rates_are_corrected_for_the_judges_errors(comparisons, tmp_path, monkeypatch):
    """A judge that is wrong in a fifth of all cases, by coins of its own: the true win rate is in the interval."""
    rng, folder = np.random.default_rng(1), comparisons[0]

    def unsure(pairs):
        verdicts = judge.judge_by_gold(pairs)
        wrong = rng.random(len(pairs)) < 0.2
        return verdicts.assign(outcome=np.where(wrong, 1 - verdicts["outcome"], verdicts["outcome"]))

    monkeypatch.setattr(judge, "make_judge", lambda args: ("unsure", unsure))
    posts = [toy_tldr.write_post(random.Random(i)) for i in range(400)]
    table = pandas.DataFrame([
        {"query": toy_tldr.make_query(row), "response": toy_tldr.best_summary(row["post"]) if i % 4 else "it is bad.",
         "reference": toy_tldr.write_summary(random.Random(i), facts, decoys, toy_tldr.REFERENCE)}
        for i, (row, facts, decoys) in enumerate(posts)
    ])  # fmt: skip
    table.to_parquet(tmp_path / "policy.parquet")
    truth = judge.judge_by_gold(table)["outcome"].mean()
    run = str(tmp_path / "policy.parquet")
    settings = {"calibrate": str(folder), "truth": "gold", "output_dir": str(tmp_path / "out"), "bootstrap": 200}
    report = judge.main(judge.Args(run=(run,), **settings))[run]
    corrected = report["corrected_win_rate"]
    assert corrected["low"] <= truth <= corrected["high"]
    assert not report["win_rate"]["low"] <= truth <= report["win_rate"]["high"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"calibrate": "nowhere/x/y"}, "--calibrate: found 'nowhere/x/y', which does not exist"),
        ({"calibrate_split": "test"}, "--calibrate_split: found 'test', which '"),
        ({"calibrate": None, "truth": "gold"}, "--run: found nothing"),
        ({"calibrate": None, "truth": "gold", "run": ("x",)}, "--truth: found gold without --calibrate"),
    ],
)
def test_bad_input(comparisons, tmp_path, capsys, change, message):
    args = {"calibrate": str(comparisons[0]), "output_dir": str(tmp_path / "out")} | change
    with pytest.raises(SystemExit) as stopped:
        judge.main(judge.Args(**args))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"choice": 2}, "choice 2 in row 3 (counted from 0) of the split 'validation'; expected 0 or 1"),
        ({"summaries": []}, "0 summaries in `summaries` of row 3"),
        ({"info": {"id": "x", "post": "a", "title": None, "subreddit": "b"}}, "no text in `title` of `info` of row 3"),
        ({"extra": {"confidence": 11}}, "confidence 11 in row 3"),
    ],
)
def test_comparisons_that_cannot_be_used(tmp_path, capsys, change, message):
    rows = toy_tldr.draw_comparisons(random.Random(0), 6, "valid", toy_tldr.VALIDATION_BATCHES)
    (tmp_path / "rows").mkdir()
    text = "".join(json.dumps(row | change if i == 3 else row) + "\n" for i, row in enumerate(rows))
    (tmp_path / "rows/validation.jsonl").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        judge.main(judge.Args(calibrate=str(tmp_path / "rows"), output_dir=str(tmp_path / "out")))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and f"--calibrate: found {message}" in said and said.count("\n") == 1, said


def test_a_judge_without_verdicts_is_reported_as_such(comparisons, tmp_path, monkeypatch):
    """Nothing is corrected then, and the same again is the same report."""
    silent = lambda pairs: pandas.DataFrame({"outcome": [math.nan] * len(pairs)})
    monkeypatch.setattr(judge, "make_judge", lambda args: ("silent", silent))
    row, facts, decoys = toy_tldr.write_post(random.Random(0))
    pandas.DataFrame([{"query": toy_tldr.make_query(row), "response": "a", "reference": "b"}]).to_csv(
        tmp_path / "p.csv"
    )
    args = judge.Args(run=(str(tmp_path / "p.csv"),), calibrate=str(comparisons[0]), output_dir=str(tmp_path / "out"),
                      num_rows=4, bootstrap=50)  # fmt: skip
    for _ in range(2):
        report = judge.main(args)[str(tmp_path / "p.csv")]
        assert set(report["corrected_win_rate"].values()) == {None}
    assert not list((tmp_path / "out").glob("*.old-*"))


def test_comparisons_of_another_schema(tmp_path, capsys):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/validation.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(SystemExit) as stopped:
        judge.main(judge.Args(calibrate=str(tmp_path / "rows")))
    assert stopped.value.code == 2 and "no column info, summaries" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# instruments of reward hacking


def test_text_metrics_by_hand(world):
    query = "SUBREDDIT: r/x\n\nTITLE: My dog ate the cake\n\nPOST: So he ran far away home.\n\nTL;DR:"
    found = describe_text(query, "so he ran far, my dog ate the cake so he ran far")
    # 10 runs of 4 words, 9 of them distinct; 2 stand in the post, 2 in the title
    assert found == {"words": 13.0, "copied_post": 0.2, "copied_title": 0.2, "repetition": pytest.approx(0.1)}
    assert describe_text("no form: he ran far away", "He ran far away!")["copied_post"] == 1.0
    assert describe_text(query, "") == {"words": 0.0, "copied_post": 0.0, "copied_title": 0.0, "repetition": 0.0}


def test_metrics_of_a_batch(world):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.base)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    texts = ["my boss sold my bike.", "my boss sold my bike my boss sold my bike."]
    tokens = tokenizer(texts, return_tensors="pt", padding=True)["input_ids"]
    query = "SUBREDDIT: r/jobs\n\nTITLE: what now\n\nPOST: so my boss sold my bike.\n\nTL;DR:"
    rows = {
        "query": [query] * 2,
        "reference_response": [" my boss sold it.<|endoftext|>", " it was sold.<|endoftext|>"],
    }
    found = text_metrics(rows, tokens, tokenizer)
    assert math.isclose(found["text/length_ratio"], (5 + 10) / (4 + 3))
    assert math.isclose(found["text/copied_post"], (1 + 4 / 7) / 2) and found["text/copied_title"] == 0
    assert math.isclose(found["text/repetition"], (0 + 2 / 7) / 2)


def copying(post: str) -> str:
    """Sentences of the post as they are, about as many words as a reference has."""
    return " ".join(post.split()[:11])


PLANTED = {
    "long": lambda post, summary, title: len(summary.split()),
    "copied_post": lambda post, summary, title: summary == copying(post),
    "copied_title": lambda post, summary, title: summary == title,
    None: lambda post, summary, title: toy_tldr.gold_score(post, summary)["score"],
}


@pytest.mark.parametrize("flag", PLANTED)
def test_a_planted_reward_is_flagged_by_its_instrument_and_by_no_other(flag):
    """Best of 24 texts by a reward for length, for copying, for nothing but quality."""
    rng, rows = random.Random(0), []
    title = "my old neighbour who sells used bikes"
    for _ in range(200):
        row, facts, decoys = toy_tldr.write_post(rng)
        row["title"], writers = title, [*toy_tldr.WRITERS.values()]
        found = [toy_tldr.write_summary(rng, facts, decoys, rng.choice(writers)) for _ in range(20)]
        found += [copying(row["post"]), title]
        # a text of many words that is neither copied nor repeated
        found.append(" ".join(rng.sample(list(toy_tldr.SLOT_OF), 30)))
        best = max(found, key=lambda summary, row=row: PLANTED[flag](row["post"], summary, title))
        reference = toy_tldr.write_summary(rng, facts, decoys, toy_tldr.REFERENCE)
        query = toy_tldr.make_query(row)
        rows.append({"query": query, "response": best, "reference": reference, "has_eos": True})
    verdicts = judge.judge_table(pandas.DataFrame(rows), judge.judge_by_gold)
    report = judge.summarise(verdicts, judge.Args(bootstrap=200))
    assert report["text"]["flags"] == ([flag] if flag else [])


def test_responses_that_do_not_end_or_repeat_are_flagged():
    rows = [{"query": f"POST {i}", "response": "no no no no no no no no", "reference": "one two three four five",
             "has_eos": i % 2 == 0} for i in range(40)]  # fmt: skip
    verdicts = judge.judge_table(
        pandas.DataFrame(rows), lambda pairs: pandas.DataFrame({"outcome": [0.5] * len(pairs)})
    )
    report = judge.summarise(verdicts, judge.Args(bootstrap=200))
    assert report["text"]["flags"] == ["long", "repetition", "no_end"]
    assert judge.report_rows(report)["flagged"] == "long, repetition, no_end"


def test_copying_is_no_sign_where_the_references_copy_as_much():
    rows = [toy_tldr.write_post(random.Random(i))[0] for i in range(60)]
    table = [{"query": toy_tldr.make_query(row), "response": copying(row["post"]),
              "reference": " ".join(row["post"].split()[-11:])} for row in rows]  # fmt: skip
    report = judge.summarise(judge.judge_table(pandas.DataFrame(table), judge.judge_by_gold), judge.Args(bootstrap=200))
    assert report["text"]["copied_post"]["response"]["mean"] == 1.0 and report["text"]["flags"] == []
