"""The memory formula of docs/cluster.md: by hand, and against the peaks that were measured."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
import memory

DEEPSPEED = "distributed_type: DEEPSPEED\ndeepspeed_config"  # of an accelerate config
PEAKS = json.loads((ROOT / "benchmark/results/memory.json").read_text())["peaks"]


def test_parameters_of_the_papers_models():
    # the models' pages: 1,011,781,632, 2,775,208,960 and 6,857,302,016 parameters
    assert [s.policy for s in memory.PAPER] == pytest.approx([1_011_781_632, 2_775_208_960, 6_857_302_016], rel=1e-6)


def test_terms_by_hand():
    shape = memory.Shape("x", layers=2, hidden=10, vocabulary=100)
    assert shape.trunk == 100 * 10 + 2 * (1200 + 130) + 20 and shape.policy == shape.trunk + 1000
    plain = memory.memory(shape, memory.Layout("sft", rows=3, tokens=7, responses=7, width=4))
    N = shape.policy
    assert (plain["weights"], plain["gradients"], plain["optimizer"], plain["frozen"]) == (4 * N, 4 * N, 8 * N, 0)
    assert plain["activations"] == 3 * 7 * 10 * 4 * 2 * memory.SAVED_PER_LAYER
    assert plain["logits"] == 4 * 3 * 7 * 100
    ppo = {"stage": "ppo", "rows": 1, "tokens": 5, "responses": 2, "rollout_rows": 6, "processes": 4}
    zero2, zero3 = (memory.memory(shape, memory.Layout(**ppo, zero=stage)) for stage in (2, 3))
    N = shape.policy + shape.trunk
    assert zero2["optimizer"] == zero3["optimizer"] == 3 * N and zero2["cache"] == 2 * 2 * 2 * 10 * 5 * 6
    assert zero2["weights"] == 2 * N and zero3["weights"] == N / 2 and zero2["frozen"] == 2 * N
    assert zero3["rollout"] - zero3["cache"] == N / 2 + 3 * N + 2 * N + 2 * N
    # with --offload one frozen network at a time, the larger one (the policy's), and none while there is training
    away = memory.memory(shape, memory.Layout(**ppo, zero=2, offload=True))
    assert zero2["rollout"] - away["rollout"] == 2 * N - 2 * shape.policy
    assert zero2["train"] - away["train"] == zero2["step"] - away["step"] == 2 * N
    # without ZeRO gradients keep their place while PPO samples
    alone = memory.memory(shape, memory.Layout(**ppo | {"processes": 1}, width=4))
    assert alone["rollout"] - alone["cache"] == 4 * N + 8 * N + 4 * N + 4 * N


def test_sums_of_gradients_by_hand():
    """ZeRO-2: this rank's share in float32 under bf16; sums of bf16 are smaller until the step copies them twice."""
    shape = memory.Shape("x", layers=2, hidden=10, vocabulary=100)
    N = shape.policy + shape.trunk
    layout = {"stage": "ppo", "rows": 1, "tokens": 5, "responses": 2, "rollout_rows": 6, "processes": 4, "zero": 2}
    of = lambda **more: memory.memory(shape, memory.Layout(**layout, **more))
    fp32, bf16, plain = of(), of(sums=2), of(width=4)
    bucket = 2 * N  # smaller than DeepSpeed's
    assert fp32["gradients"] == 4 * N / 4 + bucket and bf16["gradients"] == 2 * N / 4 + bucket
    assert fp32["train"] - bf16["train"] == 2 * N / 4
    rest = fp32["weights"] + fp32["optimizer"] + fp32["frozen"]
    assert fp32["step"] - rest == 4 * N / 4 + bucket and bf16["step"] - rest == (2 + 2 + 4) * N / 4 + bucket
    assert plain["step"] - plain["weights"] - plain["optimizer"] - plain["frozen"] == (4 + 4) * N / 4 + 2 * bucket


def test_sizes_of_other_models(world, tmp_path):
    """A folder tells its own size, to the parameter; tied weights are counted once; an unknown hub id tells none."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    network = AutoModelForCausalLM.from_pretrained(world.base)
    found = memory.shape_of(world.base)
    assert found.policy == sum(p.numel() for p in network.parameters())
    assert found.trunk == sum(p.numel() for p in network.base_model.parameters())
    sizes = {"vocab_size": 96, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    tied = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))
    tied.save_pretrained(tmp_path / "tied")
    found = memory.shape_of(str(tmp_path / "tied"))
    assert found.policy == found.trunk == sum(p.numel() for p in tied.parameters())
    assert (found.layers, found.hidden, found.vocabulary) == (3, 16, 96)
    assert memory.shape_of("nobody/nothing") is None and memory.shape_of("EleutherAI/pythia-6.9b-deduped").layers == 32


@pytest.mark.parametrize(
    "launch, config, expected",
    [
        ("--config_file x.yaml", f"{DEEPSPEED}: {{zero_stage: 3}}\nmixed_precision: bf16",
         {"zero": 3, "width": 2}),
        ("--config_file=x.yaml", f"{DEEPSPEED}: {{zero_stage: 2}}",
         {"zero": 2, "width": 4}),
        ("--config_file x.yaml", f"{DEEPSPEED}: {{deepspeed_config_file: x.json}}",
         {"zero": 2, "sums": 2}),
        ("--config_file x.yaml", f"{DEEPSPEED}: {{zero_stage: 2}}\nuse_cpu: true", None),
        ("--config_file x.yaml", f"{DEEPSPEED}: {{offload_optimizer_device: cpu}}", None),
        ("--cpu --mixed_precision no", "", None),
        ("--num_processes 1", "", {"width": 4}),
    ],
)  # fmt: skip
def test_layout_of_a_launch(tmp_path, monkeypatch, launch, config, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(config)
    (tmp_path / "x.json").write_text('{"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}}')
    assert memory.read_launch(launch) == expected


def test_the_choice_is_the_first_that_fits(capsys):
    ask = lambda gpu_gb, given="": memory.fit(
        memory.Args(fit="ppo_left_padding", model="a/pythia-1b", gpu_gb=gpu_gb, rows=16, rollout_rows=64, given=given,
                    launch=f"--config_file {ROOT}/deepspeed.yaml")
    )[0]  # fmt: skip
    assert [ask(gpu_gb) for gpu_gb in (80, 37, 36, 32, 16)] == [
        "", "", "--offload", "--gradient_checkpointing", "--offload --gradient_checkpointing"
    ]  # fmt: skip
    assert ask(36, "--no-offload") == "--gradient_checkpointing" and ask(36, "--offload") == ""
    with pytest.raises(SystemExit) as stopped:
        ask(10)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: GPU_GB: found 10, and ppo") and said.count("\n") == 1


@pytest.mark.parametrize("name", PEAKS)
def test_formula_is_within_15_percent_of_what_was_measured(name):
    shape, run = name.split(": ")
    shapes = {s.name: s for s in memory.MEASURED}
    predicted = memory.memory(shapes[shape], memory.measured_layouts()[run])["peak"] / 1e9
    assert predicted == pytest.approx(PEAKS[name]["measured_gb"], rel=0.15)
    assert len(PEAKS) >= 14
