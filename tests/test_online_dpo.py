"""Online DPO: which response is preferred, the loss as DPO's, one update as the formula says, and learning."""

import json
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch

from summarize_from_feedback_details import dpo, online_dpo
from summarize_from_feedback_details.common.adapters import LoraParams
from summarize_from_feedback_details.online_dpo import dpo_losses, preferences


def test_preferences_by_hand():
    scores = torch.tensor([2.0, 1.0, -1.0, -1.0, 0.5, 3.0])
    assert preferences(scores).tolist() == [1.0, 0.0, -1.0]


def test_an_update_is_that_of_the_formula(world, workdir, monkeypatch):
    """What is trained on: two responses a query, chosen by score after the penalty, log-ratios to the SFT policy."""
    seen, batches, roll_out = [], [], online_dpo.roll_out
    monkeypatch.setattr(
        online_dpo, "dpo_losses", lambda *given: seen.append((given, dpo_losses(*given))) or seen[-1][1]
    )
    monkeypatch.setattr(
        online_dpo, "roll_out", lambda *given: batches.append((given[1], roll_out(*given))) or batches[-1][1]
    )
    changes = {"lr": 1e-2, "beta": 0.3, "label_smoothing": 0.2, "run_eval": False}
    online_dpo.main(world.online_dpo_args("model", local_micro_batch_size=8, **changes))
    # of the second update, where the policy is no longer the reference; its ratios are those of sampling
    (prompts, (responses, logprobs, ref_logprobs, scores)), ((margins, *settings), losses) = batches[1], seen[1]
    assert len(seen) == 2 and settings == [0.3, 0.2, False]
    ratios = ((logprobs - ref_logprobs) * responses.mask).sum(1).tolist()
    ends = [0 in row for row in responses.real]
    scores = [score if end else -1.0 for score, end in zip(scores.tolist(), ends)]
    of_query = {}
    for row, score, ratio in zip(prompts.rows.tolist(), scores, ratios):
        of_query.setdefault(row, []).append((score, ratio))
    assert [len(found) for found in of_query.values()] == [2] * 4
    expected = [max(pair)[1] - min(pair)[1] if pair[0][0] != pair[1][0] else 0.0 for pair in of_query.values()]
    assert sorted(margins.tolist()) == pytest.approx(sorted(expected), abs=1e-4)
    assert max(map(abs, expected)) > 0.05
    torch.testing.assert_close(losses, dpo.dpo_losses(margins, 0.3, 0.2, False))
    line = json.loads(Path("runs/model/metrics.jsonl").read_text().splitlines()[1])
    untied = [pair[0][0] != pair[1][0] for pair in of_query.values()]
    assert line["objective/ties"] == pytest.approx(1 - sum(untied) / 4)
    assert line["train/online_dpo/accuracy"] == pytest.approx(sum(margin > 0 for margin in expected) / 4)


def test_a_tie_prefers_neither(world, workdir):
    """No response ends: all have the penalty's score, and nothing is learnt."""
    args = world.online_dpo_args("model", response_length=1, lr=1e-2, run_eval=False)
    online_dpo.main(args)
    found = pandas.read_json("runs/model/metrics.jsonl", lines=True)
    tied = found[found["objective/eos_rate"] == 0]
    assert len(tied) and (tied["objective/ties"] == 1).all() and (tied["train/online_dpo/grad_norm"] == 0).all()
    assert (tied["train/online_dpo/loss"] == 0).all()


ADAPTERS = {"lora": True, "lora_params": LoraParams(rank=4), "lr": 1e-2}


@pytest.mark.parametrize("change", [{}, pytest.param(ADAPTERS, marks=pytest.mark.torture)])
def test_it_learns(world, workdir, capsys, change):
    """The score rises, also with adapters; the run is one that the figures read."""
    online_dpo.main(replace(world.online_dpo_args("model", num_updates=24, **world.easy_task()), **change))
    metrics = pandas.read_json("runs/model/metrics.jsonl", lines=True).iloc[:24]
    assert metrics["objective/scores"].iloc[-4:].mean() > metrics["objective/scores"].iloc[:2].mean() + 0.1
    assert metrics["policy/first_pass_ratio_error"].max() < 1e-3 and metrics["objective/kl"].iloc[-1] > 0
    assert json.loads(Path("runs/model/summary.json").read_text())["stage"] == "online_dpo"
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        ({"local_micro_batch_size": 1}, "--local_micro_batch_size: found 1; expected an even number"),
        ({"beta": 0.0}, "--beta: found 0.0; expected more than 0"),
        ({"label_smoothing": 0.1, "ipo": True}, "--label_smoothing: found 0.1 with --ipo; expected 0"),
    ],
)
def test_bad_input(world, workdir, capsys, change, message):
    with pytest.raises(SystemExit) as stopped:
        online_dpo.main(world.online_dpo_args("model", **change))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith(f"error: {message}") and said.count("\n") == 1, said
    assert not list(workdir.iterdir())
