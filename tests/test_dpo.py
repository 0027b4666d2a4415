"""DPO: losses by hand, its gradient as the formula's, log-probabilities of the SFT policy that are kept, learning."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from conftest import STAGES
from datasets import load_dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from summarize_from_feedback_details import dpo, reward
from summarize_from_feedback_details.common import ref_logprobs
from summarize_from_feedback_details.common.adapters import LoraParams
from summarize_from_feedback_details.common.comparisons import pair_logprobs, read_comparisons
from summarize_from_feedback_details.common.policies import ResponsePolicy, load_policy
from summarize_from_feedback_details.common.sampling import strip_pads
from summarize_from_feedback_details.dpo import dpo_losses

PAIRS = (
    [[5, 6, 7], [5, 6, 7], [9], [9], [4, 4], [4, 4]],
    [[3, 4, 0], [8, 0], [11, 12, 13, 0], [2, 0], [6, 7], [6, 8]],
)


def test_losses_by_hand():
    """Margins of 0, 10 and -10 nats at beta 0.1: sigmoid(1) = 0.731."""
    margins = torch.tensor([0.0, 10.0, -10.0])
    plain = [math.log(2), -math.log(1 / (1 + math.exp(-1))), -math.log(1 / (1 + math.exp(1)))]
    assert dpo_losses(margins, 0.1).tolist() == pytest.approx(plain)
    # a tenth of the labels wrong: a tenth of the loss is that of the pair the other way round
    smoothed = [0.9 * a + 0.1 * b for a, b in zip(plain, [plain[0], plain[2], plain[1]])]
    assert dpo_losses(margins, 0.1, label_smoothing=0.1).tolist() == pytest.approx(smoothed)
    # IPO: the margin should be 1 / (2 * 0.1) = 5
    assert dpo_losses(margins, 0.1, ipo=True).tolist() == pytest.approx([25.0, 25.0, 225.0])


def test_golden(shared):
    """Sums of log-probabilities, losses and gradient of the original code on its tiny model."""
    g = {name: torch.from_numpy(value) for name, value in np.load(shared / "golden/tiny_par.npz").items()}
    policy = load_policy("x", str(shared / "golden/tiny_par"))
    pad = int(g["dpo_labels"].max())
    rows = []
    for tokens, labels in zip(g["right_padded"].tolist(), g["dpo_labels"].tolist()):
        first = next(i for i, label in enumerate(labels) if label != pad)
        rows.append((tokens[:first], [token for token in tokens[first:] if token != pad]))
    queries, responses = zip(*(rows[i + side] for i in range(3) for side in (0, 3)))
    found = pair_logprobs(ResponsePolicy(policy), list(queries), list(responses))
    close = lambda ours, theirs, atol: torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-5, atol=atol)
    close(found.detach(), torch.stack([g["dpo_chosen"], g["dpo_rejected"]], 1), 1e-4)
    ratios = found - torch.stack([g["dpo_ref_chosen"], g["dpo_ref_rejected"]], 1)
    margins, beta = ratios[:, 0] - ratios[:, 1], float(g["beta"])
    close(dpo_losses(margins, beta).detach(), g["dpo_loss"], 1e-5)
    close(dpo_losses(margins, beta, label_smoothing=0.1).detach(), g["dpo_loss_smooth01"], 1e-5)
    close(dpo_losses(margins, beta, ipo=True).detach(), g["ipo_loss"], 1e-3)
    dpo_losses(margins, beta).mean().backward()
    close(torch.stack([p.grad.norm() for p in policy.parameters()]).norm(), g["dpo_grad_norm"], 1e-5)


def test_the_gradient_at_the_start_is_that_of_the_formula(world):
    """-beta / 2 (grad log pi(chosen) - grad log pi(rejected)), by plain passes over one row at a time (their eq. 7)."""
    policy, plain = load_policy("x", world.sft), AutoModelForCausalLM.from_pretrained(world.sft)
    found = pair_logprobs(ResponsePolicy(policy), *PAIRS)
    ratios = found - found.detach()
    dpo_losses(ratios[:, 0] - ratios[:, 1], 0.3).sum().backward()
    for i, (query, response) in enumerate(zip(*PAIRS)):
        logits = plain(torch.tensor([query + response])).logits[0, len(query) - 1 : -1]
        logprob = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()
        torch.testing.assert_close(found[i // 2, i % 2], logprob, rtol=0, atol=1e-4)
        ((-1) ** (i + 1) * 0.15 * logprob).backward()
    for (name, ours), theirs in zip(policy.named_parameters(), plain.parameters()):
        atol = 1e-6 * float(theirs.grad.abs().max() + 1)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=atol, msg=name)


def test_pairs_are_those_of_the_dataset(world):
    """Also of CNN/DM, whose queries end in a line break that the whole sequences do not have."""
    data = load_dataset(world.pairs)
    for split in ("train", "validation_cnndm"):
        rows = data[split].select(range(3))
        queries, responses = read_comparisons(rows, pad := max(rows[0]["query_token"]))
        for i, row in enumerate(rows):
            query = strip_pads(row["query_token"], pad)
            assert queries[2 * i] == queries[2 * i + 1] == (query if split == "train" else query[:-1])
            assert responses[2 * i] == strip_pads(row["chosen_token"], pad)
            assert responses[2 * i + 1] == strip_pads(row["rejected_token"], pad)
    # what is a response is never empty, whatever a dataset holds
    odd = {"query_token": [[1, 2, 3]], "query_chosen_token": [[1, 2, 3]], "query_rejected_token": [[1, 2, 3, 4]]}
    assert read_comparisons(odd, 9) == ([[1, 2], [1, 2]], [[3], [3, 4]])


@pytest.mark.parametrize("change", [{}, {"ipo": True, "beta": 0.1}, {"label_smoothing": 0.1}, {"lora": True}])
def test_it_learns(world, workdir, capsys, change):
    """The implicit reward comes to agree with the labels, in three passes; the run is one that the figures read."""
    if change.get("lora"):
        change = change | {"lora_params": LoraParams(rank=4), "lr": 3e-3}
    few = {"num_eval_rows": None, "total_episodes": 600, "num_train_epochs": 3, "eval_freq": 60, "beta": 0.1}
    metrics = dpo.main(world.dpo_args("model", **(few | change)))
    found = pandas.read_json("runs/model/metrics.jsonl", lines=True)
    assert found["train/dpo/margin"].iloc[0] == pytest.approx(0, abs=1e-4)
    first = 25.0 if change.get("ipo") else math.log(2)
    assert found["train/dpo/loss"].iloc[0] == pytest.approx(first, rel=1e-4)
    found = found[found["train/dpo/loss"].notna()]
    assert found["train/dpo/loss"].iloc[-15:].mean() < 0.97 * found["train/dpo/loss"].iloc[:15].mean()
    assert found["train/dpo/accuracy"].iloc[-15:].mean() > 0.65
    assert metrics["eval/dpo/validation/margin"] > 0
    assert metrics["objective/kl"] > 0.05 and math.isfinite(metrics["objective/scores"])
    accuracy = pandas.read_parquet("runs/model/tables/accuracy.parquet")
    assert accuracy[(accuracy["split"] == "validation") & (accuracy["group"] == "confidence")]["pairs"].sum() == 80
    assert set(accuracy["split"]) == {"validation", "validation_cnndm"} and set(accuracy["group"]) >= {"batch", "split"}
    for table in ("validation", "validation_60"):
        assert len(pandas.read_parquet(f"runs/model/tables/{table}.parquet")) == 60
    said = capsys.readouterr().out
    assert "train: 0 chosen and 0 rejected of 200 pairs do not end with EOS" in said
    AutoModelForCausalLM.from_pretrained("model")
    assert json.loads(Path("runs/model/summary.json").read_text())["stage"] == "dpo"


def test_the_loop_trains_on_the_formula(world, workdir, monkeypatch):
    """Margins of the second update: what the policy says of the pairs by then, minus what the SFT policy says."""
    given, said, batches = [], [], []
    losses, logprobs, read = dpo.dpo_losses, dpo.pair_logprobs, dpo.read_comparisons
    monkeypatch.setattr(dpo, "dpo_losses", lambda *what: given.append(what) or losses(*what))
    monkeypatch.setattr(dpo, "pair_logprobs", lambda *what: said.append(logprobs(*what)) or said[-1])
    monkeypatch.setattr(dpo, "read_comparisons", lambda *what: batches.append(read(*what)) or batches[-1])
    settings = {"run_eval": False, "local_micro_batch_size": 8, "beta": 0.2, "label_smoothing": 0.25}
    dpo.main(world.dpo_args("model", total_episodes=16, scheduler="constant", **settings))
    assert [what[1:] for what in given] == [(0.2, 0.25, False)] * 2
    assert given[0][0].abs().max() < 1e-4 and given[1][0].abs().max() > 1e-2  # the policy is the reference, then not
    with torch.no_grad():
        ratios = said[1] - pair_logprobs(ResponsePolicy(load_policy("x", world.sft)), *batches[1])
    torch.testing.assert_close(given[1][0].detach(), ratios[:, 0] - ratios[:, 1], rtol=0, atol=1e-4)


def test_log_probabilities_of_the_sft_policy_are_kept(world, workdir, monkeypatch, capsys):
    """Beside the comparisons; another run reads them, another model, precision or other rows do not."""
    dpo.main(world.dpo_args("one", run_eval=False))
    (file,) = Path("ref_logprobs").iterdir()
    assert f"log-probabilities of the SFT policy: {file.absolute()}" in capsys.readouterr().out
    kept = np.load(file)
    assert kept.shape == (32, 2) and (kept < 0).all()
    read, calls = ref_logprobs.read_split, []
    monkeypatch.setattr(ref_logprobs, "read_split", lambda *given: calls.append(given) or read(*given))
    dpo.main(world.dpo_args("two", run_eval=False, beta=0.1))
    assert not calls and len(list(Path("ref_logprobs").iterdir())) == 1
    dpo.main(world.dpo_args("three", run_eval=False, sft_model_path="one"))
    dpo.main(world.dpo_args("four", run_eval=False, total_episodes=24))
    assert len(calls) == 2 and len(list(Path("ref_logprobs").iterdir())) == 3
    # a file that is torn, or of other rows, is made again
    for damaged in (b"", file.read_bytes()[:-40]):
        file.write_bytes(damaged)
        dpo.main(world.dpo_args(f"again{len(damaged)}", run_eval=False))
        np.testing.assert_array_equal(np.load(file), kept)
    assert len(calls) == 4
    # what is kept is what is trained with
    np.save(file, kept + np.array([7.0, 0.0]))
    dpo.main(world.dpo_args("five", run_eval=False))
    first = json.loads(Path("runs/five/metrics.jsonl").read_text().splitlines()[0])
    assert first["train/dpo/chosen_reward"] == pytest.approx(-0.05 * 7, abs=1e-4)
    args = world.dpo_args("six", ref_logprobs_dir=None)
    assert ref_logprobs.folder_of(args) == Path(f"{world.pairs}_ref_logprobs")
    args.label_dataset = "somebody/comparisons"
    assert ref_logprobs.folder_of(args) == Path("data/somebody/comparisons_ref_logprobs")


def test_an_adapter_of_another_policy_is_refused(world, workdir, capsys):
    """A reward model of `reward.py --lora` scores with the weights of its own SFT policy only."""
    lora = {"lora": True, "lora_params": LoraParams(rank=4)}
    reward.main(world.reward_args("rm", run_eval=False, total_episodes=8, **lora))
    shutil.copytree(world.sft, "other")
    weights = load_file("other/model.safetensors")
    weights["gpt_neox.final_layer_norm.bias"] += 0.1
    save_file(weights, "other/model.safetensors", {"format": "pt"})
    args = world.dpo_args("model", reward_model_path="rm", sft_model_path="other", **lora)
    with pytest.raises(SystemExit) as stopped:
        dpo.main(args)
    assert (
        stopped.value.code == 2 and "--reward_model_path: found 'rm/adapter', an adapter on" in capsys.readouterr().err
    )
    dpo.main(world.dpo_args("right", reward_model_path="rm", total_episodes=8, **lora))


def test_without_a_reward_model(world, workdir):
    metrics = dpo.main(world.dpo_args("model", reward_model_path=None, total_episodes=8))
    assert "objective/kl" in metrics and not [name for name in metrics if "score" in name]
    table = pandas.read_parquet("runs/model/tables/validation.parquet")
    assert len(table) == 20 and table["response"].str.len().gt(0).all() and table["score"].isna().all()


def test_responses_that_were_cut_off_are_counted(world, workdir, capsys):
    data = load_dataset(world.pairs)
    pad = max(data["train"][0]["query_token"])

    def cut(row, number):
        if number < 3:
            tokens = strip_pads(row["query_chosen_token"], pad)[:-1]
            row["query_chosen_token"] = tokens + [pad] * (len(row["query_chosen_token"]) - len(tokens))
        return row

    for split, rows in data.items():
        rows.map(cut, with_indices=True).to_parquet(f"cut/{split}.parquet")
    dpo.main(world.dpo_args("model", label_dataset="cut", run_eval=False, total_episodes=200))
    assert "train: 3 chosen and 0 rejected of 200 pairs do not end with EOS" in capsys.readouterr().out


def test_the_name_of_the_file_changes_with_the_weights_and_the_precision(world):
    """Any weight, however small the change; the type of the weights; how they are multiplied; the rows."""
    policy, args = load_policy("x", world.sft), world.dpo_args("x")
    data = load_dataset(world.pairs)
    rows = data["train"].select(range(4))
    name = lambda rows=rows, how="no": ref_logprobs.path_of(args, "train", rows, policy, how).name
    names = [name(), name(how="bf16"), name(data["train"].select(range(1, 5)))]
    exchanged = rows.rename_columns({"query_chosen_token": "x", "query_rejected_token": "query_chosen_token"})
    names.append(name(exchanged.rename_column("x", "query_rejected_token")))
    for weight in list(policy.parameters())[5:7]:
        weight.data.flatten()[0] += 1e-3
        names.append(name())
    policy.bfloat16()
    names.append(name())
    assert len(set(names)) == len(names) and name() == names[-1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"beta": 0.0}, "--beta: found 0.0; expected more than 0"),
        ({"label_smoothing": 1.5}, "--label_smoothing: found 1.5; expected a number from 0 to 1"),
        ({"label_smoothing": 0.1, "ipo": True}, "--label_smoothing: found 0.1 with --ipo; expected 0"),
        ({"label_dataset": "x/y/z"}, "--label_dataset: found 'x/y/z', which does not exist"),
        ({"ref_logprobs_dir": "/proc/x"}, "--ref_logprobs_dir: found '/proc/x"),
        ({"total_episodes": 1000}, "--total_episodes: found 1000; expected at most 200"),
    ],
)
def test_bad_input(world, workdir, capsys, change, message):
    with pytest.raises(SystemExit) as stopped:
        dpo.main(world.dpo_args("model", **change))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith(f"error: {message}") and said.count("\n") == 1, said
    assert not list(workdir.iterdir()) and (STAGES / "dpo.py").exists()
