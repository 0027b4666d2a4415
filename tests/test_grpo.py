"""GRPO: advantages, loss and weights by hand, its relation to RLOO, one update as the formula says, and learning."""

import math
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch

from summarize_from_feedback_details import grpo, rloo
from summarize_from_feedback_details.common.adapters import LoraParams
from summarize_from_feedback_details.grpo import group_advantages, grpo_losses, token_weights


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0])
    assert group_advantages(rewards, 3, normalise_std=False).tolist() == [-2.0, -1.0, 3.0, 0.0, 0.0, 0.0]
    std = math.sqrt((4 + 1 + 9) / 2)  # unbiased
    found = group_advantages(rewards, 3, normalise_std=True)
    torch.testing.assert_close(found, torch.tensor([-2.0, -1.0, 3.0, 0.0, 0.0, 0.0]) / (std + 1e-4))


@pytest.mark.parametrize("k", [2, 4])
def test_without_the_standard_deviation_it_is_rloo_times_a_factor(k):
    """r - mean of all = (k - 1) / k x (r - mean of the others): one half for k = 2."""
    rewards = torch.randn(8 * k, generator=torch.Generator().manual_seed(1))
    ours, theirs = group_advantages(rewards, k, False), rloo.leave_one_out_advantages(rewards, k)
    torch.testing.assert_close(ours, (k - 1) / k * theirs)


def test_the_loss_by_hand():
    """Ratios 2 and 1/2, clipped at 1.2 and 0.8; the KL term is exp(d) - d - 1 with d = log of reference / new."""
    two = math.log(2)
    new, old = torch.tensor([[two, -two], [two, -two]]), torch.zeros(2, 2)
    ref = torch.tensor([[two, 0.0], [0.0, -two]])
    k3 = lambda d: math.exp(d) - d - 1
    found = grpo_losses(new, old, ref, torch.tensor([[3.0], [-3.0]]), 0.2, 0.5)
    expected = [[-3.6, -1.5 + 0.5 * k3(two)], [6.0 + 0.5 * k3(-two), 2.4]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_weights_by_hand():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert token_weights(mask, True).tolist() == [[0.25, 0.25, 0.0], [0.5, 0.0, 0.0]]
    torch.testing.assert_close(token_weights(mask, False), mask / 3)


def test_an_update_is_that_of_the_formula(world, workdir, monkeypatch):
    """The loss that is trained on, from what was sampled, with the settings of the command line."""
    losses, plain = [], grpo.Gradient.add
    note = lambda self, loss, batch: losses.append(loss.item()) or plain(self, loss, batch)
    monkeypatch.setattr(grpo.Gradient, "add", note)
    batches, roll_out = [], grpo.roll_out
    monkeypatch.setattr(grpo, "roll_out", lambda *given: batches.append((given[1], roll_out(*given))) or batches[-1][1])
    settings = {"kl_coef": 0.5, "normalise_std": False, "length_normalisation": False, "noptepochs": 2}
    grpo.main(world.grpo_args("model", num_updates=1, local_micro_batch_size=8, lr=1e-4, run_eval=False, **settings))
    prompts, (responses, logprobs, ref_logprobs, scores) = batches[0]
    ends = torch.tensor([0 in row for row in responses.real])
    scores = torch.where(ends, scores, torch.tensor(-1.0))
    by_query = {row: scores[torch.tensor(prompts.rows) == row].mean() for row in set(prompts.rows.tolist())}
    advantages = scores - torch.stack([by_query[row] for row in prompts.rows.tolist()])
    # at the first pass the ratio is 1, and the policy is the reference: no KL
    first = -(advantages[:, None] * responses.mask).sum() / responses.mask.sum()
    assert losses[0] == pytest.approx(float(first), abs=1e-4)
    assert len(losses) == 2 and losses[1] < losses[0] - 1e-3  # a step later, on the same batch


ADAPTERS = {"lora": True, "lora_params": LoraParams(rank=4), "lr": 1e-2}


@pytest.mark.parametrize("change", [{}, pytest.param(ADAPTERS, marks=pytest.mark.torture)])
def test_it_learns(world, workdir, capsys, change):
    args = world.grpo_args("model", num_updates=14, kl_coef=0.0, **world.easy_task())
    grpo.main(replace(args, **change))
    metrics = pandas.read_json("runs/model/metrics.jsonl", lines=True).iloc[:14]
    assert metrics["objective/scores"].iloc[-4:].mean() > metrics["objective/scores"].iloc[:2].mean() + 0.5
    assert metrics["policy/first_pass_ratio_error"].max() < 1e-3 and Path("model/config.json").exists()
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grpo_k": 1}, "--grpo_k: found 1; expected at least 2"),
        ({"batch_size": 12, "grpo_k": 8}, "--batch_size: found 12; expected a multiple of --grpo_k 8"),
        ({"cliprange": 0.0}, "--cliprange: found 0.0; expected more than 0"),
    ],
)
def test_bad_input(world, workdir, capsys, change, message):
    with pytest.raises(SystemExit) as stopped:
        grpo.main(world.grpo_args("model", **change))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith(f"error: {message}") and said.count("\n") == 1, said
    assert not list(workdir.iterdir())
