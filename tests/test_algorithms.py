"""The comparison of algorithms and the study of over-optimisation: numbers by hand, on runs made up here."""

import json
import math

import algorithms
import flip_labels
import numpy as np
import overoptimization
import pandas
import pytest
from conftest import ROOT

from summarize_from_feedback_details.toy_tldr import draw_sft_rows, make_query

SECONDS = {"time/rloo/rollout_seconds": 2.0, "time/rloo/training_seconds": 1.0}


@pytest.fixture
def posts():
    import random

    rows = draw_sft_rows(random.Random(3), 4, "x")
    return [(make_query(row), row["summary"]) for row in rows]


def write_judged(folder, scores, posts):
    """A report of the gold judge: what `eval/judge.py` writes, as far as it is read."""
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({"mean_score": {"mean": float(np.mean(scores))}}))
    columns = {"query": [query for query, _ in posts], "score": scores, "outcome": [1.0, 0.5, 0.0, 1.0]}
    pandas.DataFrame(columns | {"response_words": [8, 9, 10, 9], "invented": [0.0, 1.0, 0.0, 0.0]}).to_parquet(
        folder / "verdicts.parquet"
    )


def write_run(runs, name, stage, posts, args=None):
    path = runs / name
    (path / "tables").mkdir(parents=True)
    summary = {"stage": stage, "state": "finished", "wall_clock_seconds": 30.0, "metrics": {}}
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "args.json").write_text(json.dumps({"seed": 1, "lr": 3e-4} | (args or {})))
    return path


def write_rloo(runs, posts, name="w_rloo", golds=(2.6, 3.0, 2.9), kls=(0.0, 1.0, 4.0, 9.0)):
    """Four updates, evaluated after the second, the third and the last one."""
    path = write_run(runs, name, "rloo", posts)
    lines = [{"update": u + 1, "objective/kl": kl, "memory/rloo/peak_gb": 0.5} | SECONDS for u, kl in enumerate(kls)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"update": 5}]))
    for (update, folder), gold in zip(((2, "gold/update_2"), (3, "gold/update_3"), (None, "gold")), golds):
        write_judged(path / "judge" / folder, [gold - 0.1, gold, gold + 0.1, gold], posts) if update else None
    (path / "judge/gold").mkdir(exist_ok=True)
    last = [golds[2] - 0.1, golds[2] - 0.2, golds[2] + 0.1, golds[2] + 0.2]
    write_last = path / "judge/last"
    write_judged(write_last, last, posts)
    for file in ("report.json", "verdicts.parquet"):
        (write_last / file).replace(path / "judge/gold" / file)
    write_last.rmdir()
    for table, score in (("validation_2", 0.5), ("validation_3", 1.0), ("validation", 1.5)):
        pandas.DataFrame({"score": [score] * 4}).to_parquet(path / f"tables/{table}.parquet")
    return path


def write_best_of_n(runs, posts, name="w_best"):
    """Two samples of each post: the reference, which the proxy prefers on three of four, and an empty text."""
    path = write_run(runs, name, "best_of_n", posts, {"lr": None})
    rows = [(row, sample, posts[row][1] if sample == 0 else "", float(sample == 0) if row else float(sample))
            for row in range(4) for sample in range(2)]  # fmt: skip
    samples = pandas.DataFrame(rows, columns=["row", "sample", "response", "score"])
    samples["penalised"] = samples["score"]
    samples.to_parquet(path / "tables/samples.parquet")
    pandas.DataFrame({"query": [query for query, _ in posts], "score": 1.0}).to_parquet(
        path / "tables/validation.parquet"
    )
    pandas.DataFrame({"n": [1, 2], "score": [0.5, 1.0], "kl": [0.0, math.log(2) - 0.5]}).to_parquet(
        path / "tables/best_of_n.parquet"
    )
    write_judged(path / "judge/gold", [1.0, 2.0, 3.0, 2.0], posts)
    return path


def test_points_of_a_trained_run(tmp_path, posts):
    """KL of the update after the evaluated one, whose rollouts are of that policy; seconds without evaluation."""
    found = algorithms.read_trained(write_rloo(tmp_path, posts))
    assert [point[:2] for point in found["points"]] == [(2, 4.0), (3, 9.0), (4, 9.0)]
    assert [point[2] for point in found["points"]] == pytest.approx([2.6, 3.0, 2.9])
    assert [point[3] for point in found["points"]] == [6.0, 9.0, 12.0] and found["seconds"] == 12.0
    lines = [{"update": 1, "time/dpo/samples_per_second": 8.0, "train/dpo/episode": 64},
             {"update": 2, "time/dpo/samples_per_second": 4.0, "train/dpo/episode": 96}]  # fmt: skip
    assert algorithms.training_seconds(lines) == {1: 8.0, 2: 16.0}


def test_gold_scores_of_best_of_n(tmp_path, posts):
    """Best of 2 takes what the proxy prefers: on one post that is the empty text."""
    found = algorithms.read_best_of_n(write_best_of_n(tmp_path, posts))
    gold = [algorithms.gold_score(query.partition("POST: ")[2].rpartition("\n\nTL;DR:")[0], text)["score"]
            for query, text in posts]  # fmt: skip
    empty = algorithms.gold_score("x", "")["score"]
    assert [point[2] for point in found["points"]] == pytest.approx(
        [(np.mean(gold) + empty) / 2, (sum(gold[1:]) + empty) / 4]
    )
    assert found["sft"][posts[1][0]] == pytest.approx((gold[1] + empty) / 2)


def test_the_table(tmp_path, posts, capsys):
    write_rloo(tmp_path / "runs", posts)
    write_best_of_n(tmp_path / "runs", posts)
    document = tmp_path / "page.md"
    table = f"{tmp_path}/images/algorithms.md"
    document.write_text(f"before\n<!-- {table} -->\nold\n<!-- /{table} -->\nafter\n")
    args = algorithms.Args(("w_rloo", "w_best"), str(tmp_path / "runs"), str(tmp_path / "images"), "algorithms",
                           (str(document),))  # fmt: skip
    found = algorithms.main(args)
    row = found.loc["RLOO"]
    assert row["gold score"] == "2.90" and row["KL"] == "9.00" and row["proxy score"] == "1.50"
    assert row["win rate"].startswith("0.625 (") and row["invented"] == "0.25" and row["words"] == "9.0"
    assert row["seconds"] == "12" and row["s to 2.8"] == "9" and row["GB"] == "0.50"
    start = algorithms.read_best_of_n(tmp_path / "runs/w_best")["sft"]
    difference = np.array([2.8, 2.7, 3.0, 3.1]) - [start[query] for query, _ in posts]
    assert float(row["gain / s.e."]) == pytest.approx(difference.mean() / (difference.std(ddof=1) / 2), abs=0.5)
    text = document.read_text()
    assert "| RLOO |" in text and "\nold\n" not in text and text.endswith("after\n")
    assert (tmp_path / "images/algorithms.png").stat().st_size > 10_000
    with pytest.raises(SystemExit) as stopped:
        algorithms.main(algorithms.Args(("nothing",), str(tmp_path / "runs"), str(tmp_path / "images")))
    assert stopped.value.code == 2 and "error: --runs: found 'nothing', which cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["best of n", "RLOO"])
def test_the_fit_finds_what_made_the_points(form):
    d = np.linspace(0.1, 4, 12)
    gained = d * (1.5 - 0.3 * (d if form == "best of n" else np.log(d)))
    points = [(0.0, 2.0, 0.0), *zip(d, 2.0 + gained, d)]
    assert overoptimization.fit(points, form) == pytest.approx((1.5, 0.3))


def test_below_the_peak_and_the_study_s_table(tmp_path, posts):
    """The gold score falls from 3.0 to 2.9 while the proxy's rises from 0.5 to 1.5."""
    runs, name = tmp_path / "runs", "toy_proxy_500_0.3"
    for seed in (1, 2):
        write_run(runs, f"s{seed}_{name}", "reward", posts)
        summary = runs / f"s{seed}_{name}/summary.json"
        summary.write_text(
            summary.read_text().replace('"metrics": {}', '"metrics": {"eval/rm/validation/accuracy": 0.6}')
        )
        path = write_rloo(runs, posts, f"s{seed}_{name}_rloo")
        (path / "args.json").write_text(json.dumps({"seed": seed, "lr": 3e-4}))
        path = write_best_of_n(runs, posts, f"s{seed}_{name}_best_of_n")
        (path / "args.json").write_text(json.dumps({"seed": seed}))
    points = overoptimization.read_one(runs / f"s1_{name}_rloo")
    # the best on the even posts is update 3; on the two odd ones it is 0.3 above the last one, and 0.1 below it
    assert points["below"] == pytest.approx((0.1, 0.2))
    assert [point[2] for point in points["points"]] == [0.5, 1.0, 1.5]
    names = tuple(f"s{seed}_{name}_{what}" for seed in (1, 2) for what in ("rloo", "best_of_n"))
    table = overoptimization.main(overoptimization.Args(names, str(runs), str(tmp_path / "images"), ()))
    row = table.loc["RLOO, 500 pairs, 30% wrong"]
    assert (
        row["gold peak"] == "3.00 3.00" and row["gold at the end"] == "2.90 2.90" and row["proxy gain"] == "1.00 1.00"
    )
    assert row["KL"] == "9.0 9.0" and row["proxy accuracy"] == "0.60 0.60" and "±" in row["alpha"]
    assert (tmp_path / "images/overoptimization.png").stat().st_size > 10_000


def test_flipped_labels(world, workdir, capsys):
    """A quarter of the first 40 pairs, chosen and rejected in all columns; the validation splits stay."""
    from datasets import load_dataset

    args = flip_labels.Args(world.pairs, "flipped", pairs=40, flipped=0.25)
    flip_labels.main(args)
    before, after = load_dataset(world.pairs), load_dataset("flipped")
    rows = list(zip(before["train"].select(range(40)), after["train"]))
    exchanged = [a["chosen"] != b["chosen"] for a, b in rows]
    assert len(after["train"]) == 40 and sum(exchanged) == 10
    for flipped, (a, b) in zip(exchanged, rows):
        for name in ("query_{}_token", "{}", "query_{}_token_len", "{}_policy"):
            theirs, ours = (a[name.format("rejected" if flipped else "chosen")], b[name.format("chosen")])
            assert theirs == ours
        assert a["query"] == b["query"]
    assert before["validation"].to_dict() == after["validation"].to_dict()
    more = flip_labels.Args(world.pairs, "more", pairs=1000)
    for wrong, message in ((args, "--output_dir: found 'flipped', which is there already"),
                           (more, "--pairs: found 1000; expected at most 200"),
                           (flip_labels.Args(world.sft_rows, "x"), "--label_dataset: found ")):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            flip_labels.main(wrong)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.startswith(f"error: {message}") and said.count("\n") == 1
    assert not (workdir / "x").exists()
    assert (ROOT / "eval/algorithms.sh").exists()
