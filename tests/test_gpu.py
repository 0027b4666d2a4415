"""On a GPU: all stages and algorithms in float32 and bf16, kernels, a stop, DeepSpeed. Skipped where there is none."""

import math
import os
import signal
import subprocess
from types import SimpleNamespace

import pandas
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import launch_command
from safetensors.torch import load_file
from test_lora import LORA
from test_resume import MAIN, stage_args

from summarize_from_feedback_details.common import packed_rows
from summarize_from_feedback_details.common.check_inputs import TokenIds
from summarize_from_feedback_details.common.checkpoints import Checkpoints
from summarize_from_feedback_details.common.decoding import Decoder
from summarize_from_feedback_details.common.engines import replay
from summarize_from_feedback_details.common.noise import episode_keys, gumbel_noise
from summarize_from_feedback_details.common.policies import load_policy
from summarize_from_feedback_details.common.sampling import LOOK_EVERY, model_inputs, sample, sample_responses
from summarize_from_feedback_details.common.training import freeze, lent

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
FINITE = {stage: f"train/{stage}/loss" for stage in MAIN} | {
    "reward": "train/rm/loss", "ppo_left_padding": "loss/value", "rloo": "train/rloo/grad_norm",
    "grpo": "train/grpo/grad_norm"
}  # fmt: skip


def metrics_of(run: str) -> pandas.DataFrame:
    return pandas.read_json(f"runs/{run}/metrics.jsonl", lines=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [{}, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("stage", MAIN)
def test_a_run(world, workdir, capsys, monkeypatch, stage, lora, precision):
    """It ends, its numbers are finite, and the first pass over what was sampled has a ratio near 1."""
    calls, plain = [], packed_rows.varlen_attention
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # or another test's precision would be kept
    monkeypatch.setattr(packed_rows, "varlen_attention", lambda *a, **k: calls.append(1) or plain(*a, **k))
    MAIN[stage](stage_args(world, stage, "model", precision=precision, **lora))
    assert "on cuda" in capsys.readouterr().out and bool(calls) == (precision == "bf16")
    metrics = metrics_of("model")
    loss = metrics[FINITE[stage]].dropna()
    assert len(loss) >= 4 and loss.map(math.isfinite).all()
    if "policy/first_pass_ratio_error" in metrics:
        assert metrics["policy/first_pass_ratio_error"].max() < (1e-3 if precision == "fp32" else 0.1)
    assert all(weight.isfinite().all() for weight in load_file("model/model.safetensors").values())


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_losses_are_those_of_the_cpu(world, workdir, stage):
    """In float32, to 1e-4."""
    MAIN[stage](stage_args(world, stage, "gpu"))
    command, env = launch_command(stage, stage_args(world, stage, "cpu"), workdir)
    done = subprocess.run(command, env=env | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (metrics_of(run)[FINITE[stage]].dropna() for run in ("gpu", "cpu"))
    assert len(ours) == len(theirs) >= 5
    torch.testing.assert_close(torch.tensor(ours.tolist()), torch.tensor(theirs.tolist()), rtol=0, atol=1e-4)


def test_the_noise_of_sampling_is_that_of_the_cpu():
    found = [gumbel_noise(episode_keys(5, range(64), device), 9, 50304).cpu() for device in ("cpu", "cuda")]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-3)  # the last digit of a logarithm, where it is coarse


@pytest.mark.parametrize("width, heads, key_heads", [(64, 8, 8), (64, 8, 2), (256, 4, 4)])
@pytest.mark.parametrize("window", [None, 16])
def test_all_rows_in_one_call(width, heads, key_heads, window, monkeypatch):
    """The kernel for rows of different lengths gives what each row gives by itself, gradients too."""
    torch.manual_seed(0)
    pieces = packed_rows.Pieces([(40, None), (7, 0), (30, 0), (100, None), (1, None)])
    shapes = [(1, n, sum(size for size, _ in pieces), width) for n in (heads, key_heads, key_heads)]
    given = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    weight = torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    module, found = torch.nn.Module(), []
    module.num_key_value_groups, module.is_causal = heads // key_heads, True
    for one_call in (True, False):
        assert not one_call or packed_rows.takes_varlen(*given)
        if not one_call:
            monkeypatch.setattr(packed_rows, "takes_varlen", lambda *_: False)
        out, _ = packed_rows.packed_attention(module, *given, None, pieces, sliding_window=window, scaling=0.1)
        found.append([out, *torch.autograd.grad((out * weight).sum(), given)])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("stage", MAIN)
def test_a_stop_changes_nothing_beyond_rounding(world, workdir, stage, monkeypatch):
    MAIN[stage](stage_args(world, stage, "whole"))
    asked, real = [0], Checkpoints.stop_asked

    def at_the_fifth(self):
        asked[0] += 1
        if asked[0] == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self)

    monkeypatch.setattr(Checkpoints, "stop_asked", at_the_fifth)
    with pytest.raises(SystemExit):
        MAIN[stage](stage_args(world, stage, "stopped"))
    MAIN[stage](stage_args(world, stage, "stopped"))
    ours, theirs = (load_file(f"{name}/model.safetensors") for name in ("stopped", "whole"))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo_left_padding"])
def test_deepspeed(world, workdir, stage, zero):
    """One GPU, bf16: the code path of the paper's runs."""
    args = stage_args(world, stage, "model", precision="bf16", deepspeed=True, world_size=1)
    command, env = launch_command(stage, args, workdir, 1, zero)
    config = workdir / f"zero{zero}_cpu.yaml"
    config.write_text(config.read_text().replace("use_cpu: true", "use_cpu: false"))
    done = subprocess.run(command, cwd=workdir, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "precision bf16" in done.stdout and "WARNING: update" not in done.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_decodes_as_without_it(world, dtype, monkeypatch):
    """Captured once for a batch; the kernel that reads a whole room may round otherwise."""
    model = load_policy("sft_model_path", world.sft, dtype=dtype).cuda().eval()
    queries, keys = torch.randint(5, 50, (64, 40), device="cuda"), episode_keys(1, range(64), "cuda")
    ids = TokenIds(model.config.vocab_size - 1, 7, 50)
    captured, plain_capture = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: captured.append(graph) or plain_capture(graph))
    found = [sampler(model, queries, keys, ids, 40, 1.0) for sampler in (sample_responses, replay)]
    same = (found[0][0] == found[1][0]).all(1)
    assert same.float().mean() > (0.95 if dtype == torch.float32 else 0.5)
    close = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 0.1}
    torch.testing.assert_close(found[0][1][same], found[1][1][same], **close)
    assert len(captured) > 10 and len(set(map(id, captured))) == 1


def test_sampling_does_not_wait(world, monkeypatch):
    """Between two looks, by CUDA's own account."""
    monkeypatch.setitem(LOOK_EVERY, "cuda", 100)
    model = load_policy("sft_model_path", world.sft).cuda().eval()
    queries, keys = torch.randint(5, 50, (8, 40), device="cuda"), episode_keys(1, range(8), "cuda")
    ids = TokenIds(model.config.vocab_size - 1, -1, 50)
    decoder = Decoder(model, model_inputs(queries, ids.pad), 20)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(decoder, keys, ids, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_offloaded_is_pinned_and_lent(world):
    accelerator = SimpleNamespace(
        device=torch.device("cuda"), mixed_precision="no", state=SimpleNamespace(deepspeed_plugin=None)
    )
    whole = load_policy("sft_model_path", world.sft).cuda().eval()
    model = freeze(load_policy("sft_model_path", world.sft), accelerator, offload=True)
    assert all(parameter.is_pinned() for parameter in model.parameters())
    tokens = torch.randint(5, 50, (2, 9), device="cuda")
    for _ in range(2):
        with torch.no_grad(), lent(model, tokens.device):
            torch.testing.assert_close(model(tokens).logits, whole(tokens).logits)
        assert all(parameter.is_pinned() for parameter in model.parameters())
