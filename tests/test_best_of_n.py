"""Best of n: the estimate against all choices, samples that belong to their query, stops, processes, bad input."""

import json
import os
import shutil
import signal
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from conftest import launch
from datasets import load_dataset
from safetensors.torch import load_file, save_file

from summarize_from_feedback_details import best_of_n
from summarize_from_feedback_details.best_of_n import expected_best, kl_of_best
from summarize_from_feedback_details.common.check_inputs import find_tokenizer
from summarize_from_feedback_details.common.reward_models import load_reward_model, read_rewards
from summarize_from_feedback_details.common.run_folder import REQUEUE_ME
from summarize_from_feedback_details.common.sampling import strip_pads
from visualize_tokens import latest_run


def test_the_estimate_is_the_mean_over_all_choices():
    rng = np.random.default_rng(3)
    scores, values = rng.normal(size=(2, 3, 6))
    for n in range(1, 7):
        for row in range(3):
            choices = list(combinations(range(6), n))
            best = [max(choice, key=lambda i: scores[row, i]) for choice in choices]
            assert expected_best(scores, scores)[row, n - 1] == pytest.approx(scores[row, best].mean())
            assert expected_best(scores, values)[row, n - 1] == pytest.approx(values[row, best].mean())
    # many samples: no overflow, and the best of all is the largest
    many = rng.normal(size=(1, 1000))
    assert expected_best(many, many)[0, -1] == pytest.approx(many.max())
    # 4 exponential numbers: the largest is 1 + 1/2 + 1/3 + 1/4 in the mean
    draws = rng.exponential(size=(4000, 8))
    assert expected_best(draws, draws).mean(0)[3] == pytest.approx(1 + 1 / 2 + 1 / 3 + 1 / 4, abs=0.05)


def test_the_kl_is_that_of_the_density():
    """Best of n has the density n F^(n-1) p: KL = the integral of n u^(n-1) log(n u^(n-1)) over u from 0 to 1."""
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (1, 2, 5, 64):
        density = n * u ** (n - 1)
        integral = np.mean(density * np.log(np.maximum(density, 1e-300)))
        assert kl_of_best(np.array([n]))[0] == pytest.approx(integral, abs=1e-4)


def test_samples_and_scores(world, workdir, capsys):
    """Each sample is scored as the reward model scores its text; the best one is in the table for the judge."""
    metrics = best_of_n.main(world.best_of_n_args("run"))
    samples, best = (pandas.read_parquet(f"runs/run/tables/{name}.parquet") for name in ("samples", "validation"))
    assert len(samples) == 80 and len(best) == 20 and samples["response"].nunique() > 40
    tokenizer, model = find_tokenizer("x", world.base), load_reward_model(world.reward)
    rows = load_dataset(world.sft_rows)["validation"].select(range(20))
    compared = 0
    for sample in samples[samples["has_eos"]].itertuples():
        response = [*tokenizer.encode(f" {sample.response}"), tokenizer.eos_token_id]
        if len(response) == sample.response_length:  # else the policy had spelt it in another way
            query = strip_pads(rows[sample.row]["query_token"], tokenizer.pad_token_id)
            with torch.no_grad():
                assert float(read_rewards(model, [query + response])) == pytest.approx(sample.score, abs=1e-4)
            compared += 1
    assert compared > 20
    assert (samples[~samples["has_eos"]]["penalised"] == -1).all() and not samples["has_eos"].all()
    assert (samples["penalised"] == samples["score"])[samples["has_eos"]].all()
    scores = samples["penalised"].to_numpy().reshape(20, 4)
    chosen = samples.loc[samples.groupby("row")["penalised"].idxmax()]
    assert (
        best["response"].tolist() == chosen["response"].tolist() and best["score"].tolist() == chosen["score"].tolist()
    )
    assert best["query"].tolist() == rows["query"] and best["reference"].str.len().gt(0).all()
    curve = pandas.read_parquet("runs/run/tables/best_of_n.parquet")
    np.testing.assert_allclose(curve["score"].iloc[[0, 3]], [scores.mean(), scores.max(1).mean()])
    assert curve["score"].is_monotonic_increasing and curve["n"].tolist() == [1, 2, 3, 4]
    assert metrics["objective/scores"] == pytest.approx(scores.max(1).mean())
    assert metrics["objective/kl"] == pytest.approx(np.log(4) - 3 / 4)
    assert json.loads(Path("runs/run/summary.json").read_text())["state"] == "finished"
    assert latest_run("runs", "policy optimisation") is None  # the token viewer: there is no model to show
    assert "Best of 4" in capsys.readouterr().out and not list(Path("runs/run").glob("samples_*"))
    # fewer samples, other batches: the first ones are the same
    best_of_n.main(world.best_of_n_args("fewer", best_of=2, queries_at_once=5, local_rollout_forward_batch_size=3))
    fewer = pandas.read_parquet("runs/fewer/tables/samples.parquet")
    same = samples[samples["sample"] < 2].reset_index(drop=True)
    assert fewer["response"].tolist() == same["response"].tolist()
    np.testing.assert_allclose(fewer["score"], same["score"], atol=1e-4)


def test_a_stop_loses_nothing(world, workdir, monkeypatch):
    """Ended after the first part, and started again: the rest is sampled, with the same result; then nothing is."""
    best_of_n.main(world.best_of_n_args("whole"))
    sampled, sample = [], best_of_n.sample_queries

    def note(*given):
        if len(sampled) == 1:
            sampled.append(None)
            raise SystemExit(REQUEUE_ME)
        sampled.append(given[2])
        return sample(*given)

    monkeypatch.setattr(best_of_n, "sample_queries", note)
    args = world.best_of_n_args("stopped")
    with pytest.raises(SystemExit):
        best_of_n.main(replace(args))
    best_of_n.main(replace(args))
    assert [part and part[0] for part in sampled] == [0, None, 8, 16]
    best_of_n.main(replace(args))
    assert len(sampled) == 4
    for name in ("samples", "validation", "best_of_n"):
        tables = [pandas.read_parquet(f"runs/{run}/tables/{name}.parquet") for run in ("whole", "stopped")]
        pandas.testing.assert_frame_equal(*tables, check_exact=True)


def test_a_signal_keeps_the_part_that_is_sampled_and_other_models_take_none_of_it(world, workdir, monkeypatch):
    """SIGTERM while the first part is sampled; then the reward model at that place is another one."""
    shutil.copytree(world.reward, "reward")
    args, sample, sampled = world.best_of_n_args("run", reward_model_path="reward"), best_of_n.sample_queries, []

    def note(*given):
        sampled.append(given[2][0])
        if len(sampled) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(*given)

    monkeypatch.setattr(best_of_n, "sample_queries", note)
    with pytest.raises(SystemExit) as stopped:
        best_of_n.main(replace(args))
    assert stopped.value.code == REQUEUE_ME and sampled == [0]
    assert len(list(Path("runs/run").glob("samples_*/*.parquet"))) == 1
    weights = load_file("reward/model.safetensors")
    weights["score.weight"] *= -1
    save_file(weights, "reward/model.safetensors", {"format": "pt"})
    best_of_n.main(replace(args))
    assert sampled == [0, 0, 8, 16]
    best_of_n.main(world.best_of_n_args("plain", reward_model_path="reward"))
    tables = [pandas.read_parquet(f"runs/{run}/tables/samples.parquet") for run in ("run", "plain")]
    pandas.testing.assert_frame_equal(*tables, check_exact=True)


@pytest.mark.slow
def test_two_processes(world, workdir):
    best_of_n.main(world.best_of_n_args("one", num_eval_rows=9))
    args = world.best_of_n_args("two", num_eval_rows=9, queries_at_once=3, world_size=2)
    done = launch("best_of_n", args, workdir, 2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    one, two = (pandas.read_parquet(f"runs/{run}/tables/samples.parquet") for run in ("one", "two"))
    assert one["response"].tolist() == two["response"].tolist()
    np.testing.assert_allclose(one["score"], two["score"], atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"best_of": 0}, "--best_of: found 0; expected more than 0"),
        ({"push_to_hub": True}, "--push_to_hub: found True; expected nothing"),
        ({"reward_model_path": "x/y/z"}, "--reward_model_path: found 'x/y/z', which does not exist"),
    ],
)
def test_bad_input(world, workdir, capsys, change, message):
    with pytest.raises(SystemExit) as stopped:
        best_of_n.main(world.best_of_n_args("run", **change))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith(f"error: {message}") and said.count("\n") == 1, said
    assert not list(workdir.iterdir())
