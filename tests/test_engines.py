"""Sampling by an engine of its own: our sampler in bf16, whose distribution is not quite the policy's."""

from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from test_lora import LORA
from test_resume import MAIN, assert_same_bits, stage_args, stop_again_and_again
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPTNeoXConfig, XGLMConfig

from summarize_from_feedback_details import grpo, ppo_left_padding, rloo
from summarize_from_feedback_details.common import engines
from summarize_from_feedback_details.common.check_inputs import TokenIds
from summarize_from_feedback_details.common.noise import episode_keys
from summarize_from_feedback_details.common.packed_rows import use_packed_attention
from summarize_from_feedback_details.common.policies import load_policy
from summarize_from_feedback_details.common.precision import cast_parameters
from summarize_from_feedback_details.common.sampling import sample_responses
from summarize_from_feedback_details.common.training import freeze
from summarize_from_feedback_details.ppo_left_padding import PpoHParams

MODULES = {"ppo_left_padding": ppo_left_padding, "rloo": rloo, "grpo": grpo}
OURS, FOREIGN = SimpleNamespace(rollout_engine="hf"), SimpleNamespace(rollout_engine="hf_bf16")


def test_weights_by_hand():
    policy, engine = torch.tensor([0.45, 0.25, 0.9]).log(), torch.tensor([0.25, 0.5, 0.3]).log()
    torch.testing.assert_close(engines.importance_weights(FOREIGN, policy, engine), torch.tensor([1.8, 0.5, 2.0]))
    assert engines.importance_weights(OURS, policy, engine).tolist() == [1.0, 1.0, 1.0]
    mask = torch.tensor([[True, True, False]])
    found = engines.mismatch_metrics(FOREIGN, policy[None], engine[None], mask)
    # k3 of a ratio r of policy to engine: r - 1 - log r
    assert found["engine/kl"] == pytest.approx((1.8 - 1 - 0.5877867 + 0.5 - 1 + 0.6931472) / 2)
    assert found["engine/largest_difference"] == pytest.approx(0.6931472) and found["engine/truncated"] == 0.0
    assert engines.mismatch_metrics(FOREIGN, policy[None], engine[None], ~mask)["engine/truncated"] == 1.0
    assert engines.mismatch_metrics(OURS, policy[None], engine[None], mask) == {}
    whole = engines.mismatch_metrics(FOREIGN, policy[None], engine[None], mask, torch.tensor([2.0, 2.0, 1.9, 0.1]))
    assert whole["engine/truncated"] == 0.5  # of responses


def test_weights_make_up_for_the_engine():
    """Means over an engine's draws, weighted, are the policy's: where no ratio is above the bound."""
    torch.manual_seed(0)
    policy, engine = torch.randn(8).mul(0.2).log_softmax(0), torch.randn(8).mul(0.2).log_softmax(0)
    gain, drawn = torch.randn(8), torch.multinomial(engine.exp(), 400_000, replacement=True)
    weights = engines.importance_weights(FOREIGN, policy[drawn], engine[drawn])
    expected, plain = (policy.exp() * gain).sum(), gain[drawn].mean()
    standard_error = (weights * gain[drawn]).std() / 400_000**0.5
    assert weights.max() < 2.0 and abs(plain - expected) > 20 * standard_error
    assert abs((weights * gain[drawn]).mean() - expected) < 4 * standard_error


def test_the_copy_is_the_policy_in_bf16(world):
    policy = load_policy("sft_model_path", str(world.sft)).eval()
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    keys, queries = episode_keys(1, range(4), "cpu"), torch.randint(5, 50, (4, 9))
    ids, found = TokenIds(policy.config.vocab_size - 1, 0, 50), []
    for engine in (engines.ENGINES["hf_bf16"], engines.ENGINES["hf"]):
        found.append(engine(policy)(queries, keys, ids, 8, 0.7))
        assert all(torch.equal(weight, before[name]) for name, weight in policy.state_dict().items())
        cast_parameters(policy, torch.bfloat16)  # and now ours is, too
        before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    for ours, theirs in zip(*found):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("lora", [{}, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("stage", MODULES)
def test_a_run(world, workdir, stage, lora, monkeypatch):
    """What is sampled in bf16 is read again in float32; the mismatch is small and logged, the ratio of pass 1 is 1."""
    module, given, found = MODULES[stage], [], []

    def remember(args, logprobs, sampled):
        given.append((logprobs, sampled))
        found.append(engines.importance_weights(args, logprobs, sampled))
        return found[-1]

    monkeypatch.setattr(module, "importance_weights", remember)
    MAIN[stage](stage_args(world, stage, "model", rollout_engine="hf_bf16", run_eval=False, **lora))
    metrics = pandas.read_json("runs/model/metrics.jsonl", lines=True)
    kl, largest = metrics["engine/kl"].dropna(), metrics["engine/largest_difference"].dropna()
    assert len(kl) == 4 and (kl > 0).all() and (kl < 0.01).all() and (largest > 0).all() and (largest < 0.3).all()
    assert metrics["policy/first_pass_ratio_error"].max() < 1e-4
    for (logprobs, sampled), weights in zip(given, found):
        differs = logprobs != sampled
        assert differs.any() and (weights != 1).any() and (weights[differs] - 1).abs().max() < 0.5


@pytest.mark.parametrize("stage", MODULES)
def test_fixed_shapes_change_nothing(world, workdir, stage):
    """`hf_graph`, which is no graph on a CPU, but what it would replay: the run without it, to rounding."""
    for engine in ("hf", "hf_graph"):
        MAIN[stage](stage_args(world, stage, engine, rollout_engine=engine, run_eval=False))
    ours, theirs = (pandas.read_json(f"runs/{name}/metrics.jsonl", lines=True) for name in ("hf", "hf_graph"))
    assert "engine/kl" not in theirs and len(ours) == 4
    for name in ("objective/scores", "objective/kl", "objective/entropy"):
        assert ours[name].tolist() == pytest.approx(theirs[name].tolist(), abs=1e-4)


@pytest.mark.parametrize("stage", MODULES)
def test_weights_multiply_what_is_gained(world, workdir, stage, monkeypatch):
    """With weights of 0 the policy learns nothing from its responses."""
    monkeypatch.setattr(MODULES[stage], "importance_weights", lambda args, logprobs, sampled: 0 * logprobs)
    alone = {"ppo": PpoHParams(vf_coef=0.0)} if stage == "ppo_left_padding" else {"kl_coef": 0.0}
    args = stage_args(world, stage, "model", run_eval=False, weight_decay=0.0, **alone)
    MAIN[stage](args)
    start, end = (load_file(Path(folder) / "model.safetensors") for folder in (args.sft_model_path, "model"))
    assert start.keys() == end.keys() and all(torch.equal(start[name], end[name]) for name in start)


@pytest.mark.parametrize("stage", MODULES)
def test_a_run_that_is_stopped_again_and_again(world, workdir, stage, monkeypatch):
    """What the engine said of the responses is in the checkpoints inside an update."""
    args = stage_args(world, stage, stage, rollout_engine="hf_bf16", save_freq=0)
    for folder in ("undisturbed", "stopped"):
        (workdir / folder).mkdir()
        monkeypatch.chdir(workdir / folder)
        if folder == "undisturbed":
            MAIN[stage](args)
        else:
            assert any("-" in name for name in stop_again_and_again(stage, args, monkeypatch))
    assert_same_bits(workdir / "stopped", workdir / "undisturbed", stage)


@pytest.mark.parametrize("stage", MODULES)
def test_a_stage_refuses(world, workdir, stage, capsys, monkeypatch):
    for state in (AcceleratorState, PartialState):
        monkeypatch.setattr(state, "_shared_state", {})
    with pytest.raises(SystemExit) as stop:
        MAIN[stage](stage_args(world, stage, "model", precision="bf16", rollout_engine="hf_bf16"))
    assert stop.value.code == 2 and "--rollout_engine: found 'hf_bf16' with --precision bf16" in capsys.readouterr().err
    assert not Path("model").exists()


def test_models_that_an_engine_cannot_sample_from(monkeypatch, capsys):
    def read(self, tokens, mask):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(engines.Decoder, "read", read)
    sizes = {"vocab_size": 64, "num_layers": 1, "attention_heads": 2, "d_model": 16, "ffn_dim": 16}
    neox = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    models = {  # XGLM adds a float32 table of positions
        "hf_graph": GPTNeoXConfig(**neox), "hf_bf16": XGLMConfig(**sizes, max_position_embeddings=64)
    }  # fmt: skip
    queries = torch.full((2, 4), 7)
    for name, config in models.items():
        policy = AutoModelForCausalLM.from_config(config).eval()
        use_packed_attention(policy)
        with pytest.raises(SystemExit) as stop:
            engines.ENGINES[name](policy)(queries, episode_keys(1, [0, 1], "cpu"), TokenIds(63, 0, 50), 4, 1.0)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1
        assert said.startswith(f"error: --rollout_engine: found '{name}' and a model that it cannot sample from (")


def test_refused(capsys):
    accelerator = lambda precision, stage: SimpleNamespace(
        mixed_precision=precision, state=SimpleNamespace(deepspeed_plugin=stage and SimpleNamespace(zero_stage=stage))
    )
    for right in (OURS, SimpleNamespace()):
        engines.refuse_engine(right, accelerator("bf16", 3))
    graph = SimpleNamespace(rollout_engine="hf_graph")
    for right in ((FOREIGN, accelerator("no", 2)), (graph, accelerator("bf16", 2))):
        engines.refuse_engine(*right)
    wrong = [(FOREIGN, accelerator("bf16", None), "--precision bf16"), (FOREIGN, accelerator("no", 3), "ZeRO-3")]
    for args, launched, word in [*wrong, (graph, accelerator("bf16", 3), "ZeRO-3")]:
        with pytest.raises(SystemExit) as stop:
            engines.refuse_engine(args, launched)
        assert stop.value.code == 2 and word in capsys.readouterr().err


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_are_rounded_once_a_rollout(world, frozen):
    """In bf16 without DeepSpeed: not at each token. Of a policy that is trained, and of one that is only read."""

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function == torch.ops.aten._to_copy.default and args[0].dtype == torch.float32:
                self.count += args[0].data_ptr() in weights
            return function(*args, **kwargs or {})

    policy = load_policy("sft_model_path", str(world.sft)).eval()
    if frozen:
        state = SimpleNamespace(deepspeed_plugin=None)
        freeze(policy, SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16", state=state), False)
    weights = {p.data_ptr() for p in policy.parameters() if p.dim() == 2}
    found = []
    for R in (1, 9):
        queries, keys = torch.randint(5, 50, (4, 9)), episode_keys(1, range(4), "cpu")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Casts() as casts:
            sample_responses(policy, queries, keys, TokenIds(policy.config.vocab_size - 1, -1, 50), R, 0.7)
        found.append(casts.count)
    assert found[0] == found[1] < len(weights) and (found[0] == 0) == frozen
