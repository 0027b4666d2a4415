"""SFT: the loss by hand and against golden numbers, batches, ROUGE, and small runs of the whole stage."""

import json
import math
from types import SimpleNamespace

import pandas
import pytest
import torch
from conftest import SHARED
from test_packed_rows import compare_gradients
from test_ppo_left_padding import ARCHITECTURES, EOS, PAD, golden, needs_golden, tiny_policy
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from summarize_from_feedback_details import sft
from summarize_from_feedback_details.common.logprobs import token_logprobs
from summarize_from_feedback_details.common.packed_rows import use_packed_attention
from summarize_from_feedback_details.common.sampling import model_inputs
from summarize_from_feedback_details.sft import Policy, batch_losses, read_rows, rouge_means, sft_losses


def padded_losses(logits, tokens, counted):
    """`sft_losses` of padded rows: logits [B, T - 1, V] that predict tokens [B, T]; those `counted` weigh 1."""
    counted = counted[:, 1:]
    logprobs = token_logprobs(logits[counted], tokens[:, 1:][counted], 1.0)
    counts = counted.sum(1)
    return sft_losses(logprobs, torch.ones_like(logprobs), counts.tolist()), counts


@needs_golden
@pytest.mark.parametrize("layout", ["query_responses", "right_padded"])
def test_golden_sft_loss(layout):
    """Our per-row losses, weighted as the original weighs a micro batch of six rows: the mean over all tokens."""
    g = golden("tiny_par")
    model = AutoModelForCausalLM.from_pretrained(SHARED / "golden/tiny_par", dtype=torch.float32).eval()
    tokens = g[layout]
    with torch.no_grad():
        logits = model(**model_inputs(tokens, PAD)).logits
    real = tokens != PAD
    rows, counts = padded_losses(logits[:, :-1], tokens, real & (real.cumsum(1) > 1))  # nothing predicts the first
    torch.testing.assert_close((rows * counts).sum() / counts.sum(), g["sft_loss"].float(), rtol=0, atol=1e-5)
    # and ours, the mean of row means, is the original at micro batch 1: each row's own token mean
    nll = -logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None].clamp(max=63))[..., 0]
    counted = (tokens != PAD)[:, 1:] & (tokens != PAD)[:, :-1]
    by_hand = torch.stack([nll[i][counted[i]].mean() for i in range(6)])
    torch.testing.assert_close(rows, by_hand, rtol=0, atol=1e-5)


@needs_golden
def test_golden_sft_eval_loss():
    """The original's evaluation loss also counts each left-padded row's first token, predicted from a pad."""
    g = golden("tiny_par")
    tokens = g["query_responses"]
    rows, counts = padded_losses(g["logits"][:, :-1], tokens, tokens != PAD)
    torch.testing.assert_close((rows * counts).sum() / counts.sum(), g["sft_eval_loss"].float(), rtol=0, atol=1e-5)


def test_weights_and_loss_by_hand():
    """A row [5, 6, | 7, EOS] under a model that says 2 more for the 7 than for the other 63 ids, and nothing else."""

    class Says(torch.nn.Module):
        config = SimpleNamespace(_attn_implementation="sdpa")

        def forward(self, input_ids, **_):
            logits = torch.zeros(*input_ids.shape, 64)
            logits[:, 1, 7] = 2.0
            return SimpleNamespace(logits=logits)

    flat, seven = math.log(64), math.log(63 + math.exp(2.0)) - 2.0
    for weight, expected in ((0.0, (seven + flat) / 2), (0.5, (0.5 * flat + seven + flat) / 2.5)):
        loss = batch_losses(Policy(Says()), [([5, 6, 7, EOS], 2)], weight, False, "cpu")
        assert loss.item() == pytest.approx(expected, abs=1e-6)


def rows_of(pairs, width=12):
    pad = lambda row: row + [PAD] * (width - len(row))
    return {
        "query_reference_response_token": [pad(q + r) for q, r in pairs],
        "query_reference_response_token_response_label": [pad([PAD] * len(q) + r) for q, r in pairs],
    }


PAIRS = [([3, 4, 5], [6, EOS]), ([8], [9, 10, 11, EOS]), ([1, 2, 3, 4, 5, 6], [EOS])]


def test_read_rows_strips_pads():
    assert read_rows(rows_of(PAIRS), PAD) == [([*query, *response], len(response)) for query, response in PAIRS]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("query_loss_weight", [0.0, 1.0])
@pytest.mark.parametrize("packed", [True, False])
def test_loss_of_a_row_does_not_depend_on_its_batch(name, query_loss_weight, packed):
    """Neither packing nor padding nor the shortcut that computes logits only where a weight is not 0 changes a loss."""
    model, rows = tiny_policy(name), read_rows(rows_of(PAIRS), PAD)
    plain = tiny_policy(name)
    assert not packed or use_packed_attention(model)
    losses = lambda rows: batch_losses(Policy(model), rows, query_loss_weight, packed, "cpu")
    together, expected = losses(rows), []
    for i, (query, response) in enumerate(PAIRS):
        torch.testing.assert_close(losses([rows[i]])[0], together[i], rtol=0, atol=1e-5)
        whole = torch.tensor([query + response])
        nll = -plain(whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None])[:, 0]
        weight = torch.tensor([query_loss_weight] * (len(query) - 1) + [1.0] * len(response))
        expected.append((nll * weight).sum() / weight.sum())
        torch.testing.assert_close(together[i], expected[i], rtol=0, atol=1e-5)
    together.sum().backward()
    torch.stack(expected).sum().backward()
    compare_gradients(model, plain)


def test_rouge_by_hand():
    found = rouge_means(["the cat sat", "a b"], ["the cat sat down", "c d"])
    # first row: 3 of 3 and 3 of 4 unigrams, F = 6/7; bigrams 2 of 2 and 2 of 3, F = 4/5; second row: nothing
    assert found["rouge1"] == pytest.approx(3 / 7) and found["rouge2"] == pytest.approx(2 / 5)
    assert found["rougeL"] == pytest.approx(3 / 7) and found["rougeLsum"] == pytest.approx(3 / 7)
    # words are not stemmed, and their order does not matter to ROUGE-1 alone
    assert rouge_means(["cats running"], ["cat runs"])["rouge1"] == 0.0
    turned = rouge_means(["b a"], ["a b"])
    assert (turned["rouge1"], turned["rouge2"], turned["rougeL"]) == (1.0, 0.0, 0.5)


def test_main_learns_and_writes_a_standard_checkpoint(world, workdir, capsys):
    metrics = sft.main(
        world.sft_args(workdir / "policy", lr=3e-3, total_episodes=100, eval_freq=5, print_sample_output_freq=6)
    )
    lines = [json.loads(line) for line in (workdir / "runs/policy/metrics.jsonl").read_text().splitlines()]
    updates = [line["update"] for line in lines if "train/sft/loss" in line and line["update"] <= 13]
    assert updates == list(range(1, 14))  # 12 whole batches of 8 and one of 4
    assert lines[-1]["validation/sft/loss"] < lines[0]["validation/base/loss"] - 1.0
    assert set(metrics) >= {"validation/sft/rouge/rougeL", "test/sft/rouge/rougeL", "validation/sft/rouge/rougeLsum"}
    assert sum("train/sft/episode" in line for line in lines) == 13
    assert [line["train/sft/episode"] for line in lines if "train/sft/episode" in line][-1] == 100
    tables = pandas.read_parquet("runs/policy/tables/validation.parquet")
    assert list(tables)[:3] == ["query", "response", "reference"] and len(tables) == 20
    base = pandas.read_parquet("runs/policy/tables/base_validation.parquet")  # of the same posts
    assert list(base["query"]) == list(tables["query"]) and list(base["response"]) != list(tables["response"])
    found = rouge_means(list(base["response"]), list(base["reference"]))
    assert found["rougeL"] == pytest.approx(lines[0]["validation/base/rouge/rougeL"])
    out = capsys.readouterr().out
    assert "references, shuffled" in out and "base model" in out and "runs/policy/tables/test.parquet" in out
    # plain classes read it
    tokenizer = AutoTokenizer.from_pretrained("policy")
    writer = pipeline("text-generation", model="policy", tokenizer=tokenizer, device="cpu")
    text = writer(tables["query"][0], max_new_tokens=24, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert text.strip() == tables["response"][0]  # greedy, and the stage's own sample at temperature 0.01


def test_layout_does_not_change_the_result(world, workdir):
    found = {}
    for name, change in {"a": {"local_micro_batch_size": 8}, "b": {"local_micro_batch_size": 1},
                         "c": {"local_micro_batch_size": 4, "gradient_checkpointing": True}}.items():  # fmt: skip
        sft.main(world.sft_args(workdir / name, total_episodes=28, **change))
        found[name] = AutoModelForCausalLM.from_pretrained(name).state_dict()
    for name in ("b", "c"):
        for key, weight in found["a"].items():
            torch.testing.assert_close(found[name][key], weight, rtol=0, atol=1e-5)
        tables = [pandas.read_parquet(f"runs/{run}/tables/test.parquet")["response"].tolist() for run in ("a", name)]
        assert tables[0] == tables[1]


def test_gradient_clipping_and_weight_decay_have_an_effect(world, workdir):
    found = {}
    for name, change in {"a": {}, "b": {"max_grad_norm": 1e-3, "eps": 1.0}, "c": {"weight_decay": 10.0}}.items():
        change = {"eps": 1.0} | change if name == "a" else change
        sft.main(
            world.sft_args(workdir / name, total_episodes=8, run_eval=False, lr=0.1 if name != "c" else 1e-3, **change)
        )
        found[name] = AutoModelForCausalLM.from_pretrained(name).state_dict()["gpt_neox.embed_in.weight"]
    start = AutoModelForCausalLM.from_pretrained(world.base).state_dict()["gpt_neox.embed_in.weight"]
    # with eps 1 Adam's step is nearly lr * gradient: clipping shrinks it
    assert (found["b"] - start).norm() < 0.5 * (found["a"] - start).norm()
    unused = (found["a"] == start).all(1)  # rows of the embedding without gradient only decay
    assert unused.any()
    torch.testing.assert_close(found["c"][unused], start[unused] * (1 - 1e-3 * 10.0), rtol=1e-5, atol=1e-7)


def test_tracking_offline(world, workdir, monkeypatch, capfd):
    """W&B gets every line of metrics.jsonl: a table logged in between must not push its step ahead."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    sft.main(world.sft_args(workdir / "policy", total_episodes=16, print_sample_output_freq=1, track=True))
    assert list((workdir / "runs/policy/wandb").glob("offline-run-*/*.wandb"))
    output = "".join(capfd.readouterr())
    assert "wandb" in output  # it does speak
    assert "less than the current step" not in output and "WARNING" not in output.replace("WARNING: update", "")


def test_stops_on_numbers_that_are_not_finite(world, workdir):
    import shutil

    shutil.copytree(world.base, "bad")
    model = AutoModelForCausalLM.from_pretrained("bad")
    model.gpt_neox.final_layer_norm.weight.data.fill_(3e38)  # finite, unlike what comes of it
    model.save_pretrained("bad")
    with pytest.raises(SystemExit, match="error: loss at update 1 is not finite"):
        sft.main(world.sft_args(workdir / "policy", base_model="bad", run_eval=False))
    assert json.loads((workdir / "runs/policy/summary.json").read_text())["state"] == "failed"
    saved = torch.load(next((workdir / "runs/policy").glob("bad_batch_*.pt")), weights_only=False)
    assert len(saved["rows"]) == len(saved["batch"]) == 4 and all(tokens for tokens, _ in saved["batch"])
    # starting again does the same, and keeps what the failed run wrote
    with pytest.raises(SystemExit, match="error: loss at update 1 is not finite"):
        sft.main(world.sft_args(workdir / "policy", base_model="bad", run_eval=False))
    assert list((workdir / "runs/policy").glob("bad_batch_*.pt"))


def test_stops_on_a_gradient_that_is_not_finite(world, workdir, monkeypatch):
    """The gradient is a sum over the batch: all its rows are saved, not those of the last micro batch."""
    plain = sft.batch_losses

    def steep(*given):
        losses = plain(*given)
        return losses + (0.0 * losses).abs().sqrt()  # adds 0, whose slope is infinite

    monkeypatch.setattr(sft, "batch_losses", steep)
    with pytest.raises(SystemExit, match="error: gradient at update 1 is not finite; the batch is saved as"):
        sft.main(world.sft_args(workdir / "policy", local_micro_batch_size=2, run_eval=False))
    saved = torch.load(next((workdir / "runs/policy").glob("bad_batch_*.pt")), weights_only=False)
    assert len(set(saved["rows"])) == len(saved["batch"]) == 8
