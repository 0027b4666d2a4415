"""PPO: golden numbers, tensors by hand, sampling, padding, and small runs of the whole stage."""

import copy
import json
import math
import re
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from conftest import SHARED
from datasets import load_dataset
from test_packed_rows import compare_gradients
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
)

from summarize_from_feedback_details import ppo_left_padding as ppo
from summarize_from_feedback_details import reward, sft
from summarize_from_feedback_details.common import evaluation, machine, precision, rollouts, sampling, training
from summarize_from_feedback_details.common.arguments import derive_sizes, fill_episodes
from summarize_from_feedback_details.common.check_inputs import TokenIds
from summarize_from_feedback_details.common.logprobs import (
    INVALID_LOGPROB,
    masked_mean,
    masked_var,
    masked_whiten,
    scatter_tokens,
    token_entropies,
    token_logprobs,
)
from summarize_from_feedback_details.common.noise import episode_keys
from summarize_from_feedback_details.common.packed_rows import use_packed_attention
from summarize_from_feedback_details.common.reward_models import load_reward_model, read_rewards
from summarize_from_feedback_details.common.run_folder import RunFolder
from summarize_from_feedback_details.common.sampling import (
    first_true_indices,
    model_inputs,
    sample_responses,
    strip_pads,
    truncate_response,
)
from summarize_from_feedback_details.common.training import epoch_order, micro_batches
from summarize_from_feedback_details.ppo_left_padding import (
    PolicyAndValue,
    PpoHParams,
    Rollout,
    compute_experience,
    generalised_advantages,
    micro_batch_loss,
    ppo_losses,
)

PAD, EOS, VOCAB = 60, 0, 64
needs_golden = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/golden (golden numbers) is not here")


def golden(name: str) -> dict:
    found = np.load(SHARED / "golden" / f"{name}.npz", allow_pickle=True)
    return {k: torch.tensor(found[k]) if found[k].dtype.kind in "fib" else found[k].item() for k in found}


def close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(torch.as_tensor(ours).double(), theirs.double(), rtol=1e-5, atol=atol)


def tiny_config(name: str):
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    wide = {"intermediate_size": 64, "max_position_embeddings": 128}
    return {
        "gpt_neox": lambda: GPTNeoXConfig(**sizes, **wide, initializer_range=0.2),
        "llama": lambda: LlamaConfig(**sizes, **wide, initializer_range=0.2),
        "gpt2": lambda: GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2
        ),
        "opt": lambda: OPTConfig(
            **sizes, ffn_dim=64, max_position_embeddings=128, word_embed_proj_dim=32, init_std=0.2, pad_token_id=None
        ),
    }[name]()


ARCHITECTURES = ["gpt_neox", "llama", "gpt2", "opt"]


def tiny_policy(name="gpt_neox", seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(name)).eval()


def tiny_reward(name="gpt_neox", seed=1):
    torch.manual_seed(seed)
    config = tiny_config(name)
    config.num_labels, config.reward_bias = 1, 0.1
    return AutoModelForSequenceClassification.from_config(config).eval()


# --------------------------------------------------------------------------------------------------- golden numbers


@needs_golden
def test_golden_helpers():
    g = golden("helpers")
    for i in range(4):
        assert torch.equal(first_true_indices(g[f"fti_in_{i}"]), g[f"fti_out_{i}"])
    for i in range(3):
        assert torch.equal(truncate_response(g[f"trunc_in_{i}"], EOS, PAD), g[f"trunc_out_{i}"])
        values, mask = g[f"mask_v_{i}"], g[f"mask_m_{i}"]
        close(masked_mean(values, mask), g[f"mask_mean_{i}"])
        close([masked_mean(v, m) for v, m in zip(values, mask)], g[f"mask_mean_ax1_{i}"])
        close(masked_var(values, mask), g[f"mask_var_{i}"])
        close(masked_var(values, mask, unbiased=False), g[f"mask_var_biased_{i}"])
        close(masked_whiten(values, mask), g[f"whiten_{i}"])
        close(masked_whiten(values, mask, shift_mean=False), g[f"whiten_noshift_{i}"])


TASK = {"rollout_engine": "hf", "non_eos_penalty": True, "penalty_reward_value": -1.0}


def experience_of(responses, *columns, args, pad=PAD, stop=EOS):
    rollout = Rollout(torch.arange(len(responses)), responses, *columns, columns[0])
    return compute_experience(rollout, TokenIds(pad, stop, pad), args)


def golden_rollout(g, cfg):
    responses = truncate_response(g["in_responses"], cfg["eos"], cfg["pad"])
    names = ("gamma", "lam", "kl_coef", "whiten_rewards", "cliprange", "cliprange_value", "vf_coef")
    args = SimpleNamespace(
        ppo=PpoHParams(**{name: cfg[name] for name in names}),
        rollout_engine="hf",
        non_eos_penalty=cfg["non_eos_penalty"],
        penalty_reward_value=-1.0,
        temperature=cfg["temperature"],
    )
    columns = (g[f"in_{name}"] for name in ("logprobs", "ref_logprobs", "values", "scores"))
    return responses, experience_of(responses, *columns, args=args, pad=cfg["pad"], stop=cfg["eos"]), args


@needs_golden
@pytest.mark.parametrize("name", ["ppo_base", "ppo_whiten", "ppo_noeos"])
def test_golden_rollout_and_loss(name):
    g = golden(name)
    cfg = json.loads(g["cfg"])
    responses, adv, args = golden_rollout(g, cfg)
    assert torch.equal(responses, g["roll_postprocessed_responses"])
    assert torch.equal(adv.sequence_lengths, g["roll_sequence_lengths"])
    assert torch.equal(adv.contains_stop, g["roll_contain_eos_token"])
    assert torch.equal(adv.padding_mask, g["roll_padding_mask"])
    assert torch.equal(adv.padding_mask_p1, g["roll_padding_mask_p1"])
    assert torch.equal(adv.sequence_lengths + 1, g["roll_sequence_lengths_p1"])
    names = {"scores": adv.scores, "logprobs": adv.logprobs, "ref_logprobs": adv.ref_logprobs, "values": adv.values,
             "kl": adv.kl, "non_score_reward": adv.non_score_rewards, "rewards": adv.rewards,
             "advantages": adv.advantages, "returns": adv.returns}  # fmt: skip
    for column, ours in names.items():
        close(ours, g[f"roll_{column}"])
    metrics = ppo.rollout_metrics(adv)
    close(metrics["objective/kl"], g["roll_objective_kl"])
    close(metrics["objective/scores"], g["roll_objective_scores"])
    close(metrics["objective/non_score_reward"], g["roll_objective_non_score_reward"])
    close(metrics["objective/score_total"], g["roll_objective_score_total"])
    close(metrics["objective/entropy"], (-g["roll_logprobs"]).masked_fill(g["roll_padding_mask"], 0).sum(1).mean())

    # the loss, its parts and its gradients, through the micro-batch function that training uses, in two micro batches
    logits = g["in_policy_logits_unscaled"].clone().requires_grad_()
    vpreds = g["in_vpred_raw"].clone().requires_grad_()
    mask, mask_p1 = ~adv.padding_mask, ~adv.padding_mask_p1
    counts, stats, loss = [int(mask.sum()), int(mask_p1.sum())], 0, 0
    for mb in (torch.arange(3), torch.arange(3, 8)):

        def model(queries, real, value_counts, temperature, mb=mb):
            of_response = logits[mb][mask[mb]]  # [N, V], a copy: its gradient may be written over it
            entropies = token_entropies(of_response, temperature)
            logprobs = token_logprobs(of_response, responses[mb][mask[mb]], temperature)
            return logprobs, entropies, vpreds[mb][mask_p1[mb]]

        part, values, _ = micro_batch_loss(model, [[1]] * len(mb), adv.take(mb), counts, args)
        stats, loss = stats + values, loss + part
    loss.backward()
    close(loss.detach(), g["loss_loss"])
    ours = dict(zip(ppo.STATISTICS, stats))
    close(ours["loss/policy"], g["loss_pg_loss"])
    close(ours["loss/value"], g["loss_vf_loss"])
    close(ours["value/clipfrac"], g["loss_vf_clipfrac"])
    close(ours["policy/clipfrac"], g["loss_pg_clipfrac_masked"])
    # means over real tokens of the file's per-token numbers (the logged ones include padding, which we do not repeat)
    close(ours["policy/ratio"], masked_mean(g["loss_ratio"], mask))
    close(ours["policy/approxkl"], masked_mean(0.5 * g["loss_logprobs_diff"] ** 2, mask))
    close(ours["policy/entropy"], masked_mean(g["loss_entropy"], mask))
    close(logits.grad, g["loss_grad_logits"])
    close(vpreds.grad, g["loss_grad_vpred"])


@needs_golden
def test_golden_loss_terms():
    g = golden("ppo_base")
    cfg = json.loads(g["cfg"])
    responses, adv, args = golden_rollout(g, cfg)
    mask, logits = ~adv.padding_mask, g["in_policy_logits_unscaled"]
    new = token_logprobs(logits[mask], responses[mask], cfg["temperature"])
    new = scatter_tokens(new, mask, INVALID_LOGPROB)
    close(new, g["loss_new_logprobs"])
    vpreds = g["in_vpred_raw"].masked_fill(adv.padding_mask_p1, 0)
    found = ppo_losses(new, vpreds, adv.logprobs, adv.values, adv.advantages, adv.returns, 0.2, 0.2)
    close(found["pg"], torch.max(g["loss_pg_losses"], g["loss_pg_losses2"]))
    close(found["ratio"], g["loss_ratio"])
    value_losses = torch.max((g["loss_vpred"] - adv.returns) ** 2, (g["loss_vpredclipped"] - adv.returns) ** 2)
    close(found["vf"], 0.5 * value_losses)
    close(token_entropies(logits.flatten(0, 1), cfg["temperature"]).view(mask.shape), g["loss_entropy"])


@needs_golden
def test_golden_models():
    """Logits, response log-probs, values and rewards of the tiny GPT-NeoX, in both layouts of padding."""
    g = golden("tiny_par")
    policy = AutoModelForCausalLM.from_pretrained(SHARED / "golden/tiny_par", dtype=torch.float32).eval()
    reward = AutoModelForSequenceClassification.from_pretrained(
        SHARED / "golden/tiny_par", num_labels=1, dtype=torch.float32
    ).eval()
    reward.score.weight.data.copy_(g["scalar_w"])
    reward.config.reward_bias = float(g["scalar_b"]) - g["scalar_bias"]
    tokens, responses = g["query_responses"], g["responses"]
    R = responses.shape[1]
    with torch.no_grad():
        logits = policy(**model_inputs(tokens, PAD)).logits
        real = tokens != PAD
        close(logits[real], g["logits"][real])
        trained = PolicyAndValue(policy, reward)
        queries = [strip_pads(row, PAD) for row in tokens[:, :-R]]
        written = [strip_pads(row, PAD) for row in responses]
        counts, mask = list(map(len, written)), responses != PAD
        before = real[:, -R - 1 : -1] & mask  # values are read at the token before
        for packed in (False, True):
            if packed:
                assert use_packed_attention(policy) and use_packed_attention(reward)
            logprobs, _, values = trained(queries, written, counts, 0.7)
            close(logprobs, g["resp_logprobs_T07"][mask])
            expected = g["values_full"][:, -R - 1 : -1, 0]
            close(scatter_tokens(values, mask, 0.0)[before], expected[before])  # head, bias and normalising constant
            # Detail: layouts agree
            rewards = read_rewards(reward, [q + r for q, r in zip(queries, written)])
            close(rewards, g["reward"])
            close(rewards, g["reward_rp"])


@needs_golden
def test_golden_generation():
    """What the original generated: our logits along its samples, and our own greedy sampling at T = 0.01."""
    g = golden("tiny_par")
    policy = AutoModelForCausalLM.from_pretrained(SHARED / "golden/tiny_par", dtype=torch.float32).eval()
    queries = g["queries"]
    for name, T in (("T07", 0.7), ("T001", 0.01)):
        tokens = g[f"gen_{name}_tokens"]
        assert torch.equal(tokens[:, :12], queries)
        usable = ~(tokens[:, 12:] == PAD).any(1)  # a sampled pad id cannot be told from padding
        assert usable.sum() >= 4
        with torch.no_grad():
            logits = policy(**model_inputs(tokens[usable], PAD), logits_to_keep=9).logits[:, :-1]
        # divided by T = 0.01, float32 rounding grows a hundredfold
        close(logits / T, g[f"gen_{name}_scores"][usable], atol=1e-5 / T)
    keys = episode_keys(0, list(range(6)), queries.device)
    ours, _ = sample_responses(policy, queries, keys, TokenIds(PAD, -1, VOCAB), 8, 0.0)
    theirs, scores = g["gen_T001_tokens"][:, 12:], g["gen_T001_scores"]
    for i in usable.nonzero()[:, 0].tolist():
        differ = (ours[i] != theirs[i]).nonzero()[:, 0].tolist()
        if differ:  # theirs was drawn at T = 0.01: where it is not greedy, the two tokens have to be close
            t = differ[0]
            assert scores[i, t, ours[i, t]] - scores[i, t, theirs[i, t]] < 5
    assert (ours[usable] == theirs[usable]).all(1).float().mean() >= 0.6


# ------------------------------------------------------------------------------------------------- tensors by hand


def test_where_the_score_lands():
    """Right after EOS when there is room, else at the last token; without EOS the score IS -1."""
    responses = torch.tensor([[5, EOS, PAD, PAD], [5, 6, 7, EOS], [5, 6, 7, 8]])
    zeros = torch.zeros(3, 4)
    args = SimpleNamespace(ppo=PpoHParams(gamma=1.0, lam=1.0), **TASK)
    adv = experience_of(responses, zeros, zeros, zeros, torch.tensor([2.0, 3.0, 4.0]), args=args)
    assert adv.rewards.tolist() == [[0, 0, 2, 0], [0, 0, 0, 3], [0, 0, 0, -1]]
    assert adv.returns[0].tolist() == [2, 2, 2, 0]
    assert adv.padding_mask_p1[0].tolist() == [False, False, False, True]
    args.non_eos_penalty = False
    adv = experience_of(responses, zeros, zeros, zeros, torch.tensor([2.0, 3.0, 4.0]), args=args)
    assert adv.rewards[2].tolist() == [0, 0, 0, 4]


def test_kl_in_the_reward():
    responses = torch.tensor([[5, EOS, PAD]])
    args = SimpleNamespace(ppo=PpoHParams(kl_coef=0.5), **TASK)
    logprobs, ref = torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-1.5, -1.0, -3.0]])
    adv = experience_of(responses, logprobs, ref, torch.zeros(1, 3), torch.tensor([1.0]), args=args)
    assert adv.rewards.tolist() == [[-0.25, 0.5, 1.0]]
    metrics = ppo.rollout_metrics(adv)
    assert metrics["objective/kl"] == pytest.approx(0.5 - 1.0)
    assert metrics["objective/kl_k3"] == pytest.approx((math.exp(-0.5) - 1 + 0.5) + (math.exp(1.0) - 1 - 1.0))


def test_generalised_advantages_by_hand():
    rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
    last = 1.0 - 0.25
    assert generalised_advantages(rewards, values, 1.0, 0.5).tolist() == [[0.0 + 0.25 - 0.5 + 0.5 * last, last]]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (0.8, 0.9), (0.9, 0.0), (0.5, 1.0)])
def test_discounted_advantages_by_hand(gamma, lam):
    """A[t] is the sum over k of (gamma lambda)^k delta[t + k]; at lambda 1, A + V is the discounted sum of rewards."""
    torch.manual_seed(0)
    responses, values = torch.tensor([[5, 6, 7, EOS]]), torch.randn(1, 4)
    args = SimpleNamespace(
        ppo=PpoHParams(gamma=gamma, lam=lam, kl_coef=1.0),
        rollout_engine="hf",
        non_eos_penalty=True,
        penalty_reward_value=-1.0,
    )
    adv = experience_of(responses, *torch.randn(2, 1, 4), values, torch.tensor([3.0]), args=args)
    r, v = adv.rewards[0].tolist(), [*values[0].tolist(), 0.0]  # after the last token nothing is worth anything
    deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(4)]
    expected = [sum((gamma * lam) ** k * deltas[t + k] for k in range(4 - t)) for t in range(4)]
    found = adv.returns - adv.values  # before whitening
    torch.testing.assert_close(found[0], torch.tensor(expected), rtol=0, atol=1e-5)
    if lam == 1.0:
        sums = [sum(gamma**k * r[t + k] for k in range(4 - t)) for t in range(4)]
        torch.testing.assert_close(adv.returns[0], torch.tensor(sums), rtol=0, atol=1e-5)


def test_metrics_of_a_rollout_by_hand():
    """Two episodes, one of them ended: sums over real tokens, and over the position after EOS where values count."""
    responses = torch.tensor([[5, EOS, PAD, PAD], [5, 6, 7, 8]])
    logprobs = torch.tensor([[-1.0, -2.0, -9.0, -9.0], [-1.0, -1.0, -1.0, -3.0]])
    ref = torch.tensor([[-1.5, -2.5, -7.0, -7.0], [-2.0, -1.0, -2.0, -3.0]])
    values = torch.tensor([[1.0, 2.0, 4.0, 9.0], [0.0, 0.0, 1.0, 2.0]])
    args = SimpleNamespace(ppo=PpoHParams(kl_coef=0.5), **TASK)
    adv = experience_of(responses, logprobs, ref, values, torch.tensor([3.0, 8.0]), args=args)
    found = ppo.rollout_metrics(adv)
    expected = {
        "scores": 1.0, "scores_std": 2.0,  # 3, and -1 without EOS
        "kl": 1.5, "kl_standard_error": 0.5 / math.sqrt(2),  # 1 and 2 nats
        "entropy": 4.5, "non_score_reward": -0.75, "score_total": 0.25, "eos_rate": 0.5, "response_length": 3.0,
    }  # fmt: skip
    assert {name: found[f"objective/{name}"] for name in expected} == pytest.approx(expected)
    kept = [0, 1, 2, 4, 5, 6, 7]  # the first episode's third position is the one after EOS
    returns, values = adv.returns.flatten()[kept].numpy(), adv.values.flatten()[kept].numpy()
    assert found["value/mean"] == pytest.approx(10 / 7) and found["value/returns"] == pytest.approx(returns.mean())
    assert found["value/error"] == pytest.approx(np.abs(returns - values).mean())
    assert found["value/explained_variance"] == pytest.approx(1 - (returns - values).var() / returns.var())


def test_metrics_of_the_passes_by_hand():
    """Means over passes, but the entropy of the policy that sampled, and the KL of the last pass apart."""
    passes = torch.arange(21.0).view(3, 7)  # statistic i of pass p is 7p + i
    found = ppo.training_metrics(passes, 0.25)
    expected = {name: 7.0 + i for i, name in enumerate(ppo.STATISTICS)} | {"policy/entropy": 6.0}
    assert found == expected | {"policy/approxkl_last_pass": 14.0 + 4.0, "policy/first_pass_ratio_error": 0.25}


def test_report_by_hand():
    rows = {"score": [1.0, 2.0, 0.5, 4.0], "reference_score": [1.0, 1.0, 1.0, 1.0]}  # the first one is a tie
    rows |= {"response_length": [3, 5, 1, 1], "has_eos": [True, False, True, True]}
    found = evaluation.report_scores("ppo", rows)
    names = {"score": 1.875, "reference_score": 1.0, "scores_above_reference": 0.5, "response_length": 2.5}
    assert found == {f"eval/ppo/validation/{name}": value for name, value in (names | {"eos_rate": 0.75}).items()}


def test_advantages_are_whitened_over_real_tokens_of_the_whole_batch():
    torch.manual_seed(0)
    responses = torch.randint(1, 50, (16, 6))
    responses[:8, 3], responses[:8, 4:] = EOS, PAD
    args = SimpleNamespace(ppo=PpoHParams(), **TASK)
    adv = experience_of(responses, *torch.randn(3, 16, 6), torch.randn(16), args=args)
    real = adv.advantages[~adv.padding_mask]
    assert real.mean().abs() < 1e-6 and abs(float(real.var(unbiased=False)) - 1) < 1e-5
    assert (adv.advantages[adv.padding_mask] == 0).all()


def test_clipping_by_hand():
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    found = ppo_losses(math.log(1.5) * one, 0.5 * one, zero, zero, one, one, 0.2, 0.2)
    assert found["pg"].item() == pytest.approx(-1.2) and found["pg_clipped"].item()  # ratio 1.5 counts as 1.2
    assert found["vf"].item() == pytest.approx(0.5 * 0.64) and found["vf_clipped"].item()  # 0.5 counts as 0.2
    found = ppo_losses(math.log(1.5) * one, 0.1 * one, zero, zero, -one, one, 0.2, 0.2)
    assert found["pg"].item() == pytest.approx(1.5) and not found["pg_clipped"].item()


def test_each_cliprange_clips_its_own_loss():
    """0.1 for the policy, 0.3 for the value: of `ppo.cliprange` and `ppo.cliprange_value`, in this order."""
    responses, zero, one = torch.tensor([[EOS]]), torch.zeros(1, 1), torch.ones(1, 1)
    args = SimpleNamespace(ppo=PpoHParams(cliprange=0.1, cliprange_value=0.3, vf_coef=10.0), temperature=1.0)
    adv = ppo.Experience(
        responses=responses, padding_mask=zero.bool(), padding_mask_p1=zero.bool(),
        sequence_lengths=torch.zeros(1).long(), contains_stop=torch.ones(1).bool(), logprobs=zero, ref_logprobs=zero,
        values=zero, scores=torch.ones(1), kl=zero, non_score_rewards=zero, rewards=one, advantages=one, returns=one,
    )  # fmt: skip
    model = lambda *_: (torch.tensor([math.log(2.0)]), torch.zeros(1), torch.ones(1))
    loss, _, _ = micro_batch_loss(model, [[1]], adv, [1, 1], args)
    # the ratio of 2 counts as 1.1; the value of 1, which was 0, as 0.3
    assert loss.item() == pytest.approx(-1.1 + 10.0 * 0.5 * 0.7**2)


def test_epoch_order_is_one_permutation_a_pass():
    order = epoch_order(10, 25, seed=3)
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10)) and len(set(order[20:])) == 5
    assert order[:10].tolist() != order[10:20].tolist()
    assert order.tolist() == epoch_order(10, 25, seed=3).tolist() != epoch_order(10, 25, seed=4).tolist()


@pytest.mark.parametrize("rows, micro, world_size", [(8, 2, 2), (7, 2, 2), (1, 4, 2), (13, 3, 4), (5, 1, 1)])
def test_micro_batches_give_each_row_once_and_the_same_number_of_steps(rows, micro, world_size):
    lengths = [(7 * i) % 5 for i in range(rows)]
    for alike in (False, True):
        parts = [micro_batches(lengths, micro, rank, world_size, alike) for rank in range(world_size)]
        assert sorted(i for rank in parts for part in rank for i in part) == list(range(rows))
        assert len({len(rank) for rank in parts}) == 1
        assert max(len(part) for rank in parts for part in rank) <= micro


def test_micro_batches_balance_what_is_packed_and_sort_what_is_padded():
    lengths = np.random.default_rng(0).permutation(np.arange(100, 500, 25)).tolist()
    tokens = [sum(lengths[i] for i in part) for part in micro_batches(lengths, 4, 0, 1)]
    assert max(tokens) - min(tokens) <= 100 and sum(tokens) == sum(lengths)
    assert tokens == sorted(tokens, reverse=True)
    alike = [[lengths[i] for i in part] for part in micro_batches(lengths, 4, 0, 1, sort_by_length=True)]
    assert sum(alike, []) == sorted(lengths, reverse=True)


# ------------------------------------------------------------------------------------------------------- sampling


def some_queries(lengths=(3, 9, 5, 1), seed=0):
    torch.manual_seed(seed)
    return [torch.randint(1, 50, (n,)).tolist() for n in lengths]


def draw(policy, rows, temperature, R=12, seed=7, episodes=None, stop=EOS, vocab=PAD, width=0):
    queries = sampling.pad_rows(rows, PAD, "left")
    queries = torch.nn.functional.pad(queries, (width, 0), value=PAD)
    keys = episode_keys(seed, episodes or list(range(len(rows))), queries.device)
    return sample_responses(policy, queries, keys, TokenIds(PAD, stop, vocab), R, temperature)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_sampling_equals_generate(name):
    policy, rows = tiny_policy(name), some_queries()
    responses, _ = draw(policy, rows, temperature=0.0)
    for row, ours in zip(rows, responses):
        never = [[i] for i in range(PAD, VOCAB)]
        ids = {"eos_token_id": EOS, "pad_token_id": PAD, "bad_words_ids": never}
        config = GenerationConfig(do_sample=False, max_new_tokens=12, **ids)
        theirs = policy.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)), generation_config=config)
        assert ours[ours != PAD].tolist() == theirs[0, len(row) :].tolist()


def test_sampled_frequencies_follow_the_softmax():
    policy, n, T = tiny_policy(), 4000, 0.7
    row = some_queries((5,))[0]
    responses, logprobs = draw(policy, [row] * n, T, R=1, stop=-1)
    with torch.no_grad():
        logits = policy(torch.tensor([row])).logits[0, -1]
    allowed = (logits / T)[:PAD].softmax(-1)
    counts = torch.bincount(responses[:, 0], minlength=PAD).double()
    big = allowed * n >= 5  # the rest as one cell
    expected = torch.cat([allowed[big], allowed[~big].sum()[None]]).double() * n
    observed = torch.cat([counts[big], counts[~big].sum()[None]])
    chi2 = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    degrees = torch.tensor((len(expected) - 1) / 2.0).double()
    p_value = torch.special.gammaincc(degrees, chi2 / 2)
    assert p_value > 0.001, f"chi2 {chi2:.1f} with {2 * degrees:.0f} degrees"
    full = (logits / T).log_softmax(-1)
    torch.testing.assert_close(logprobs[:, 0], full[responses[:, 0]], rtol=0, atol=1e-5)


def test_noise_belongs_to_the_episode():
    """The same tokens whatever else is in the batch, how much padding there is, and in which order rows stand."""
    policy, rows = tiny_policy(), some_queries((3, 9, 5, 1, 7, 2))
    together, logprobs = draw(policy, rows, 0.9)
    order = [4, 1, 5, 0, 2, 3]
    shuffled, _ = draw(policy, [rows[i] for i in order], 0.9, episodes=order, width=6)
    assert torch.equal(shuffled, together[order])
    for i, row in enumerate(rows):
        alone, alone_logprobs = draw(policy, [row], 0.9, episodes=[i])
        assert torch.equal(alone[0], together[i])
        torch.testing.assert_close(alone_logprobs[0], logprobs[i], rtol=0, atol=1e-5)
    assert not torch.equal(draw(policy, rows, 0.9, seed=8)[0], together)


def test_never_draws_the_pad_or_an_id_outside_the_tokenizer():
    policy = tiny_policy()
    policy.lm_head.weight.data[PAD:] = 50 * policy.lm_head.weight.data[:1]  # tempting in one direction or the other
    for vocab in (PAD, PAD + 1):  # without the pad, and with it, as our tokenizers have it
        responses, _ = draw(policy, some_queries((4,) * 64), 1.0, R=8, stop=-1, vocab=vocab)
        assert int(responses.max()) < PAD


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sampling_stops_at_eos_and_logprobs_are_those_of_a_forward_pass(name):
    """With queries read padded and packed: the same responses, and the log-probs of a pass over whole rows."""
    policy, rows = tiny_policy(name), some_queries((3, 9, 5, 1) * 4)
    responses, logprobs = draw(policy, rows, 0.7, R=20)
    ended = (responses == EOS).any(1)
    assert ended.any()
    for row in responses[ended].tolist():
        assert set(row[row.index(EOS) + 1 :]) <= {PAD}
    mask = responses != PAD
    written = [strip_pads(row, PAD) for row in responses]
    with torch.no_grad():
        again = token_logprobs(*ppo.response_logits(policy, rows, written), 0.7)
        torch.testing.assert_close(logprobs[mask], again, rtol=0, atol=1e-5)
        assert use_packed_attention(policy)
        packed_responses, packed_logprobs = draw(policy, rows, 0.7, R=20)
        assert torch.equal(responses, packed_responses)
        torch.testing.assert_close(logprobs, packed_logprobs, rtol=0, atol=1e-5)
        again = token_logprobs(*ppo.response_logits(policy, rows, written), 0.7)
        torch.testing.assert_close(logprobs[mask], again, rtol=0, atol=1e-5)
    assert (logprobs[~mask] == INVALID_LOGPROB).all()


def test_no_pass_is_made_once_every_row_has_its_eos():
    policy, passes = tiny_policy(), []
    policy.register_forward_hook(lambda *_: passes.append(1))
    queries = sampling.pad_rows(some_queries(), PAD, "left")
    keys = lambda: episode_keys(7, range(4), queries.device)
    responses, _ = sample_responses(policy, queries, keys(), TokenIds(PAD, -1, PAD), 12, 0.7)
    assert len(passes) == 12 and (responses != PAD).all()  # one for the queries, one for each token but the last
    passes.clear()
    stop = 5
    policy.gpt_neox.final_layer_norm.bias.data.fill_(5.0)
    policy.lm_head.weight.data[stop] = 5.0  # a logit of 800: every row draws it first
    responses, _ = sample_responses(policy, queries, keys(), TokenIds(PAD, stop, PAD), 12, 0.7)
    assert len(passes) == 1 and responses[:, 0].tolist() == [stop] * 4 and (responses[:, 1:] == PAD).all()


def test_tokens_after_eos_influence_nothing_that_is_kept():
    """Values, log-probs and score of a response are the same whatever was sampled after its EOS."""
    reward, policy = tiny_reward(), tiny_policy()
    reward.config.reward_bias = 0.3
    model = PolicyAndValue(policy, reward)
    queries = some_queries((3, 6))
    truncated = torch.tensor([[5, 7, EOS, PAD, PAD, PAD], [9, EOS, PAD, PAD, PAD, PAD]])
    untruncated = torch.tensor([[5, 7, EOS, 12, 13, 14], [9, EOS, 31, EOS, 2, 2]])
    args = SimpleNamespace(ppo=PpoHParams(), **TASK)
    results, mask = [], truncated != PAD
    kept = [strip_pads(row, PAD) for row in truncated]
    everything = torch.ones_like(mask)
    with torch.no_grad():
        for sampled in (truncated, untruncated):
            # the critic of the original reads what was sampled, the reward model what was kept
            written = [strip_pads(row, PAD) for row in sampled]
            counts = [min(len(row) + 1, 6) for row in written]
            read = torch.arange(6) < torch.tensor(counts)[:, None]
            values = scatter_tokens(model.values(queries, written, counts), read, 0.0)
            logits, _ = ppo.response_logits(policy, queries, [row.tolist() for row in untruncated])
            logprobs = token_logprobs(logits, truncated.clamp(max=logits.shape[1] - 1)[everything], 0.7)
            logprobs = scatter_tokens(logprobs, everything, 0.0)
            score = read_rewards(reward, [q + r for q, r in zip(queries, kept)])
            results.append(experience_of(truncated, logprobs, logprobs - 0.1, values, score, args=args))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_rollout_along_plain_forward_passes():
    """What `make_rollout` returns, each row by itself: log-probs of policy and reference at T = 0.7, values, score."""
    policy, ref, reward, value = tiny_policy(), tiny_policy(seed=5), tiny_reward(), tiny_reward(seed=6)
    value.config.reward_bias, reward.config.reward_bias = 0.3, -0.2
    model, R, T = PolicyAndValue(policy, value), 8, 0.7
    queries = some_queries((3, 9, 5, 1, 7, 2))
    numbers = np.arange(6)
    args = SimpleNamespace(seed=3, response_length=R, temperature=T, local_rollout_forward_batch_size=4)
    stop = int(draw(policy, queries, T, R=R, seed=3, stop=-1)[0][0, 3])  # so that at least one response ends early
    networks, prompts = ppo.Networks(model, ref, reward), ppo.Prompts(queries, numbers, numbers)
    found = ppo.make_rollout(networks, prompts, False, TokenIds(PAD, stop, PAD), args)
    assert torch.equal(found.query_rows, torch.arange(6))
    lengths = (found.responses != PAD).sum(1).tolist()
    assert min(lengths) < R == max(lengths)
    for i, (query, n) in enumerate(zip(queries, lengths)):
        response = found.responses[i, :n]
        row, q = torch.tensor([[*query, *response.tolist()]]), len(query)
        with torch.no_grad():
            for column, network in ((found.logprobs, policy), (found.ref_logprobs, ref)):
                logits = network(row).logits[0, q - 1 : -1] / T
                expected = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
                torch.testing.assert_close(column[i, :n], expected, rtol=0, atol=1e-5)
            heads = {m: m.score(m.gpt_neox(row).last_hidden_state)[0, :, 0] for m in (value, reward)}
        kept = min(n + 1, R)  # the value right after EOS too, where there is room: it has seen EOS
        torch.testing.assert_close(found.values[i, :kept], heads[value][q - 1 : q - 1 + kept] + 0.3, rtol=0, atol=1e-5)
        assert (found.values[i, kept:] == 0).all() and (found.logprobs[i, n:] == INVALID_LOGPROB).all()
        torch.testing.assert_close(found.scores[i], heads[reward][-1] - 0.2, rtol=0, atol=1e-5)


def test_a_frozen_network_is_on_the_gpu_for_its_own_pass_only(monkeypatch):
    """With --offload: reference and reward model one after the other; their weights also stay where they were."""

    class Moves(torch.nn.Linear):
        def to(
            self, device, non_blocking=False
        ):  # there is no second device here: "elsewhere" is another place in memory
            for parameter in self.parameters() if device == "elsewhere" else ():
                parameter.data = parameter.data.clone()
            return self

    model = Moves(3, 2)
    before, places = model.weight.clone(), [p.data_ptr() for p in model.parameters()]
    with ppo.lent(model, "elsewhere"):
        inside = [p.data_ptr() for p in model.parameters()]
    assert [p.data_ptr() for p in model.parameters()] == places and not set(inside) & set(places)
    assert torch.equal(model.weight, before)
    networks = {"policy": tiny_policy(), "ref": tiny_policy(seed=5), "reward": tiny_reward()}
    networks["value"] = tiny_reward(seed=6)
    events, lent = [], ppo.lent

    @contextmanager
    def watch(model, device):
        name = next(name for name, network in networks.items() if network is model)
        with lent(model, device):
            events.append(f"{name} comes")
            yield
            events.append(f"{name} goes")

    monkeypatch.setattr(rollouts, "lent", watch)
    model = PolicyAndValue(networks["policy"], networks["value"])
    args = SimpleNamespace(seed=3, response_length=4, temperature=0.7, local_rollout_forward_batch_size=2)
    polls = []
    prompts = ppo.Prompts(some_queries((3, 5, 2)), np.arange(3), np.arange(3))
    three = ppo.Networks(model, networks["ref"], networks["reward"])
    ppo.make_rollout(three, prompts, False, TokenIds(PAD, 1, PAD), args, lambda: polls.append(1))
    assert events == ["ref comes", "ref goes", "reward comes", "reward goes"] and len(polls) == 2


def test_the_kl_is_an_estimate_of_the_exact_one(capsys):
    """k1 and k3 of sampled tokens against the KL summed over the vocabulary at each position.

    Near the reference some batches of 64 episodes have a negative k1, and none beyond its noise.
    """
    ref, T, n = tiny_policy(), 0.7, 2048
    ref.gpt_neox.final_layer_norm.bias.data.fill_(3.0)
    ref.lm_head.weight.data[PAD:] = -3.0  # as in trained models, what is never drawn is never likely
    policy = copy.deepcopy(ref)
    torch.manual_seed(1)
    for weight in policy.parameters():
        weight.data += 0.003 * torch.randn_like(weight)
    queries = some_queries((3, 9, 5, 1)) * (n // 4)
    responses, logprobs = draw(policy, queries, T, R=8)
    mask, real = responses != PAD, [strip_pads(row, PAD) for row in responses]
    with torch.no_grad():
        logits, tokens = ppo.response_logits(policy, queries, real)  # [real tokens, V]
        ref_logits, _ = ppo.response_logits(ref, queries, real)
    ref_logprobs = scatter_tokens(token_logprobs(ref_logits, tokens, T), mask, INVALID_LOGPROB)
    logits, ref_logits = (logits / T).log_softmax(-1), (ref_logits / T).log_softmax(-1)
    exact = scatter_tokens((logits.exp() * (logits - ref_logits)).sum(-1), mask, 0.0).sum(1)  # [n] nats per episode
    args = SimpleNamespace(ppo=PpoHParams(), **TASK)

    def measure(part: slice) -> dict[str, float]:
        columns = [x[part] for x in (responses, logprobs, ref_logprobs, torch.zeros(n, 8), torch.zeros(n))]
        return ppo.rollout_metrics(experience_of(*columns, args=args))

    found, kl = measure(slice(None)), float(exact.mean())
    assert 0.005 < kl < 0.05
    assert found["objective/kl"] == pytest.approx(kl, abs=4 * found["objective/kl_standard_error"])
    assert found["objective/kl_k3"] == pytest.approx(kl, rel=0.1)
    batches = [measure(slice(i, i + 64)) for i in range(0, n, 64)]
    assert min(batch["objective/kl"] for batch in batches) < 0
    for batch in batches:
        ppo.warn(1, batch | {"policy/first_pass_ratio_error": 0.0}, in_float32=True)
    assert capsys.readouterr().out == ""


def test_the_loss_is_policy_and_value_loss_and_nothing_else():
    """By hand from per-token losses, at the temperature of sampling; entropies change nothing; statistics, too."""
    torch.manual_seed(0)
    responses = torch.tensor([[5, 6, EOS, PAD], [7, 8, 9, 3]])
    args = SimpleNamespace(
        ppo=PpoHParams(vf_coef=0.3),
        rollout_engine="hf",
        non_eos_penalty=True,
        penalty_reward_value=-1.0,
        temperature=0.7,
    )
    adv = experience_of(responses, *torch.randn(3, 2, 4), torch.randn(2), args=args)
    mask, mask_p1 = ~adv.padding_mask, ~adv.padding_mask_p1
    new, vpreds = torch.randn(int(mask.sum())), torch.randn(int(mask_p1.sum()))
    asked, losses = [], []
    for entropies in (torch.zeros(len(new)), 100 * torch.rand(len(new))):

        def model(queries, real, counts, temperature, entropies=entropies):
            asked.append((real, counts, temperature))
            return new, entropies, vpreds

        counts = [len(new), len(vpreds)]
        losses.append(micro_batch_loss(model, [[1], [2]], adv, counts, args))
    assert asked[0] == ([[5, 6, EOS], [7, 8, 9, 3]], [4, 4], 0.7)
    ratio = torch.exp(new - adv.logprobs[mask])
    advantages, values, returns = adv.advantages[mask], adv.values[mask_p1], adv.returns[mask_p1]
    policy = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean()
    near = torch.minimum(torch.maximum(vpreds, values - 0.2), values + 0.2)
    value = 0.5 * torch.max((vpreds - returns) ** 2, (near - returns) ** 2).mean()
    for loss, _, error in losses:
        torch.testing.assert_close(loss, policy + 0.3 * value, rtol=0, atol=1e-5)
        torch.testing.assert_close(error, (ratio - 1).abs().max())
    better = -advantages * ratio.clamp(0.8, 1.2) > -advantages * ratio
    nearer = (near - returns) ** 2 > (vpreds - returns) ** 2
    assert better.any() and nearer.any() and not better.all() and not nearer.all()
    kl = 0.5 * (new - adv.logprobs[mask]) ** 2
    means = (policy, value, ratio.mean(), better.float().mean(), kl.mean(), nearer.float().mean(), entropies.mean())
    torch.testing.assert_close(losses[1][1], torch.stack(means), rtol=1e-5, atol=1e-5)


def test_whitened_rewards_keep_their_mean():
    torch.manual_seed(0)
    responses = torch.randint(1, 50, (16, 6))
    responses[:8, 3], responses[:8, 4:] = EOS, PAD
    columns, scores, found = torch.randn(3, 16, 6), torch.randn(16) + 2, {}
    for whiten in (False, True):
        args = SimpleNamespace(ppo=PpoHParams(whiten_rewards=whiten), **TASK)
        adv = experience_of(responses, *columns, scores, args=args)
        found[whiten] = adv.rewards[~adv.padding_mask_p1]
    plain = found[False]
    expected = (plain - plain.mean()) / plain.std(unbiased=False) + plain.mean()
    torch.testing.assert_close(found[True], expected, rtol=0, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_and_packing_change_nothing(name):
    """Log-probs, entropies, values, rewards and gradients: packed, padded, and each row by itself."""
    queries = some_queries((3, 9, 5, 1))
    written = [[5, 7, EOS], [9, EOS], [1, 2, 3, 4], [EOS]]
    counts = [4, 3, 4, 2]  # of values: one more where there is room
    results = []
    for packed in (True, False):
        model = PolicyAndValue(tiny_policy(name), tiny_reward(name))
        if packed:
            assert use_packed_attention(model.policy) and use_packed_attention(model.value_model)
        logprobs, entropies, values = model(queries, written, counts, 0.7)
        rewards = read_rewards(model.value_model, [q + r for q, r in zip(queries, written)])
        (logprobs.sin().sum() + values.square().sum() + rewards.sum()).backward()
        results.append(((logprobs, entropies, values, rewards), model))
        ends = np.cumsum([0, *map(len, written)]), np.cumsum([0, *counts])
        for i, row in enumerate(queries):
            alone = model([row], [written[i]], [counts[i]], 0.7)
            logits = model.policy(torch.tensor([row + written[i]])).logits[0, len(row) - 1 : -1] / 0.7
            expected = torch.distributions.Categorical(logits=logits).entropy()
            torch.testing.assert_close(alone[1], expected, rtol=0, atol=1e-5)
            for ours, whole, end in zip(alone, (logprobs, entropies, values), (ends[0], ends[0], ends[1])):
                torch.testing.assert_close(ours, whole[end[i] : end[i + 1]], rtol=0, atol=1e-5)
    for ours, theirs in zip(results[0][0], results[1][0]):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    compare_gradients(results[0][1], results[1][1])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dropout_is_off(name):
    """Every probability of a configuration at a half: noisy before, the same output twice after."""
    config = tiny_config(name)
    dropouts = [k for k, v in vars(config).items() if "drop" in k and isinstance(v, int | float)]
    for key in dropouts:
        setattr(config, key, 0.5)
    model = AutoModelForCausalLM.from_config(config).train()
    tokens = torch.tensor([[1, 2, 3]])
    assert dropouts
    assert not all(torch.equal(model(tokens).logits, model(tokens).logits) for _ in range(5))
    training.disable_dropout(model)
    assert all(torch.equal(model(tokens).logits, model(tokens).logits) for _ in range(5))


# -------------------------------------------------------------------------------------------- checkpoints of others


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_reads_the_original_scalar_model(tmp_path, layout):
    """`ScalarModel`: lm_backbone.*, scalar_head.*, config.bias, a base_config, a path of the training machine."""
    model = tiny_reward()
    state = {f"lm_backbone.{k}": v for k, v in model.gpt_neox.state_dict().items()}
    state |= {"scalar_head.weight": model.score.weight.data, "scalar_head.bias": torch.tensor([0.25])}
    state["lm_backbone.layers.0.attention.masked_bias"] = torch.tensor(-1e9)  # a buffer of old versions
    if layout == "safetensors":
        from safetensors.torch import save_file

        save_file({k: v.clone() for k, v in state.items()}, tmp_path / "model.safetensors")
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    base = model.config.to_dict() | {"_name_or_path": "/some/training/machine/models/sft_policy"}
    config = {"architectures": ["ScalarModel"], "base_model": "/some/training/machine/models/sft_policy",
              "base_config": base, "bias": 1.5, "hidden_size": 32}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_reward_model(str(tmp_path))
    rows = [[5, 6, 7, EOS]]
    if layout != "bin":  # the same in several files, as large models are
        first = {k: v.clone() for k, v in state.items() if "layers.0" in k}
        second = {k: v.clone() for k, v in state.items() if k not in first}
        files = {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second}
        for file, part in files.items():
            save_file(part, tmp_path / file)
        weight_map = {name: file for file, part in files.items() for name in part}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (tmp_path / "model.safetensors").unlink()
        again = load_reward_model(str(tmp_path))
        assert again.config.reward_bias == loaded.config.reward_bias
        for name, weight in loaded.state_dict().items():
            assert torch.equal(weight, again.state_dict()[name])
    with torch.no_grad():
        expected = model.score(model.gpt_neox(torch.tensor(rows)).last_hidden_state[:, -1])[:, 0] + 0.25 - 1.5
        torch.testing.assert_close(read_rewards(loaded.eval(), rows), expected, rtol=0, atol=1e-5)


def test_the_stage_reads_the_original_scalar_model(world, workdir):
    """The same reward model written as the original did: the same responses and scores, and its value network loads."""
    model = load_reward_model(world.reward)
    state = {f"lm_backbone.{k}": v for k, v in model.gpt_neox.state_dict().items()}
    state |= {"scalar_head.weight": model.score.weight.data, "scalar_head.bias": torch.tensor([0.25])}
    (workdir / "scalar").mkdir()
    torch.save(state, "scalar/pytorch_model.bin")
    config = {"architectures": ["ScalarModel"], "base_model": "models/that/are/not/here",
              "bias": 0.25 - model.config.reward_bias,
              "base_config": model.config.to_dict(), "hidden_size": model.config.hidden_size}  # fmt: skip
    (workdir / "scalar/config.json").write_text(json.dumps(config))
    for name, path in (("ours", world.reward), ("original", "scalar")):
        ppo.main(world.ppo_args(workdir / name, reward_model_path=path, value_output_dir=f"{name}_value"))
    tables = [pandas.read_parquet(f"runs/{name}/tables/validation.parquet") for name in ("ours", "original")]
    pandas.testing.assert_frame_equal(*tables, rtol=1e-5, atol=1e-5)
    values = [load_reward_model(f"{name}_value").state_dict() for name in ("ours", "original")]
    for name, weight in values[0].items():
        torch.testing.assert_close(weight, values[1][name], rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- the stage


def test_main_writes_a_run_and_a_standard_checkpoint(world, workdir, capsys):
    metrics = ppo.main(world.ppo_args(workdir / "policy", num_updates=3, eval_freq=2, print_sample_output_freq=2))
    policy, tokenizer = AutoModelForCausalLM.from_pretrained("policy"), AutoTokenizer.from_pretrained("policy")
    assert tokenizer.pad_token == "[PAD]" and policy.config.vocab_size >= len(tokenizer)
    before = AutoModelForCausalLM.from_pretrained(world.sft).state_dict()
    assert any(not torch.equal(v, before[k]) for k, v in policy.state_dict().items())
    assert str(world.folder) not in "".join(p.read_text() for p in (workdir / "policy").glob("*config*.json"))
    run = workdir / "runs/policy"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["policy/first_pass_ratio_error"] < 1e-4  # fp32: what sampling recorded is what training computes
    assert abs(lines[0]["objective/kl"]) < 1e-4  # the policy still is the reference
    assert lines[0]["train/ppo/lr"] == pytest.approx(1e-3) and lines[2]["train/ppo/lr"] == pytest.approx(1e-3 / 3)
    assert all(np.isfinite(v) for line in lines for v in line.values())
    table = pandas.read_parquet(run / "tables/validation.parquet")
    assert len(table) == 20 and set(table) >= {"query", "response", "reference", "score", "reference_score"}
    assert table["query"].nunique() == 20
    summary = json.loads((run / "summary.json").read_text())
    assert summary["state"] == "finished" and summary["metrics"]["eval/ppo/validation/score"] == pytest.approx(
        metrics["eval/ppo/validation/score"]
    )
    assert json.loads((run / "args.json").read_text())["batch_size"] == 8
    assert list((run / "tensorboard").iterdir())
    assert "WARNING" not in capsys.readouterr().out


def test_prompts_come_in_a_new_order_and_dropout_is_off_in_training(world, workdir, monkeypatch):
    """Checkpoints whose configuration asks for dropout: the first-pass ratio is 1. Prompts: `epoch_order`."""
    for name in ("sft", "reward"):
        folder = workdir / f"{name}_with_dropout"
        shutil.copytree(getattr(world, name), folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"hidden_dropout": 0.5, "attention_dropout": 0.5}
        (folder / "config.json").write_text(json.dumps(config))
    prompts, rollout = [], ppo.make_rollout

    def remember(*given):
        prompts.extend(given[1].rows.tolist())
        return rollout(*given)

    monkeypatch.setattr(ppo, "make_rollout", remember)
    models = {"sft_model_path": "sft_with_dropout", "reward_model_path": "reward_with_dropout"}
    ppo.main(world.ppo_args(workdir / "policy", run_eval=False, seed=4, **models))
    lines = [json.loads(line) for line in (workdir / "runs/policy/metrics.jsonl").read_text().splitlines()]
    assert all(line["policy/first_pass_ratio_error"] < 1e-4 for line in lines[:2])
    rows = len(load_dataset(world.sft_rows)["train"])
    for update in (0, 1):
        assert sorted(prompts[8 * update : 8 * update + 8]) == sorted(
            epoch_order(rows, 16, 4)[8 * update : 8 * update + 8]
        )


def test_both_networks_begin_where_their_checkpoints_are(world, workdir):
    """At a learning rate of 0 the policy is SFT's to the bit, and the value network the reward model, head included."""
    args = world.ppo_args(workdir / "policy", lr=0.0, value_output_dir="value", num_updates=1, run_eval=False)
    ppo.main(args)
    for ours, source, kind in (("policy", world.sft, AutoModelForCausalLM), ("value", world.reward, None)):
        models = [kind.from_pretrained(p) if kind else load_reward_model(p) for p in (ours, source)]
        weights = [model.state_dict() for model in models]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    biases = [load_reward_model(path).config.reward_bias for path in ("value", world.reward)]
    assert biases[0] == pytest.approx(biases[1], abs=1e-6)


def test_learns_what_is_rewarded(world, workdir):
    ppo.main(world.ppo_args(workdir / "policy", num_updates=12, run_eval=False, **world.easy_task()))
    lines = [json.loads(line) for line in (workdir / "runs/policy/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["objective/scores"] > lines[0]["objective/scores"] + 0.2


def test_every_argument_of_ppo_changes_something(world, workdir):
    """Settings of the algorithm reach the weights: each of these gives other weights than the default."""
    base = {"num_updates": 1, "run_eval": False, "max_grad_norm": 1.0}
    changes = {
        "default": {}, "kl": {"ppo": PpoHParams(kl_coef=5.0)},
        "gamma": {"ppo": PpoHParams(gamma=0.5)}, "cliprange": {"ppo": PpoHParams(cliprange=1e-3)},
        "vf": {"ppo": PpoHParams(vf_coef=10.0)},
        "whiten": {"ppo": PpoHParams(whiten_rewards=True)}, "epochs": {"ppo": PpoHParams(noptepochs=1)},
        "mini": {"nminibatches": 2, "local_micro_batch_size": 2}, "temperature": {"temperature": 1.0},
        "penalty": {"penalty_reward_value": -9.0}, "lam": {"ppo": PpoHParams(lam=0.1)}, "seed": {"seed": 1},
        "eps": {"eps": 1e-2}, "lr": {"lr": 2e-3}, "weight_decay": {"weight_decay": 0.5},
        "no penalty": {"non_eos_penalty": False}, "adam": {"optimizer": "adam", "weight_decay": 0.5},
        "truncate": {"truncate_token": " the"}, "warm up": {"warm_up_steps": 2},
        "clip value": {"ppo": PpoHParams(cliprange_value=1e-3)}, "length": {"response_length": 12},
        "norm": {"max_grad_norm": 0.01},
    }  # fmt: skip
    weights = {}
    for name, change in changes.items():
        ppo.main(world.ppo_args(workdir / name, value_output_dir=f"{name} value", **(base | change)))
        models = (AutoModelForCausalLM.from_pretrained(name), load_reward_model(f"{name} value"))
        weights[name] = torch.cat([p.flatten() for model in models for p in model.parameters()])
    for name, found in weights.items():
        if name != "default":
            assert not torch.equal(found, weights["default"]), name
    assert not torch.equal(weights["adam"], weights["weight_decay"])  # adamw with the same decay


def test_layout_does_not_change_the_result(world, workdir):
    """Micro batch 8, 4 or 1, rollout batches of any size, offloaded or not: the same responses and weights."""
    found = {}
    layouts = {"a": (8, 8, {}), "b": (1, 3, {"offload": True}), "c": (4, 1, {"gradient_checkpointing": True})}
    for name, (micro, rollout, more) in layouts.items():
        ppo.main(
            world.ppo_args(
                workdir / name, local_micro_batch_size=micro, local_rollout_forward_batch_size=rollout, **more
            )
        )
        found[name] = AutoModelForCausalLM.from_pretrained(name).state_dict()
    for name in ("b", "c"):
        for key, weight in found["a"].items():
            torch.testing.assert_close(found[name][key], weight, rtol=0, atol=1e-5)
        a, b = (pandas.read_parquet(f"runs/{run}/tables/validation.parquet") for run in ("a", name))
        assert a["response"].tolist() == b["response"].tolist()


def test_defaults_are_those_of_the_paper():
    """Table of details.md: optimiser in all stages, PPO's coefficients, sampling."""
    for args in (ppo.Args(), reward.Args(), sft.Args()):
        assert (args.optimizer, args.lr, args.eps, args.weight_decay) == ("adamw", 3e-6, 1e-5, 0.01)
        assert args.scheduler == ("linear" if isinstance(args, ppo.Args) else "cosine") and args.warm_up_steps == 0
    coefficients = PpoHParams()
    assert (coefficients.noptepochs, coefficients.kl_coef, coefficients.vf_coef) == (4, 0.05, 0.1)
    assert (coefficients.gamma, coefficients.lam, coefficients.whiten_rewards) == (1.0, 0.95, False)
    assert (coefficients.cliprange, coefficients.cliprange_value) == (0.2, 0.2)
    args = ppo.Args()
    sampling = (args.temperature, args.response_length, args.non_eos_penalty, args.penalty_reward_value)
    assert sampling == (0.7, 53, True, -1)


def test_default_batches_are_the_paper_s_on_any_number_of_processes(monkeypatch):
    """Global batches of 128, 64 and 512; episodes of one pass, one pass, a million (1,953 updates)."""

    def after_sizes(*_):
        raise InterruptedError

    for processes in (1, 2, 8):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        for stage, batch, rows, updates in ((sft, 128, 116_722, 912), (reward, 64, 92_858, 1_451)):
            args = stage.Args()
            monkeypatch.setattr(RunFolder, "check", after_sizes)  # what `check_args` does next
            with pytest.raises(InterruptedError):
                stage.check_args(args)
            fill_episodes(args, rows)
            cut = processes * args.gradient_accumulation_steps * args.local_micro_batch_size
            assert (args.batch_size, cut, args.total_episodes, args.num_updates) == (batch, batch, rows, updates)
        args = ppo.Args()
        derive_sizes(args, default_batch_size=512)
        ppo.derive_updates(args)
        cut = processes * args.nminibatches * args.gradient_accumulation_steps * args.local_micro_batch_size
        assert (args.batch_size, cut, args.nminibatches) == (512, 512, 1)
        assert (args.total_episodes, args.num_updates) == (1_000_000, 1_953)


@pytest.mark.parametrize("native", [False, True])
def test_precision_follows_the_hardware(native, monkeypatch, capsys):
    """`auto` is bf16 only where the processor multiplies in it; asked for elsewhere, it is warned of with its price."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert precision.choose_precision("auto") == ("bf16" if native else "no")
    assert precision.choose_precision("fp32") == "no"
    assert capsys.readouterr().out == ""
    assert precision.choose_precision("bf16") == "bf16"
    said = capsys.readouterr().out
    assert bool(re.fullmatch(r"warning: no native bf16 here; a product took \d+ times that of fp32\n", said)) != native


def test_a_run_on_the_cpu_of_a_machine_with_gpus_asks_the_cpu(monkeypatch):
    """ACCELERATE_USE_CPU: precision, process group and memory follow the device that computes."""

    def never(*_, **__):
        raise AssertionError("the GPU was asked")

    expected = precision.choose_precision("auto")  # there is no GPU here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.on_gpu()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", never)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert not machine.on_gpu() and precision.choose_precision("auto") == expected
    handlers = []
    monkeypatch.setattr(
        training, "Accelerator", lambda kwargs_handlers, **_: handlers.extend(kwargs_handlers) or never()
    )
    with pytest.raises(AssertionError):
        training.launch(SimpleNamespace(world_size=2, precision="auto"), "rows")
    assert [handler.backend for handler in handlers] == ["gloo"]


def test_stops_on_numbers_that_are_not_finite(world, workdir):
    model = load_reward_model(world.reward)
    model.score.weight.data.fill_(3e38)  # finite, unlike what comes of it
    model.save_pretrained("bad")
    AutoTokenizer.from_pretrained(world.reward).save_pretrained("bad")
    with pytest.raises(SystemExit, match="update 1 is not finite; the batch is saved as"):
        ppo.main(world.ppo_args(workdir / "policy", reward_model_path="bad"))
    saved = torch.load(next((workdir / "runs/policy").glob("bad_batch_update_1_*.pt")), weights_only=False)
    assert len(saved["responses"]) == len(saved["query_rows"]) == len(saved["queries"]) == 4
    assert json.loads((workdir / "runs/policy/summary.json").read_text())["state"] == "failed"
    assert not (workdir / "policy").exists()


def test_stops_on_a_gradient_that_is_not_finite(world, workdir, monkeypatch):
    """The gradient is a sum over the mini-batch: all its episodes are saved, not those of the last micro batch."""
    plain = ppo.micro_batch_loss

    def steep(model, *rest):
        loss, values, error = plain(model, *rest)
        return loss + (0.0 * loss).abs().sqrt(), values, error  # adds 0, whose slope is infinite

    monkeypatch.setattr(ppo, "micro_batch_loss", steep)
    with pytest.raises(SystemExit, match="error: gradient of step 1 at update 1 is not finite; the batch is saved as"):
        ppo.main(world.ppo_args(workdir / "policy", local_micro_batch_size=2))
    saved = torch.load(next((workdir / "runs/policy").glob("bad_batch_update_1_*.pt")), weights_only=False)
    assert len(saved["responses"]) == len(set(saved["query_rows"])) == len(saved["queries"]) == 8


def test_evaluations_on_the_way_and_the_value_network_are_kept(world, workdir):
    args = world.ppo_args(workdir / "policy", num_updates=3, eval_freq=1, value_output_dir="value")
    final = ppo.main(args)
    tables = sorted(p.stem for p in (workdir / "runs/policy/tables").glob("*.parquet"))
    assert tables == ["validation", "validation_1", "validation_2"]
    assert len(pandas.read_parquet("runs/policy/tables/validation_1.parquet")) == args.num_eval_rows
    # it loads as a reward model, and is no longer the one it started from
    value, start = load_reward_model("value"), load_reward_model(world.reward)
    bias, start_bias = value.config.reward_bias, start.config.reward_bias
    moved = [not torch.equal(a, b) for a, b in zip(value.parameters(), start.parameters())]
    assert any(moved) and bias != start_bias and abs(bias - start_bias) < 0.1
    assert len(AutoTokenizer.from_pretrained("value")) == len(AutoTokenizer.from_pretrained("policy"))
    summary = json.loads((workdir / "runs/policy/summary.json").read_text())
    policy = AutoModelForCausalLM.from_pretrained("policy")
    assert summary["parameters"] == sum(p.numel() for p in policy.parameters()) and math.isfinite(final["objective/kl"])
