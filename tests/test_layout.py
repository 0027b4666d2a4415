"""One process, two plain processes, and DeepSpeed ZeRO-2 and 3 on two: the same responses and the same weights."""

import contextlib
import json
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch
from conftest import STAGES, launch, launch_all, launch_command, to_flags
from datasets import Dataset, load_dataset
from safetensors.torch import load_file
from test_lora import LORA
from test_resume import lines, stage_args
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from summarize_from_feedback_details import dpo, grpo, online_dpo, ppo_left_padding, reward, rloo, sft
from summarize_from_feedback_details.common import policies, reward_models, training
from summarize_from_feedback_details.common.check_inputs import find_tokenizer
from summarize_from_feedback_details.common.precision import choose_precision

MODULES = {"sft": sft, "reward": reward, "ppo_left_padding": ppo_left_padding, "rloo": rloo, "grpo": grpo,
           "dpo": dpo, "online_dpo": online_dpo}  # fmt: skip
PAPER = ("sft", "reward", "ppo_left_padding")  # the paper's stages
LOAD = dict.fromkeys(MODULES, AutoModelForCausalLM) | {"reward": AutoModelForSequenceClassification}
COLUMNS = dict.fromkeys(MODULES, ["response"]) | {"reward": []}


def arguments(world, stage: str, output_dir):
    # the last batch of SFT and of the reward model does not fill; that of the reward model has no pair for the second
    # process; a wrong gradient would move weights by 1e-4 a step
    if stage == "sft":
        return world.sft_args(output_dir, total_episodes=28, lr=1e-4, max_grad_norm=1.0)
    if stage == "reward":
        return world.reward_args(output_dir, total_episodes=24 + 1, lr=1e-4, max_grad_norm=1.0)
    if stage == "rloo":
        return world.rloo_args(output_dir, lr=1e-4, noptepochs=2, ppo_clip=0.2, local_micro_batch_size=2)
    if stage == "grpo":
        return world.grpo_args(output_dir, lr=1e-4, noptepochs=2, local_micro_batch_size=2)
    if stage == "dpo":
        return world.dpo_args(output_dir, total_episodes=24 + 1, lr=1e-4, max_grad_norm=1.0)
    if stage == "online_dpo":
        return world.online_dpo_args(output_dir, lr=1e-4)
    return world.ppo_args(output_dir, lr=1e-4, nminibatches=2, local_micro_batch_size=2)


def lora_arguments(world, stage: str, output_dir):
    """With LoRA; PPO's reward model is the adapter that was trained on one process."""
    adapted = LORA | {"lr": 1e-3, "run_eval": stage != "reward"}
    if stage == "reward":
        return world.reward_args(output_dir, **adapted)
    reward_model = str(output_dir.parent / "lora_reward_one")
    return world.ppo_args(output_dir, reward_model_path=reward_model, nminibatches=2, **adapted)


LAUNCHED = {"two": None, "zero2": 2, "zero3": 3}  # name: ZeRO stage
# RLOO and online DPO share GRPO's path, and under ZeRO-2 all of them PPO's
RUN_ON = {"two": tuple(MODULES), "zero2": PAPER, "zero3": (*PAPER, "grpo", "dpo")}


@pytest.fixture(scope="module")
def launched(world, tmp_path_factory):
    """A folder with all scripts' runs on two processes, without DeepSpeed, under ZeRO-2 and under ZeRO-3."""
    folder = tmp_path_factory.mktemp("launched")
    with contextlib.chdir(folder):
        reward.main(lora_arguments(world, "reward", folder / "lora_reward_one"))
    for name, zero in LAUNCHED.items():
        jobs = []
        for stage in RUN_ON[name]:
            args = arguments(world, stage, folder / f"{stage}_{name}")
            args = replace(args, local_micro_batch_size=args.local_micro_batch_size // 2, world_size=2)
            jobs.append((stage, replace(args, deepspeed=zero is not None)))
        for stage in ("reward", "ppo_left_padding"):
            args = lora_arguments(world, stage, folder / f"lora_{stage}_{name}")
            args = replace(args, local_micro_batch_size=2, world_size=2, deepspeed=zero is not None)
            jobs.append((stage, args))
        done = launch_all(jobs, folder, 2, zero)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert done.stdout.count("2 process(es) on cpu") == len(jobs) and "WARNING: update" not in done.stdout
        assert done.stdout.count("merged in float32") == 2
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", MODULES)
def test_the_same_on_two_processes_and_under_deepspeed(world, launched, monkeypatch, stage, capsys):
    monkeypatch.chdir(launched)
    MODULES[stage].main(arguments(world, stage, launched / f"{stage}_one"))
    assert "WARNING: update" not in capsys.readouterr().out
    one, *others = (f"{stage}_{name}" for name in ("one", *LAUNCHED) if name == "one" or stage in RUN_ON[name])
    weights = LOAD[stage].from_pretrained(one).state_dict()
    table = pandas.read_parquet(f"runs/{one}/tables/validation.parquet")
    metrics = pandas.read_json(f"runs/{one}/metrics.jsonl", lines=True)
    for name in others:
        other = LOAD[stage].from_pretrained(name).state_dict()
        assert set(other) == set(weights)
        for key, weight in weights.items():
            torch.testing.assert_close(
                other[key], weight, rtol=0, atol=1e-5, msg=lambda m, k=key, n=name: f"{n} {k} {m}"
            )
        found = pandas.read_parquet(f"runs/{name}/tables/validation.parquet")
        assert len(found) == len(table)
        for column in COLUMNS[stage]:
            assert found[column].tolist() == table[column].tolist()
        numbers = found.select_dtypes("float")
        pandas.testing.assert_frame_equal(numbers, table[numbers.columns], rtol=1e-5, atol=1e-5)
        logged = pandas.read_json(f"runs/{name}/metrics.jsonl", lines=True)
        for column in metrics:
            if not column.startswith(("time/", "memory/")) and not column.endswith("dpo/accuracy"):
                pandas.testing.assert_series_equal(logged[column], metrics[column], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reward", "ppo_left_padding"])
def test_lora_is_the_same_on_two_processes_and_under_deepspeed(world, launched, monkeypatch, stage):
    monkeypatch.chdir(launched)
    if stage != "reward":
        MODULES[stage].main(lora_arguments(world, stage, launched / f"lora_{stage}_one"))
    one = load_file(f"lora_{stage}_one/model.safetensors")
    before = load_file(f"{world.sft}/model.safetensors")
    assert max(float((one[k] - before[k]).abs().max()) for k in one.keys() & before.keys()) > 1e-4
    for name in LAUNCHED:
        for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
            ours, theirs = (load_file(f"lora_{stage}_{n}/{file}") for n in ("one", name))
            assert ours.keys() == theirs.keys()
            for key, weight in ours.items():
                torch.testing.assert_close(theirs[key], weight, rtol=0, atol=1e-5, msg=lambda m, k=key: f"{k} {m}")


@pytest.fixture(scope="module")
def long_rows(world, tmp_path_factory):
    """The world's SFT rows with queries of 160 to 217 tokens: where positions are large, rounding them shows."""
    folder, tokenizer = tmp_path_factory.mktemp("long"), find_tokenizer("base_model", world.base)
    pad = tokenizer.pad_token_id
    for split, rows in load_dataset(world.sft_rows).items():
        longer = []
        for i, row in enumerate(rows.select(range(20))):
            query = ([t for t in row["query_token"] if t != pad] * 40)[: 160 + 3 * i]
            row |= {"query_token": [pad] * (220 - len(query)) + query, "query": tokenizer.decode(query)}
            longer.append(row)
        Dataset.from_list(longer).to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [None, pytest.param(2, marks=pytest.mark.torture), 3])
def test_bf16(world, workdir, long_rows, zero):
    """The code path of GPUs, small: bf16 weights with float32 masters under DeepSpeed, autocast without.

    All roles start as the same networks: the KL is 0 and the ratio 1, to the bit, and what is written is read again.
    """
    if choose_precision("auto") != "bf16":
        pytest.skip("this CPU does not multiply in bf16")
    launched = {"world_size": 2, "deepspeed": True, "local_micro_batch_size": 2} if zero else {}
    shutil.copytree(world.reward, "reward")
    config = json.loads(Path("reward/config.json").read_text()) | {"reward_bias": 5.01}
    Path("reward/config.json").write_text(json.dumps(config))
    task = {"query_dataset": long_rows, "reward_model_path": "reward", "value_output_dir": "value", "num_eval_rows": 4}
    args = world.ppo_args(workdir / "bf16", lr=1e-4, precision="bf16", **task, **launched)
    done = launch("ppo_left_padding", args, workdir, 2 if zero else 1, zero)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "precision bf16" in done.stdout and "WARNING: update" not in done.stdout
    metrics = pandas.read_json("runs/bf16/metrics.jsonl", lines=True)
    assert (
        metrics["objective/kl"][0] == metrics["objective/kl_k3"][0] == metrics["policy/first_pass_ratio_error"][0] == 0
    )
    assert metrics["loss/value"].dropna().gt(0).all()
    # scores stay scores of the reward model that was given: its head was never rounded
    head = load_file(f"{world.reward}/model.safetensors")["score.weight"]
    trained = load_file("value/model.safetensors")["score.weight"]
    assert trained.dtype == torch.float32 and not torch.equal(trained, trained.bfloat16().float())
    assert 0 < (trained - head).abs().max() < 1e-3  # two steps of 1e-4
    # bf16 has nothing between 5 and 5.03
    assert json.loads(Path("value/config.json").read_text())["reward_bias"] == pytest.approx(5.01, abs=1e-3)
    scores = pandas.read_parquet("runs/bf16/tables/validation.parquet")["score"]
    assert 3 < scores.mean() < 7 and scores.nunique() == len(scores)


ADDS_UP = """
from types import SimpleNamespace

import torch
from summarize_from_feedback_details import sft

args = sft.Args(precision="bf16", world_size=1, deepspeed=True)
accelerator = sft.launch(args, "rows")
model = torch.nn.Linear(1, 1, bias=False)
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
one = torch.ones(1, 1, dtype=torch.bfloat16)
args = SimpleNamespace(local_micro_batch_size=1, max_grad_norm=None)
gradient = sft.Gradient(accelerator, model, optimizer, SimpleNamespace(args=args, poll=lambda: None))
for _ in gradient.micro_batches([1] * 300, sort_by_length=False):
    gradient.add(model(one).sum(), {})
norm = gradient.step()
print("norm", norm)
"""


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, pytest.param(3, marks=pytest.mark.torture)])
def test_many_gradients_are_added_up_in_float32(world, workdir, zero):
    """300 gradients of 1 are 300; in bf16 they would stay at 256, where the next number is 258."""
    Path("adds_up.py").write_text(ADDS_UP)
    command, env = launch_command("sft", world.sft_args("unused"), workdir, 1, zero)
    command = command[: command.index(str(STAGES / "sft.py"))]
    done = subprocess.run([*command, "adds_up.py"], cwd=workdir, env=env, capture_output=True, text=True, timeout=100)
    assert "norm 300.0" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_tied_weights_are_written_once(world, workdir):
    """Under ZeRO-2, too, whose list of weights has them twice; what is written is read again."""
    tokenizer = find_tokenizer("base_model", world.base)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained("base")
    AutoTokenizer.from_pretrained(world.base).save_pretrained("base")
    args = world.sft_args(workdir / "tied", base_model="base", run_eval=False, total_episodes=8, deepspeed=True)
    done = launch("sft", args, workdir, 1, 2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert set(load_file("tied/model.safetensors")) == set(load_file("base/model.safetensors"))
    model = AutoModelForCausalLM.from_pretrained("tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def comparable(line: dict) -> dict:
    """Without what is rounding alone: signs of margins that are 0, since the policy still is the reference."""
    return {k: v for k, v in line.items() if line["update"] != 1 or not k.endswith("dpo/accuracy")}


def unsorted(micro_batches):
    """`micro_batches` without its sorting: rows stay in the order of the batch."""
    return lambda lengths, *rest, **how: micro_batches([0] * len(lengths), *rest, **how)


@pytest.mark.parametrize("stage", MODULES)
def test_micro_batches_and_their_order(world, workdir, stage, monkeypatch):
    """Several updates with micro batches of 4, 2, 1, and not sorted by length: responses, weights and metrics."""
    module = MODULES[stage]
    layouts = {name: {"local_micro_batch_size": n} for name, n in (("a", 4), ("b", 2), ("c", 1), ("unsorted", 4))}
    layouts["padded"] = {"local_micro_batch_size": 4}
    if stage == "online_dpo":  # pairs stay together
        del layouts["c"]
    elif stage not in PAPER:  # whose path they share
        del layouts["b"]
    if stage == "reward":
        layouts["apart"] = {"local_micro_batch_size": 4, "shared_prefix": False}
    metrics, weights, tables = {}, {}, {}
    for name, change in layouts.items():
        with monkeypatch.context() as patch:
            if name == "unsorted":
                patch.setattr(training, "micro_batches", unsorted(training.micro_batches))
            if name == "padded":  # as an architecture that cannot pack: other micro batches, too
                for owner in (policies, reward_models, *([reward] if stage == "reward" else [])):
                    patch.setattr(owner, "use_packed_attention", lambda model: False)
            module.main(stage_args(world, stage, name, lr=1e-4, **change))
        metrics[name], weights[name] = lines(workdir / "runs" / name), load_file(f"{name}/model.safetensors")
        tables[name] = pandas.read_parquet(f"runs/{name}/tables/validation.parquet")
    if stage == "ppo_left_padding":  # what makes it hard is there: some without EOS, lengths that differ
        assert min(line["objective/eos_rate"] for line in metrics["a"] if "objective/eos_rate" in line) < 1
    for name in layouts:
        for key, weight in weights["a"].items():
            torch.testing.assert_close(weights[name][key], weight, rtol=0, atol=1e-5)
        for column in COLUMNS[stage]:
            assert tables[name][column].tolist() == tables["a"][column].tolist()
        assert len(metrics[name]) == len(metrics["a"])
        for ours, theirs in zip(metrics[name], metrics["a"]):
            assert comparable(ours) == pytest.approx(comparable(theirs), rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo_left_padding"])
def test_processes_leave_their_group(world, workdir, monkeypatch, stage):
    """Or gloo's threads may abort a rank of a finished run."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{workdir}/group", rank=0, world_size=1)
    monkeypatch.setattr(sys, "argv", [f"{stage}.py", *to_flags(arguments(world, stage, workdir / "model"))])
    runpy.run_path(str(STAGES / f"{stage}.py"), run_name="__main__")
    assert not torch.distributed.is_initialized() and (workdir / "model/config.json").exists()


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_every_argument_changes_something(world, workdir, stage):
    """Settings of the algorithm reach the weights: each of these gives other weights than the default."""
    changes = {
        "default": {}, "seed": {"seed": 1}, "lr": {"lr": 2e-3}, "scheduler": {"scheduler": "constant"},
        "warm up": {"warm_up_steps": 2}, "eps": {"eps": 1e-2}, "weight_decay": {"weight_decay": 0.5},
        "adam": {"optimizer": "adam", "weight_decay": 0.5}, "clip": {"max_grad_norm": 0.01, "eps": 1e-2},
        "episodes": {"total_episodes": 16},
    }  # fmt: skip
    if stage == "sft":
        changes["query loss"] = {"query_loss_weight": 0.5}
    weights = {}
    for name, change in changes.items():
        MODULES[stage].main(getattr(world, f"{stage}_args")(workdir / name, run_eval=False, **change))
        weights[name] = load_file(f"{name}/model.safetensors")
    pairs = [("default", name) for name in changes if name != "default"] + [("weight_decay", "adam"), ("eps", "clip")]
    for one, other in pairs:
        assert any(not torch.equal(weights[one][key], weights[other][key]) for key in weights[one]), (one, other)


@pytest.mark.parametrize(
    "stage, reader, column", [("sft", "read_rows", "query_reference_response_token"),
                              ("reward", "read_pairs", "query_chosen_token")],
)  # fmt: skip
def test_each_row_is_read_once_a_pass(world, workdir, monkeypatch, stage, reader, column):
    """What is trained on, over two passes in batches across their border: each row once a pass, in two orders."""
    module, read = MODULES[stage], []
    plain = getattr(module, reader)

    def note(rows, pad_id):
        read.extend(tuple(tokens) for tokens in rows[column].tolist())
        return plain(rows, pad_id)

    monkeypatch.setattr(module, reader, note)
    argument, source = ("query_dataset", world.sft_rows) if stage == "sft" else ("label_dataset", world.pairs)
    data = load_dataset(source)
    data["train"] = data["train"].select(range(30))
    for split, part in data.items():
        part.to_parquet(f"few/data/{split}-00000-of-00001.parquet")
    sizes = {"num_train_epochs": 2, "total_episodes": 60, "batch_size": 7, "local_micro_batch_size": 7}
    args = getattr(world, f"{stage}_args")(workdir / "model", run_eval=False, **sizes, **{argument: "few"})
    module.main(args)
    rows = [tuple(tokens) for tokens in data["train"][column]]
    assert sorted(read) == sorted(rows * 2)
    assert len(set(rows)) == 30 == len(set(read[:28])) + 2  # the four whole batches of the first pass
    assert read[:28] != read[35:]
