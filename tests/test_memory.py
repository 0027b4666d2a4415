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
    # SFT's evaluation samples, too; the reward model's does not
    sampled = {"rows": 1, "tokens": 5, "responses": 5, "rollout_rows": 600, "width": 4}
    sft, reward = (memory.memory(shape, memory.Layout(stage, **sampled)) for stage in ("sft", "reward"))
    assert sft["peak"] == sft["rollout"] == 16 * shape.policy + sft["cache"] and reward["cache"] == 0
    assert sft["cache"] == 2 * 4 * 2 * 10 * 5 * 600
    # without ZeRO gradients keep their place while PPO samples
    alone = memory.memory(shape, memory.Layout(**ppo | {"processes": 1}, width=4))
    assert alone["rollout"] - alone["cache"] == 4 * N + 8 * N + 4 * N + 4 * N


def test_sums_of_gradients_by_hand():
    """ZeRO-2: this rank's share in float32 under bf16; sums of bf16 are smaller until the step copies them twice."""
    shape = memory.Shape("x", layers=2, hidden=10, vocabulary=100)
    N = shape.policy + shape.trunk
    layout = {"stage": "ppo", "rows": 1, "tokens": 5, "responses": 2, "rollout_rows": 6, "processes": 4, "zero": 2}
    of = lambda **more: memory.memory(shape, memory.Layout(**layout | more))
    fp32, bf16, plain = of(), of(sums=2), of(width=4)
    bucket = 2 * N  # smaller than DeepSpeed's
    assert fp32["gradients"] == 4 * N / 4 + bucket and bf16["gradients"] == 2 * N / 4 + bucket
    assert fp32["train"] - bf16["train"] == 2 * N / 4
    rest = fp32["weights"] + fp32["optimizer"] + fp32["frozen"]
    assert fp32["step"] - rest == 4 * N / 4 + bucket and bf16["step"] - rest == (2 + 2 + 4) * N / 4 + bucket
    assert plain["step"] - plain["weights"] - plain["optimizer"] - plain["frozen"] == (4 + 4) * N / 4 + 2 * bucket
    # ZeRO-1 keeps whole gradients, in bf16, and copies its share of them
    first = of(zero=1, sums=2)
    assert first["gradients"] == 2 * N + bucket and first["step"] - rest == 2 * N + bucket + (2 + 4) * N / 4


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
    # whatever is wrong with a folder, its stage will say
    (tmp_path / "odd").mkdir()
    for config in ('{"model_type": "llama", "num_attention_heads": 0}', '{"model_type": "t5"}', "[]", "{"):
        (tmp_path / "odd/config.json").write_text(config)
        assert memory.shape_of(str(tmp_path / "odd")) is None


def test_adapters_by_hand():
    """One trunk, or two; what is trained has float32 weights, gradients and two moments; the rest has none."""
    shape = memory.Shape("x", layers=2, hidden=10, vocabulary=100)
    A = shape.adapters(3)
    assert A == 2 * 3 * ((10 + 30) + (10 + 10) + (10 + 40) + (40 + 10))
    layout = {"stage": "ppo", "rows": 1, "tokens": 5, "responses": 2, "rollout_rows": 0, "lora": 3}
    of = lambda **more: memory.memory(shape, memory.Layout(**layout | more))
    one, two = of(), of(trunks=2)
    assert (one["weights"], one["gradients"], one["optimizer"]) == (4 * 2 * A, 4 * 2 * A, 8 * 2 * A)
    # the reward model's own frozen adapters, unless it was trained whole
    assert one["frozen"] == 2 * (shape.policy + A) and two["frozen"] == 2 * (shape.policy + shape.trunk)
    assert one["train"] == one["frozen"] + 16 * 2 * A + one["activations"] + one["logits"]
    whole = memory.memory(shape, memory.Layout(**layout | {"lora": 0}))
    assert one["activations"] == whole["activations"]
    three = of(zero=3, processes=4)
    assert three["frozen"] == 2 * (shape.policy / 4 + A)
    assert three["rollout"] - three["weights"] - three["optimizer"] - three["frozen"] == 2 * (2 * A + shape.policy)
    # SFT and the reward model have one network
    assert of(stage="reward")["frozen"] == 2 * shape.trunk and of(stage="sft")["optimizer"] == 8 * A


def test_adapters_fit_where_whole_networks_do_not(capsys):
    lora = {"given": "--lora --lora.rank 8 --lr 3e-5", "launch": "--num_processes 1", "processes": 1}
    lora |= {"rollout_rows": 4, "rows": 1}
    assert ask(24, model="a/pythia-6.9b", **lora)[0] == ""
    assert ask(20, model="a/pythia-6.9b", **lora)[0] == "--gradient_checkpointing"
    assert ask(8, model="a/pythia-1b", **lora)[0] == ""
    with pytest.raises(SystemExit):
        ask(24, model="a/pythia-6.9b", **lora | {"given": "--lora --precision fp32"})


UNKNOWN = "not known how it is launched, so nothing is checked"
PLAIN = {"width": 4}


@pytest.fixture
def launches(tmp_path, monkeypatch):
    """A folder to launch from, by a user who has never run `accelerate config`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize(
    "launch, config, expected",
    [
        ("--config_file x.yaml", f"{DEEPSPEED}: {{zero_stage: 3}}\nmixed_precision: bf16",
         {"zero": 3, "width": 2, "sums": 4}),
        ("--config_file=x.yaml", f"{DEEPSPEED}: {{zero_stage: 2}}",
         {"zero": 2, "width": 4, "sums": 4}),
        ("--config-file x.yaml --mixed_precision=bf16", f"{DEEPSPEED}: {{zero_stage: 1}}",
         {"zero": 1, "width": 2, "sums": 2}),
        ("--config_file x.yaml", f"{DEEPSPEED}: {{deepspeed_config_file: x.json}}",
         {"zero": 2, "width": 2, "sums": 2}),
        ("--config_file x.yaml", f"{DEEPSPEED}: {{zero_stage: 2}}\nuse_cpu: true", ""),
        ("--config_file x.yaml", f"{DEEPSPEED}: {{offload_optimizer_device: cpu}}", ""),
        ("--cpu --mixed_precision no", "", ""),
        ("--num_processes 1", "", PLAIN),
        ("python -m accelerate.commands.launch --num_processes 1 --num_machines 1 --dynamo_backend no", "", PLAIN),
        ("some/python", "", PLAIN),
        ("--config_file x.yaml", "distributed_type: NO", PLAIN),
        ("--config_file x.yaml", "distributed_type: MULTI_GPU", PLAIN),
        # more than is read here
        ("--use_deepspeed --zero_stage 2 --mixed_precision bf16", "", UNKNOWN),
        ("--use-deepspeed", "", UNKNOWN),
        ("--config_file x.yaml --zero_stage=3", f"{DEEPSPEED}: {{zero_stage: 2}}", UNKNOWN),
        ("--config_file x.yaml --multi_gpu", f"{DEEPSPEED}: {{zero_stage: 2}}", UNKNOWN),
        ("--use_fsdp", "", UNKNOWN),
        ("--config_file x.yaml", "distributed_type: FSDP", UNKNOWN),
        ("--config_file x.yaml", f"{DEEPSPEED}: {{zero_stage: 0}}", UNKNOWN),
    ],
)  # fmt: skip
def test_layout_of_a_launch(launches, launch, config, expected):
    (launches / "x.yaml").write_text(config)
    (launches / "x.json").write_text('{"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}}')
    assert memory.read_launch(launch) == expected


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_without_a_config_file_accelerates_own_is_read(launches, ending):
    own = launches / f"home/accelerate/default_config.{ending}"
    own.parent.mkdir(parents=True)
    settings = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}, "mixed_precision": "bf16"}
    own.write_text(json.dumps(settings))
    assert memory.read_launch("--num_processes 8") == {"zero": 3, "width": 2, "sums": 4}
    assert memory.read_launch("") == {"zero": 3, "width": 2, "sums": 4} and memory.read_launch("python") == PLAIN
    assert memory.read_launch("--cpu") == ""
    (launches / "x.yaml").write_text("distributed_type: MULTI_GPU")
    assert memory.read_launch("--config_file x.yaml") == PLAIN


@pytest.mark.parametrize(
    "config, found",
    [
        (None, "'x.yaml', which is no file"),
        ("- a\n- list", "'x.yaml', which holds no settings"),
        ("{", "'x.yaml', which holds no settings"),
        (f"{DEEPSPEED}: {{deepspeed_config_file: y.json}}", "'y.json', which is no file"),
    ],
)
def test_a_config_file_that_is_none_is_refused(launches, capsys, config, found):
    if config:
        (launches / "x.yaml").write_text(config)
    with pytest.raises(SystemExit) as stopped:
        memory.read_launch("--config_file x.yaml")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"error: --config_file: found {found}; expected a config file of accelerate")


def ask(gpu_gb: float, given: str = "", stage: str = "ppo_left_padding", **more) -> tuple[str, str]:
    """What a stage of Pythia 1B is told."""
    return memory.fit(
        memory.Args(fit=stage, gpu_gb=gpu_gb, given=given, **{
            "model": "a/pythia-1b", "rollout_rows": 64, "rows": 16,
            "launch": f"--config_file {ROOT}/deepspeed.yaml"} | more)
    )  # fmt: skip


def test_the_choice_is_the_first_that_fits(capsys):
    assert [ask(gpu_gb)[0] for gpu_gb in (80, 37, 36, 32, 16)] == [
        "", "", "--offload", "--gradient_checkpointing", "--offload --gradient_checkpointing"
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        ask(10)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: GPU_GB: found 10, and ppo") and said.count("\n") == 1
    # SFT's training takes 6 GB, its evaluation 8
    assert ask(10, stage="sft", rows=1) == ("", "")
    with pytest.raises(SystemExit):
        ask(9, stage="sft", rows=1)
    assert ask(9, stage="reward", rows=1)[0] == ""
    assert ask(1, launch="--use_deepspeed --zero_stage 2")[1] == f"memory of ppo with pythia-1b: {UNKNOWN}"
    assert ask(1, launch="--cpu") == ("", "")


@pytest.mark.parametrize(
    "given, gpu_gb, added",
    [
        ("--no-offload", 36, "--gradient_checkpointing"),
        ("--no_offload", 36, "--gradient_checkpointing"),
        ("--offload --no_offload", 36, "--gradient_checkpointing"),
        ("--no-offload --offload", 36, ""),
        ("--offload", 36, ""),
        ("--run_name no_offload --lr=1e-5", 36, "--offload"),
        ("--gradient_checkpointing", 32, ""),
        ("--gradient-checkpointing", 32, ""),
        ("--gradient-checkpointing --offload", 16, ""),
        ("--gradient-checkpointing", 16, "--offload"),
        ("--no-gradient_checkpointing", 36, "--offload"),
        ("--no_gradient-checkpointing", 32, None),
        ("--precision bf16", 37, ""),
        ("--precision=bf16", 37, ""),
        ("--precision fp32", 37, "--gradient_checkpointing"),
        ("--precision=fp32", 37, "--gradient_checkpointing"),
        ("--precision=fp32 --precision auto", 37, ""),
    ],
)
def test_what_is_given_is_read_as_tyro_reads_it(given, gpu_gb, added):
    if added is None:
        with pytest.raises(SystemExit):
            ask(gpu_gb, given)
    else:
        assert ask(gpu_gb, given)[0] == added


@pytest.mark.parametrize("name", PEAKS)
def test_formula_is_within_15_percent_of_what_was_measured(name):
    shape, run = name.split(": ")
    shapes = {s.name: s for s in memory.MEASURED}
    predicted = memory.memory(shapes[shape], memory.measured_layouts()[run])["peak"] / 1e9
    assert predicted == pytest.approx(PEAKS[name]["measured_gb"], rel=0.15)
    assert len(PEAKS) >= 14


LORA = json.loads((ROOT / "benchmark/results/memory.json").read_text())["lora"]["peaks"]


@pytest.mark.parametrize("name", LORA)
def test_formula_is_within_10_percent_with_adapters(name):
    shape, run = name.rsplit(": ", 1)
    layout = memory.measured_lora_layouts()[run]
    predicted = memory.memory({s.name: s for s in memory.TRUNKS}[shape], layout)["peak"] / 1e9
    assert predicted == pytest.approx(LORA[name]["measured_gb"], rel=0.1)


@pytest.mark.parametrize("shape", [shape.name for shape in memory.TRUNKS])
def test_what_adapters_save(shape):
    """PPO's measured peak: on one trunk at most 0.4 of that of whole networks, on two at most 0.6."""
    peak = {run: LORA[f"{shape}: {run}"]["measured_gb"] for run in memory.measured_lora_layouts()}
    assert peak["PPO, LoRA, one trunk"] <= 0.4 * peak["PPO, whole"]
    assert peak["PPO, LoRA, two trunks"] <= 0.6 * peak["PPO, whole"]
