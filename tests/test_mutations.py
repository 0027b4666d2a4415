"""Small mistakes inside a loop that training survives: each test fails on some of the mutations in docs/testing.md.

What a stage writes is compared with what plain classes of transformers compute from its checkpoints and its dataset.
"""

import itertools
import json
import math
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, load_dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from summarize_from_feedback_details import ppo_left_padding as ppo
from summarize_from_feedback_details import reward, sft
from summarize_from_feedback_details.common import checkpoints, training

STAGES = {"sft": sft, "reward": reward, "ppo": ppo}


def train(world, stage: str, output_dir, **changes) -> list[dict]:
    """Run a stage; returns the lines of its metrics."""
    STAGES[stage].main(getattr(world, f"{stage}_args")(output_dir, **changes))
    return [json.loads(line) for line in open(f"runs/{output_dir.name}/metrics.jsonl")]


def values_of(lines: list[dict], name: str) -> list[float]:
    return [line[name] for line in lines if name in line]


def validation(name) -> pandas.DataFrame:
    return pandas.read_parquet(f"runs/{name}/tables/validation.parquet")


def real_tokens(rows, column: str, pad_id: int) -> list[list[int]]:
    return [[token for token in row if token != pad_id] for row in rows[column]]


@torch.no_grad()
def plain_scores(folder, rows: list[list[int]]) -> list[float]:
    """Of a reward model, at the last token of each row, normalised."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return [float(model(torch.tensor([row])).logits) + model.config.reward_bias for row in rows]


# ------------------------------------------------------------------------------------------------------------- loops


@pytest.mark.parametrize("stage", list(STAGES))
def test_learning_rates_of_a_whole_run(world, workdir, stage):
    """Warm-up to the peak, then down to 0 after the last update; the same in micro batches, passes and mini-batches."""
    sizes = {"num_updates": 5} if stage == "ppo" else {"total_episodes": 36}  # of five updates the last one is short
    lines = train(
        world, stage, workdir / "m", run_eval=False, lr=1e-4, warm_up_steps=2, local_micro_batch_size=2, **sizes
    )
    falls = [1.0, 2 / 3, 1 / 3] if stage == "ppo" else [1.0, 0.75, 0.25]  # linear; cosine (0, 60, 120 degrees)
    name = {"sft": "train/sft/lr", "reward": "train/rm/lr", "ppo": "train/ppo/lr"}[stage]
    assert values_of(lines, name) == pytest.approx([1e-4 * share for share in (0.0, 0.5, *falls)])


@pytest.mark.parametrize("stage", list(STAGES))
def test_dropout_of_a_checkpoint_changes_nothing(world, workdir, stage):
    """Configurations that ask for it, of every network that is read: the same weights as without."""
    for name in ("sft", "reward"):
        shutil.copytree(getattr(world, name), name)
        config = json.loads((workdir / name / "config.json").read_text())
        config |= {"hidden_dropout": 0.5, "attention_dropout": 0.5}
        (workdir / name / "config.json").write_text(json.dumps(config))
    with_dropout = {
        "sft": {"base_model": "sft"},
        "reward": {"sft_model_path": "sft"},
        "ppo": {"sft_model_path": "sft", "reward_model_path": "reward"},
    }[stage]
    without = {argument: getattr(world, path) for argument, path in with_dropout.items()}
    weights = []
    for name, models in (("with", with_dropout), ("without", without)):
        more = {"num_updates": 1, "value_output_dir": f"{name}_value"} if stage == "ppo" else {"total_episodes": 8}
        train(world, stage, workdir / name, run_eval=False, **models, **more)
        folders = [name, f"{name}_value"] if stage == "ppo" else [name]
        weights.append([load_file(f"{folder}/model.safetensors") for folder in folders])
    for ours, theirs in zip(*weights):
        for key, weight in ours.items():
            torch.testing.assert_close(weight, theirs[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_the_short_last_batch_is_scaled_by_its_own_rows(world, workdir, stage):
    """A last batch of 4 steps as a batch of 4 would, not as half a batch of 8: the same metrics and weights."""
    small, large = (
        train(world, stage, workdir / str(size), total_episodes=4, batch_size=size, run_eval=False) for size in (4, 8)
    )
    for name in ("loss", "grad_norm", "accuracy", "episode"):
        name = f"train/{'rm' if stage == 'reward' else stage}/{name}"
        assert values_of(small, name) == pytest.approx(values_of(large, name), abs=1e-6)
    weights = [load_file(f"{size}/model.safetensors") for size in (4, 8)]
    for key, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][key], rtol=0, atol=1e-6)


def test_a_tie_is_not_right(world, workdir, monkeypatch):
    """A head of zeros gives every summary the same reward: no pair is decided rightly, in training and evaluation."""
    monkeypatch.setattr(reward, "init_head", lambda model: torch.nn.init.zeros_(model.score.weight))
    lines = train(world, "reward", workdir / "rm", lr=0.0, total_episodes=8)
    assert values_of(lines, "train/rm/loss") == pytest.approx([math.log(2)] * 2)
    for name in ("train/rm/accuracy", "eval/rm/validation/accuracy", "eval/rm/validation_cnndm/accuracy"):
        assert values_of(lines, name) == [0.0] * 2, name


@pytest.mark.parametrize("nminibatches", [1, 2])
def test_statistics_of_a_policy_that_stands_still(world, workdir, monkeypatch, nminibatches):
    """Learning rate 0: in all passes the ratio is 1, no KL, nothing clipped, and the loss is that of the rollout."""
    seen, plain = [], ppo.compute_experience
    monkeypatch.setattr(ppo, "compute_experience", lambda *given: seen.append(plain(*given)) or seen[-1])
    sizes = {"nminibatches": nminibatches, "local_micro_batch_size": 2, "num_updates": 1}
    line = train(world, "ppo", workdir / "m", lr=0.0, run_eval=False, **sizes)[0]
    assert line["policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert line["policy/approxkl"] < 1e-8 and line["policy/approxkl_last_pass"] < 1e-8
    assert line["policy/clipfrac"] == line["value/clipfrac"] == 0.0
    if nminibatches == 1:  # means of mini-batches weigh their tokens otherwise
        adv = seen[0]
        real, real_p1 = ~adv.padding_mask, ~adv.padding_mask_p1
        assert len(set(adv.sequence_lengths.tolist())) > 2  # else both masks would do for both
        assert line["loss/policy"] == pytest.approx(-float(adv.advantages[real].mean()), abs=1e-5)
        losses = 0.5 * (adv.values - adv.returns)[real_p1] ** 2
        assert line["loss/value"] == pytest.approx(float(losses.mean()), rel=1e-4)


def test_each_pass_cuts_the_batch_anew(world, workdir, monkeypatch):
    """Every episode once a pass, in other mini-batches than in the pass before."""
    cuts, cut = [], training.micro_batches

    def note(*given, **how):
        cuts.append(cut(*given, **how))
        return cuts[-1]

    seen, plain = [], ppo.micro_batch_loss

    def remember(model, queries, *rest):
        seen.append([tuple(query) for query in queries])
        return plain(model, queries, *rest)

    monkeypatch.setattr(training, "micro_batches", note)
    monkeypatch.setattr(ppo, "micro_batch_loss", remember)
    sizes = {"nminibatches": 2, "num_updates": 1, "ppo": ppo.PpoHParams(noptepochs=3)}
    train(world, "ppo", workdir / "m", run_eval=False, **sizes)
    assert len(cuts) == len(seen) == 6  # a micro batch is a whole mini-batch here
    passes = [seen[i : i + 2] for i in range(0, 6, 2)]
    for one in passes:
        assert len({query for mini_batch in one for query in mini_batch}) == 8
    assert len({frozenset(map(frozenset, one)) for one in passes}) > 1


def test_noise_is_new_at_each_update(world, workdir, monkeypatch):
    """One post in every row, a policy that stands still: an update draws other responses than the one before."""
    rows = load_dataset(world.sft_rows)
    for split in rows:
        Dataset.from_list([rows[split][0]] * 8).to_parquet(f"same/data/{split}-00000-of-00001.parquet")
    found, plain = [], ppo.make_rollout
    monkeypatch.setattr(ppo, "make_rollout", lambda *given: found.append(plain(*given)) or found[-1])
    train(world, "ppo", workdir / "m", lr=0.0, run_eval=False, query_dataset="same", temperature=1.0)
    responses = [tuple(row) for rollout in found for row in rollout.responses.tolist()]
    assert len(responses) == 16 and len(set(responses)) > 12


def test_reference_and_reward_model_stay_what_they_were(world, workdir, monkeypatch):
    """While policy and value network move: each rollout's reference log-probs and scores, by plain classes."""
    found, plain = [], ppo.make_rollout
    monkeypatch.setattr(ppo, "make_rollout", lambda *given: found.append(plain(*given)) or found[-1])
    lines = train(world, "ppo", workdir / "m", num_updates=3, lr=3e-3, run_eval=False)
    assert values_of(lines, "objective/kl_k3")[0] < 1e-6 < 1e-2 < values_of(lines, "objective/kl_k3")[2]
    pad_id = AutoTokenizer.from_pretrained("m").pad_token_id
    queries = real_tokens(load_dataset(world.sft_rows)["train"], "query_token", pad_id)
    policy = AutoModelForCausalLM.from_pretrained(world.sft).eval()
    for rollout in found:
        written = [[token for token in row if token != pad_id] for row in rollout.responses.tolist()]
        whole = [queries[i] + response for i, response in zip(rollout.query_rows.tolist(), written)]
        np.testing.assert_allclose(rollout.scores, plain_scores(world.reward, whole), rtol=0, atol=1e-4)
        for row, response, ours in zip(whole, written, rollout.ref_logprobs):
            with torch.no_grad():
                logits = policy(torch.tensor([row])).logits[0, -len(response) - 1 : -1] / 0.7
            expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
            torch.testing.assert_close(ours[: len(response)], expected, rtol=0, atol=1e-4)


def test_the_first_pass_ratio_in_bf16(world, workdir, monkeypatch):
    """The log-probs of sampling are rounded otherwise than those of training: they are computed again, as there."""
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # the precision of a process is set once
    line = train(world, "ppo", workdir / "m", precision="bf16", num_updates=1, run_eval=False)[0]
    assert line["policy/first_pass_ratio_error"] < 1e-3  # 0 on a CPU; 0.02 with those of sampling


@pytest.mark.parametrize(
    "when, kept", [({"save_freq": 2, "keep": 2}, [4, 5]), ({"save_freq": 0, "save_minutes": 1.0, "keep": 9}, [3, 5])]
)
def test_when_checkpoints_are_written_and_how_many_are_kept(world, workdir, monkeypatch, when, kept):
    """Of a run of five updates, by a clock that goes on by 25 s whenever it is read; the last update is always kept."""
    clock = itertools.count(0, 25)
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(checkpoints.Checkpoints, "remove", lambda self: None)  # as a finished run does
    train(world, "sft", workdir / "m", total_episodes=40, run_eval=False, **when)
    assert sorted(p.name for p in (workdir / "runs/m/checkpoints").iterdir()) == [f"update_{n:08d}" for n in kept]


def test_a_fingerprint_tells_the_order_of_rows():
    assert len({checkpoints.fingerprint(lengths) for lengths in ([5, 6, 7], [5, 7, 6], [5, 6], [5, 6, 7, 7])}) == 4


def test_random_states_are_put_back():
    draw = lambda: (torch.rand(2).tolist(), np.random.rand(2).tolist(), np.random.randn(), random.random())
    np.random.randn()  # numpy draws two of these at once and keeps the second
    before = checkpoints._random_state()
    drawn = draw()
    checkpoints._set_random_state(before)
    assert draw() == drawn


# -------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("stage", list(STAGES))
def test_evaluation_batches_change_nothing(world, workdir, stage):
    """Batches of 7, of which the last one is short, and one of all rows; sampled where a policy is evaluated."""
    hot = {"sft": {"temperature": 1.0}, "ppo": {"eval_temperature": 1.0}, "reward": {}}[stage]
    sizes = {"num_updates": 1} if stage == "ppo" else {"total_episodes": 8}
    for size in (7, 64):
        train(world, stage, workdir / str(size), local_eval_batch_size=size, **hot, **sizes)
    few, all_at_once = validation(7), validation(64)
    pandas.testing.assert_frame_equal(few, all_at_once, rtol=0, atol=1e-4)
    rows = load_dataset(world.pairs if stage == "reward" else world.sft_rows)["validation"]
    assert few["query"].tolist() == rows["query"][: len(few)] and len(few) == (40 if stage == "reward" else 20)
    if stage == "reward":
        configs = [json.loads((workdir / name / "config.json").read_text()) for name in ("7", "64")]
        assert configs[0]["reward_bias"] == pytest.approx(configs[1]["reward_bias"], abs=1e-5)
    else:  # samples, not the most likely tokens: two temperatures differ
        assert few["response"].nunique() > 10


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_the_table_of_a_policy_by_plain_classes(world, workdir, stage):
    """Row by row: greedy responses, whether they end by themselves, loss of the reference, scores of both."""
    arguments = {"base_model": world.sft, "temperature": 0.0, "query_loss_weight": 0.5, "total_episodes": 8}
    if stage == "ppo":
        arguments = {"eval_temperature": 0.0, "num_updates": 2}
    tokenizer = AutoTokenizer.from_pretrained(world.sft)
    pad_id, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    rows = load_dataset(world.sft_rows)["validation"].select(range(20))
    queries, references = (real_tokens(rows, c, pad_id) for c in ("query_token", "reference_response_token"))

    def write(folder, R: int) -> list[list[int]]:
        model, written = AutoModelForCausalLM.from_pretrained(folder).eval(), []
        ids = {"eos_token_id": end, "pad_token_id": pad_id, "suppress_tokens": [pad_id]}
        for query in queries:
            row = torch.tensor([query])
            found = model.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=R, **ids)
            written.append(found[0, len(query) :].tolist())
        return written

    # as many tokens as one of the responses has: it ends at the last one that there is room for
    R = sorted(map(len, write(world.sft, 24)))[5]
    lines = train(world, stage, workdir / "m", lr=1e-4, response_length=R, **arguments)
    table, written = validation("m"), write("m", R)
    ended = [response[-1] == end for response in written]
    assert any(len(r) == R and e for r, e in zip(written, ended))
    assert table["response"].tolist() == [t.strip() for t in tokenizer.batch_decode(written, skip_special_tokens=True)]
    assert table["response_length"].tolist() == list(map(len, written)) and table["has_eos"].tolist() == ended
    assert table["query"].tolist() == rows["query"]
    plain = tokenizer.batch_decode(references, skip_special_tokens=True)
    assert table["reference"].tolist() == [text.strip() for text in plain] and all(r[-1] == end for r in references)
    if stage == "ppo":
        for column, responses in (("score", written), ("reference_score", references)):
            expected = plain_scores(world.reward, [q + r for q, r in zip(queries, responses)])
            np.testing.assert_allclose(table[column], expected, rtol=0, atol=1e-4)
        return
    policy = AutoModelForCausalLM.from_pretrained("m").eval()
    for query, response, loss in zip(queries, references, table["loss"]):
        row = torch.tensor([query + response])
        with torch.no_grad():
            logprobs = policy(row).logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
        weights = torch.tensor([0.5] * (len(query) - 1) + [1.0] * len(response))
        assert loss == pytest.approx(float(-(logprobs * weights).sum() / weights.sum()), abs=1e-4)
    # references of other posts: far from the right ones
    assert 0 < values_of(lines, "validation/shuffled_references/rouge/rouge1")[0] < 0.8


def test_the_table_of_a_reward_model_by_plain_classes(world, workdir):
    """Rewards of chosen and rejected, pair by pair in the dataset's order; accuracy and margin of the table."""
    lines = train(world, "reward", workdir / "rm", num_eval_rows=20)
    rows, pad_id = (
        load_dataset(world.pairs)["validation"].select(range(20)),
        AutoTokenizer.from_pretrained("rm").pad_token_id,
    )
    bias = json.loads((workdir / "rm/config.json").read_text())["reward_bias"]
    table = validation("rm")
    for side in ("chosen", "rejected"):
        expected = np.array(plain_scores("rm", real_tokens(rows, f"query_{side}_token", pad_id))) - bias
        np.testing.assert_allclose(table[f"{side}_reward"], expected, rtol=0, atol=1e-4)
        assert table[side].tolist() == rows[side]
    margins = table["chosen_reward"] - table["rejected_reward"]
    assert values_of(lines, "eval/rm/validation/accuracy")[-1] == (margins > 0).mean()
    assert values_of(lines, "eval/rm/validation/margin")[-1] == pytest.approx(margins.mean())
