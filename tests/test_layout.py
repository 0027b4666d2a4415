"""One process, two plain processes, and DeepSpeed ZeRO-2 and 3 on two: the same responses and the same weights."""

from dataclasses import replace

import pandas
import pytest
import torch
from conftest import launch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from summarize_from_feedback_details.ppo_left_padding import choose_precision

LOAD = {
    "sft": AutoModelForCausalLM,
    "reward": AutoModelForSequenceClassification,
    "ppo_left_padding": AutoModelForCausalLM,
}
NAMES = ("one", "two", "zero2", "zero3")
COLUMNS = {"sft": ["response"], "reward": [], "ppo_left_padding": ["response"]}


def arguments(world, stage: str, output_dir):
    # the last batch of SFT and of the reward model does not fill; lr large enough that a wrong gradient would show
    if stage == "sft":
        return world.sft_args(output_dir, total_episodes=28, lr=1e-3, max_grad_norm=1.0)
    if stage == "reward":
        return world.reward_args(output_dir, total_episodes=28 + 1, lr=1e-3, max_grad_norm=1.0)
    return world.ppo_args(output_dir, lr=1e-4, nminibatches=2, local_micro_batch_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo_left_padding"])
def test_the_same_on_two_processes_and_under_deepspeed(world, workdir, stage):
    for name, processes, zero in (("one", 1, None), ("two", 2, None), ("zero2", 2, 2), ("zero3", 2, 3)):
        args = arguments(world, stage, workdir / name)
        if processes == 2:
            args = replace(args, local_micro_batch_size=args.local_micro_batch_size // 2, world_size=2)
            args = replace(args, deepspeed=zero is not None)
        done = launch(stage, args, workdir, processes, zero)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert f"{processes} process(es) on cpu" in done.stdout and "WARNING: update" not in done.stdout
    one = LOAD[stage].from_pretrained("one").state_dict()
    tables = {n: pandas.read_parquet(f"runs/{n}/tables/validation.parquet") for n in NAMES}
    for name in NAMES[1:]:
        other = LOAD[stage].from_pretrained(name).state_dict()
        assert set(other) == set(one)
        for key, weight in one.items():
            torch.testing.assert_close(
                other[key], weight, rtol=0, atol=1e-5, msg=lambda m, k=key, n=name: f"{n} {k} {m}"
            )
        assert len(tables[name]) == len(tables["one"])
        for column in COLUMNS[stage]:
            assert tables[name][column].tolist() == tables["one"][column].tolist()
        numbers = tables[name].select_dtypes("float")
        pandas.testing.assert_frame_equal(numbers, tables["one"][numbers.columns], rtol=0, atol=1e-3)
    metrics = {n: pandas.read_json(f"runs/{n}/metrics.jsonl", lines=True) for n in NAMES}
    for name in NAMES[1:]:
        for column in metrics["one"]:
            if not column.startswith(("time/", "memory/")):
                pandas.testing.assert_series_equal(metrics[name][column], metrics["one"][column], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", [False, True])
def test_bf16(world, workdir, deepspeed):
    """The code path of GPUs, small: bf16 weights with float32 masters under DeepSpeed, autocast without."""
    if choose_precision("auto") != "bf16":
        pytest.skip("this CPU does not multiply in bf16")
    launched = {"world_size": 2, "deepspeed": True, "local_micro_batch_size": 2} if deepspeed else {}
    args = replace(world.ppo_args(workdir / "bf16", lr=1e-4), precision="bf16", **launched)
    done = launch("ppo_left_padding", args, workdir, 1 + deepspeed, 2 if deepspeed else None)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "precision bf16" in done.stdout and "WARNING: update" not in done.stdout
    metrics = pandas.read_json("runs/bf16/metrics.jsonl", lines=True)
    # old log-probabilities come from the same forward pass as the new ones: the ratio is 1 but for batch shapes
    assert metrics["policy/first_pass_ratio_error"][0] < 0.1 and abs(metrics["objective/kl"][0]) < 0.05
    assert metrics["loss/value"].dropna().gt(0).all()
