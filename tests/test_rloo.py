"""RLOO: baseline and loss by hand, its gradient as REINFORCE's, one update as the formula says, and learning."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from summarize_from_feedback_details import rloo
from summarize_from_feedback_details.common import rollouts
from summarize_from_feedback_details.common.adapters import LoraParams
from summarize_from_feedback_details.common.policies import ResponsePolicy, load_policy
from summarize_from_feedback_details.rloo import leave_one_out_advantages, rloo_losses


def test_the_baseline_by_hand():
    """(r1, r2, r3): each minus the mean of the two others; groups do not see each other."""
    rewards = torch.tensor([1.0, 2.0, 6.0, 10.0, 10.0, 13.0])
    expected = [1 - 4.0, 2 - 3.5, 6 - 1.5, 10 - 11.5, 10 - 11.5, 13 - 10.0]
    torch.testing.assert_close(leave_one_out_advantages(rewards, 3), torch.tensor(expected))
    pair = leave_one_out_advantages(torch.tensor([2.0, 5.0]), 2)
    assert pair.tolist() == [-3.0, 3.0]
    # k / (k - 1) times the distance from the group's mean
    distance = rewards.reshape(2, 3) - rewards.reshape(2, 3).mean(1, keepdim=True)
    torch.testing.assert_close(leave_one_out_advantages(rewards, 3), (1.5 * distance).flatten())


def test_the_loss_by_hand():
    """One ratio a response: 2 and 1/2; clipped at 1.2 where the advantage is positive, at 0.8 where it is negative."""
    new, old = torch.tensor([1.0, -1.0, 1.0, -1.0]).mul(0.6931472), torch.zeros(4)
    advantages = torch.tensor([3.0, 3.0, -3.0, -3.0])
    assert rloo_losses(new, old, advantages, None).tolist() == pytest.approx([-6.0, -1.5, 6.0, 1.5])
    assert rloo_losses(new, old, advantages, 0.2).tolist() == pytest.approx([-3.6, -1.5, 6.0, 2.4])


def test_the_gradient_at_the_first_pass_is_that_of_reinforce(world):
    """-sum of A x grad log pi(response), by plain passes over one row at a time."""
    policy, plain = load_policy("x", world.sft), AutoModelForCausalLM.from_pretrained(world.sft)
    queries, responses = [[5, 6, 7], [5, 6, 7], [9], [9]], [[3, 4], [8, 0], [11, 12, 13], [2]]
    advantages = leave_one_out_advantages(torch.tensor([0.5, -1.0, 2.0, 0.25]), 2)
    counts = list(map(len, responses))
    new = torch.stack([part.sum() for part in ResponsePolicy(policy)(queries, responses, 0.7).split(counts)])
    rloo_losses(new, new.detach(), advantages, None).sum().backward()
    for query, response, advantage in zip(queries, responses, advantages):
        logits = plain(torch.tensor([query + response])).logits[0, len(query) - 1 : -1] / 0.7
        logprob = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()
        (-advantage * logprob).backward()
    for (name, ours), theirs in zip(policy.named_parameters(), plain.parameters()):
        atol = 1e-6 * float(theirs.grad.abs().max() + 1)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=atol, msg=name)


def test_an_update_is_that_of_the_formula(world, workdir, monkeypatch):
    """What is trained on: k responses to each query, rewards with the KL and the penalty, advantages within a query."""
    seen, plain = [], rloo.rloo_losses
    monkeypatch.setattr(rloo, "rloo_losses", lambda *given: seen.append(given) or plain(*given))
    batches, roll_out = [], rloo.roll_out
    monkeypatch.setattr(rloo, "roll_out", lambda *given: batches.append((given[1], roll_out(*given))) or batches[-1][1])
    rloo.main(world.rloo_args("model", local_micro_batch_size=8, lr=1e-2, kl_coef=0.3, run_eval=False))
    # of the second update, where the policy is no longer the reference
    (prompts, (responses, logprobs, ref_logprobs, scores)), (new, old, advantages, clip) = batches[1], seen[1]
    assert len(seen) == 2 and clip is None
    kl = ((logprobs - ref_logprobs) * responses.mask).sum(1)
    assert kl.abs().max() > 0.05
    ends = torch.tensor([0 in row for row in responses.real])
    rewards = torch.where(ends, scores, torch.tensor(-1.0)) - 0.3 * kl
    of_query = {}
    for row, reward in zip(prompts.rows.tolist(), rewards.tolist()):
        of_query.setdefault(row, []).append(reward)
    assert [len(rewards) for rewards in of_query.values()] == [4, 4]
    expected = []
    for row, reward in zip(prompts.rows.tolist(), rewards.tolist()):
        others = list(of_query[row])
        others.remove(reward)
        expected.append(reward - sum(others) / 3)
    assert sorted(advantages.tolist()) == pytest.approx(sorted(expected), abs=1e-5)
    torch.testing.assert_close(new.detach(), old, rtol=0, atol=1e-4)
    assert len({tuple(row) for row in responses.real}) > 2  # responses to a query differ: each has noise of its own


@pytest.mark.parametrize(
    "world_size, together, expected", [(1, 2, [4, 5, 2, 3, 0, 1]), (3, 2, [4, 5]), (2, 2, [5, 3, 1])]
)
def test_responses_to_a_query_go_to_one_rank(world_size, together, expected):
    """Where the queries can be shared out evenly; as many rows on each rank in any case."""
    queries = [[1], [1], [2, 2], [2, 2], [3, 3, 3], [3, 3, 3]]
    accelerator = SimpleNamespace(process_index=0 if world_size != 2 else 1, num_processes=world_size)
    prompts, mine = rollouts.Prompts(queries, np.arange(6), np.arange(6)).share(accelerator, together)
    assert mine == expected and prompts.queries == [queries[i] for i in mine] and prompts.rows.tolist() == mine


def test_it_learns(world, workdir, capsys):
    """The score rises, also with adapters; the run is one that the figures read."""
    for name, change in (("whole", {}), ("lora", {"lora": True, "lora_params": LoraParams(rank=4), "lr": 1e-2})):
        args = world.rloo_args(name, num_updates=14, kl_coef=0.0, **world.easy_task())
        rloo.main(replace(args, **change))
        metrics = pandas.read_json(f"runs/{name}/metrics.jsonl", lines=True).iloc[:14]
        assert metrics["objective/scores"].iloc[-4:].mean() > metrics["objective/scores"].iloc[:2].mean() + 0.5
        assert metrics["policy/first_pass_ratio_error"].max() < 1e-3 and metrics["objective/kl"].iloc[-1] > 0
        AutoModelForCausalLM.from_pretrained(name)
        assert json.loads(Path(f"runs/{name}/summary.json").read_text())["stage"] == "rloo"
    assert "WARNING" not in capsys.readouterr().out
    assert load_file("lora/adapter/adapter_model.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rloo_k": 1}, "--rloo_k: found 1; expected at least 2"),
        ({"batch_size": 12, "rloo_k": 8}, "--batch_size: found 12; expected a multiple of --rloo_k 8"),
        ({"ppo_clip": 0.0}, "--ppo_clip: found 0.0; expected more than 0"),
        ({"kl_coef": -1.0}, "--kl_coef: found -1.0; expected at least 0"),
        ({"sft_model_path": "nowhere/x/y"}, "--sft_model_path: found 'nowhere/x/y', which does not exist"),
    ],
)
def test_bad_input(world, workdir, capsys, change, message):
    with pytest.raises(SystemExit) as stopped:
        rloo.main(world.rloo_args("model", **change))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith(f"error: {message}") and said.count("\n") == 1, said
    assert not list(workdir.iterdir())
