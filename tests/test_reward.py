"""Reward model: head, loss, shared prefix, accuracies, normalisation, and small runs of the whole stage."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from conftest import SHARED
from datasets import Dataset, load_dataset
from test_ppo_left_padding import ARCHITECTURES, EOS, PAD, golden, needs_golden, tiny_reward
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    pipeline,
)

from summarize_from_feedback_details import ppo_left_padding, reward
from summarize_from_feedback_details.common.packed_rows import use_packed_attention
from summarize_from_feedback_details.common.reward_models import load_reward_model, read_rewards
from summarize_from_feedback_details.reward import (
    RewardModel,
    init_head,
    pair_rewards,
    preference_losses,
    separate_rows,
    shared_prefix_rows,
)

PAIRS = [
    ([3, 4, 5, 6, EOS], [3, 4, 5, 9, 9, 8, EOS]),
    ([8, 9, EOS], [8, EOS]),
    ([1, 2, 3, 4, 5, 6, 7, EOS], [1, 2, 3, 4, 5, 6, EOS]),
    ([5, 5, EOS], [5, 5, EOS]),  # the same text twice
]


@needs_golden
def test_golden_reward():
    g = golden("tiny_par")
    model = AutoModelForSequenceClassification.from_pretrained(
        SHARED / "golden/tiny_par", num_labels=1, dtype=torch.float32
    ).eval()
    model.score.weight.data.copy_(g["scalar_w"])
    bias = float(g["scalar_b"]) - g["scalar_bias"]
    rows = [[i for i in row.tolist() if i != PAD] for row in g["query_responses"]]
    with torch.no_grad():
        inputs, ends = separate_rows(rows, False, "cpu")
        rewards = RewardModel(model)(inputs, torch.tensor(ends)) + bias
    torch.testing.assert_close(rewards, g["reward"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rewards, g["reward_rp"], rtol=1e-5, atol=1e-5)
    loss = preference_losses(rewards[:3], rewards[3:]).mean()
    torch.testing.assert_close(loss, g["rm_loss_first3_vs_last3"].float(), rtol=1e-5, atol=1e-5)


def test_loss_by_hand():
    losses = preference_losses(torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0.0, 0.0, 1.0]))
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(2), math.log(1 + math.exp(2))])


def test_report_by_hand():
    """Right by 2, a tie, and wrong by 1: the tie is not right, in all and in its groups."""
    confidence = [{"confidence": c} for c in (9, 9, None)]
    policies = {"chosen_policy": ["ref", "sup", "sup"], "rejected_policy": ["sup", "ref", "sup"]}
    rows = Dataset.from_dict({"batch": ["1", "1", "2"], "extra": confidence, **policies})
    metrics, table = reward.report("validation", rows, np.array([1.0, 0.5, -1.0]), np.array([-1.0, 0.5, 0.0]))
    losses = [math.log(1 + math.exp(-margin)) for margin in (2.0, 0.0, -1.0)]
    expected = {"accuracy": 1 / 3, "loss": np.mean(losses), "margin": 1 / 3, "pairs": 3}
    assert metrics == pytest.approx({f"eval/rm/validation/{name}": value for name, value in expected.items()})
    groups = [("all", "", 3, 1 / 3), ("batch", "1", 2, 0.5), ("batch", "2", 1, 0.0)]
    groups += [("confidence", "9", 2, 0.5), ("confidence", "?", 1, 0.0)]
    groups += [("policies", "ref--sup", 2, 0.5), ("policies", "sup--sup", 1, 0.0)]
    assert table == [("validation", *group) for group in groups]


def test_head_initialisation():
    """N(0, 1/sqrt(d+1)), not N(0, 1/(d+1)); no bias."""
    torch.manual_seed(0)
    model = tiny_reward()
    model.score = torch.nn.Linear(4096, 1, bias=False)
    model.config.hidden_size = 4096
    init_head(model)
    assert model.score.weight.std().item() == pytest.approx(1 / math.sqrt(4097), rel=0.05)
    assert tiny_reward().score.bias is None


def test_training_begins_with_that_head(world, workdir):
    """At a learning rate of 0 the checkpoint has the head that training began with."""
    reward.main(world.reward_args(workdir / "rm", lr=0.0, total_episodes=8, run_eval=False))
    weight = AutoModelForSequenceClassification.from_pretrained("rm").score.weight
    assert weight.std().item() == pytest.approx(1 / math.sqrt(weight.shape[1] + 1), rel=0.3)


def test_a_tokenizer_as_large_as_the_embedding(world, workdir):
    """Its pad id lies behind the embedding: the reward model loads, and PPO goes on with it."""
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    assert "[PAD]" not in tokenizer.get_vocab()  # so the stages add it with the id len(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained("llama")
    tokenizer.save_pretrained("llama")
    reward.main(world.reward_args(workdir / "rm", base_model="llama", sft_model_path="llama", run_eval=False))
    model = load_reward_model("rm")
    assert model.config.pad_token_id is None
    models = {"base_model": "llama", "sft_model_path": "llama", "reward_model_path": "rm"}
    found = ppo_left_padding.main(world.ppo_args(workdir / "policy", num_updates=1, run_eval=False, **models))
    assert math.isfinite(found["objective/kl"])


def test_shared_prefix_layout_by_hand():
    inputs, ends = shared_prefix_rows([*PAIRS[:2], ([1, 2], [3])], "cpu")
    assert inputs["input_ids"][0].tolist() == [3, 4, 5, 6, EOS, 9, 9, 8, EOS, 8, 9, EOS, EOS, 1, 2, 3]
    assert inputs["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 0, 1, 2, 1, 0, 1, 0]
    # prefix of 3, the rest of chosen and of rejected behind it; ... ; nothing in common
    assert inputs["pieces"] == [(3, None), (2, 0), (4, 0), (1, None), (2, 3), (1, 3), (2, None), (1, None)]
    assert ends == [4, 11, 14, 8, 12, 15]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shared_prefix_gives_the_same_rewards_and_gradients(name):
    """Shared and packed, apart and packed, apart and padded; and each row by itself, through the plain class."""
    results = []
    for packed, shared in ((True, True), (True, False), (False, False)):
        model = RewardModel(tiny_reward(name))
        assert not packed or use_packed_attention(model.model)
        chosen, rejected = pair_rewards(model, PAIRS, packed, shared, "cpu")
        preference_losses(chosen, rejected).mean().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((chosen.detach(), rejected.detach(), gradients))
    for other in results[1:]:
        for ours, theirs in zip(results[0], other):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    chosen, rejected, _ = results[0]
    assert chosen[3] == pytest.approx(rejected[3].item(), abs=1e-6)
    model.model.config.pad_token_id = PAD
    for i, pair in enumerate(PAIRS):
        for ours, tokens in zip((chosen[i], rejected[i]), pair):
            plain = model.model(torch.tensor([tokens])).logits[0, 0]
            torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)


def test_main_learns_normalises_and_writes_a_standard_checkpoint(world, workdir, capsys):
    metrics = reward.main(world.reward_args(workdir / "rm", total_episodes=100, num_eval_rows=None, eval_freq=6))
    run = workdir / "runs/rm"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum("train/rm/loss" in line and "train/rm/lr" in line for line in lines) == 13
    assert lines[0]["update"] == 0 and "eval/rm/validation/accuracy" in lines[0]
    table = pandas.read_parquet(run / "tables/validation.parquet")
    assert len(table) == 80 == metrics["eval/rm/validation/pairs"]
    correct = table["chosen_reward"] > table["rejected_reward"]
    assert metrics["eval/rm/validation/accuracy"] == pytest.approx(correct.mean())
    accuracy = pandas.read_parquet(run / "tables/accuracy.parquet")
    for group in ("batch", "split", "confidence", "policies"):
        part = accuracy[(accuracy["split"] == "validation") & (accuracy["group"] == group)]
        assert part["pairs"].sum() == 80
        assert (part["accuracy"] * part["pairs"]).sum() == pytest.approx(correct.sum())
    assert (accuracy["split"] == "validation_cnndm").any()
    # normalisation: stored in the config, applied by our loader, mean 0 over the demonstrations
    model = load_reward_model("rm")
    bias = model.config.reward_bias
    assert bias == pytest.approx(-metrics["eval/rm/demonstrations/before/mean"])
    demonstrations = load_dataset(world.sft_rows)["train"].select(range(40))
    tokenizer = AutoTokenizer.from_pretrained("rm")
    tokens = torch.tensor(demonstrations["query_reference_response_token"])
    with torch.no_grad():
        rows = [[i for i in row if i != tokenizer.pad_token_id] for row in tokens.tolist()]
        rewards = read_rewards(model.eval(), rows)
    assert rewards.mean().abs() < 1e-4 and rewards.std() > 1e-3
    # plain classes and a pipeline read it: the logit is the reward before normalisation
    plain = AutoModelForSequenceClassification.from_pretrained("rm").eval()
    assert plain.config.num_labels == 1
    text = demonstrations["query_reference_response"][0]
    scorer = pipeline("text-classification", model="rm", function_to_apply="none", device="cpu")
    assert scorer(text)[0]["score"] + bias == pytest.approx(rewards[0].item(), abs=1e-4)
    both = scorer([text, demonstrations["query_reference_response"][1]], batch_size=2)  # padded by the pipeline
    assert both[1]["score"] + bias == pytest.approx(rewards[1].item(), abs=1e-4)
    assert "confidence" in capsys.readouterr().out
    assert str(world.folder) not in "".join(p.read_text() for p in (workdir / "rm").glob("*config*.json"))


def test_learns_to_prefer(world, workdir):
    """A few passes over few pairs are learned by heart: the loss falls far below chance."""
    sizes = {"batch_size": 20, "local_micro_batch_size": 20, "total_episodes": 2000, "num_train_epochs": 10}
    reward.main(world.reward_args(workdir / "rm", lr=3e-3, run_eval=False, **sizes))
    lines = [json.loads(line) for line in (workdir / "runs/rm/metrics.jsonl").read_text().splitlines()]
    assert np.mean([line["train/rm/loss"] for line in lines[-6:-1]]) < 0.5


def test_layout_does_not_change_the_result(world, workdir):
    found, tables = {}, {}
    layouts = {"a": {"local_micro_batch_size": 8}, "b": {"local_micro_batch_size": 1},
               "c": {"shared_prefix": False}, "d": {"gradient_checkpointing": True}}  # fmt: skip
    for name, change in layouts.items():
        reward.main(world.reward_args(workdir / name, total_episodes=28, **change))
        found[name] = AutoModelForSequenceClassification.from_pretrained(name).state_dict()
        tables[name] = pandas.read_parquet(f"runs/{name}/tables/validation.parquet")["chosen_reward"]
    for name in ("b", "c", "d"):
        for key, weight in found["a"].items():
            torch.testing.assert_close(found[name][key], weight, rtol=0, atol=1e-5)
        np.testing.assert_allclose(tables[name], tables["a"], rtol=0, atol=1e-4)


def test_stops_on_numbers_that_are_not_finite(world, workdir, monkeypatch):
    """A loss: its micro batch is saved. A gradient, which is a sum over the batch: all its pairs."""
    plain = reward.preference_losses
    steep = lambda *given: plain(*given) + (0.0 * plain(*given)).abs().sqrt()  # adds 0, whose slope is infinite
    for what, losses, saved in (("loss", lambda *given: plain(*given) + math.inf, 2), ("gradient", steep, 8)):
        monkeypatch.setattr(reward, "preference_losses", losses)
        with pytest.raises(SystemExit, match=f"error: {what} at update 1 is not finite; the batch is saved as"):
            reward.main(world.reward_args(workdir / what, local_micro_batch_size=2, run_eval=False))
        found = torch.load(next((workdir / "runs" / what).glob("bad_batch_*.pt")), weights_only=False)
        assert len(set(found["rows"])) == len(found["pairs"]) == saved
        assert json.loads((workdir / f"runs/{what}/summary.json").read_text())["state"] == "failed"
        assert not (workdir / what).exists()


def test_normalisation_reads_the_rows_asked_for(world, workdir):
    bias = {}
    for rows in (10, 40):
        reward.main(world.reward_args(workdir / str(rows), run_eval=False, num_normalization_rows=rows))
        bias[rows] = load_reward_model(str(rows)).config.reward_bias
    assert bias[10] != bias[40]


def test_articles_that_are_too_long_or_not_wanted_are_left_out(world, workdir, capsys):
    """CNN/DM is only evaluated on: a model whose context is too short for it can be trained all the same."""
    shutil.copytree(world.sft, "short")
    config = json.loads(Path("short/config.json").read_text())
    rows = load_dataset(world.pairs)
    longest = {split: max(map(max, zip(rows[split]["query_chosen_token_len"], rows[split]["query_rejected_token_len"])))
               for split in ("train", "validation", "validation_cnndm")}  # fmt: skip
    context = max(longest["train"], longest["validation"], 56)  # queries have 56 tokens at most
    assert context < longest["validation_cnndm"]
    Path("short/config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    for name, change, said in (("short", {"sft_model_path": "short"}, True), ("plain", {"eval_cnndm": False}, False)):
        found = reward.main(world.reward_args(workdir / f"{name}_rm", total_episodes=8, **change))
        assert ("validation_cnndm is left out" in capsys.readouterr().out) == said
        assert "eval/rm/validation/accuracy" in found and "eval/rm/validation_cnndm/accuracy" not in found
