"""LoRA: four roles on one trunk, each exactly what it is without it; adapters are trained, kept, merged and read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
from conftest import launch_all
from peft import PeftModel
from safetensors.torch import load_file
from test_resume import compare_runs
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from summarize_from_feedback_details import ppo_left_padding, reward, sft
from summarize_from_feedback_details.common import checkpoints, policies, reward_models
from summarize_from_feedback_details.common.adapters import LoraParams, find_adapter, has_adapters, share_weights
from summarize_from_feedback_details.common.check_inputs import find_tokenizer
from summarize_from_feedback_details.common.logprobs import response_logits, token_logprobs
from summarize_from_feedback_details.common.packed_rows import supports_packing
from summarize_from_feedback_details.common.policies import load_policy, load_policy_and_reference
from summarize_from_feedback_details.common.precision import choose_precision
from summarize_from_feedback_details.common.reward_models import (
    load_reward_and_value,
    load_reward_model,
    read_rewards,
)
from summarize_from_feedback_details.common.run_folder import REQUEUE_ME
from summarize_from_feedback_details.ppo_left_padding import PolicyAndValue

LORA = {"lora": True, "lora_params": LoraParams(rank=4, alpha=8), "lr": 1e-2}
QUERIES, RESPONSES = [[5, 9, 30, 7], [8, 8, 21], [40]], [[3, 4], [11, 6, 0], [17, 2, 5, 0]]
PEFT = {"policy": AutoModelForCausalLM, "reward": AutoModelForSequenceClassification}


class Roles:
    """Checkpoints of one architecture: SFT policy, reward model with adapters, reward model trained whole."""

    def __init__(self, world, folder: Path, tied_llama: bool):
        self.world, self.base, self.sft, self.whole = world, world.base, world.sft, world.reward
        if tied_llama:
            tokenizer = find_tokenizer("base_model", world.base)
            torch.manual_seed(3)
            config = LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=256,
            )  # fmt: skip
            self.base = self.sft = str(folder / "llama")
            LlamaForCausalLM(config).save_pretrained(self.sft)
            AutoTokenizer.from_pretrained(world.base).save_pretrained(self.sft)
            self.whole = str(folder / "whole")
            reward.main(self.reward_args(self.whole, run_eval=False))
        self.reward = str(folder / "reward")
        reward.main(self.reward_args(self.reward, run_eval=False, **LORA))

    def reward_args(self, output_dir, **changes):
        return self.world.reward_args(output_dir, base_model=self.base, sft_model_path=self.sft, **changes)

    def ppo_args(self, output_dir, **changes):
        models = {"base_model": self.base, "sft_model_path": self.sft, "reward_model_path": self.reward}
        return self.world.ppo_args(output_dir, **(models | LORA | changes))


@pytest.fixture(scope="module", params=["gpt_neox", "tied llama"])
def roles(request, world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return Roles(world, folder, request.param == "tied llama")


def load_four(args, dtype=torch.float32):
    policy, reference = load_policy_and_reference(args, dtype)
    return [network.eval() for network in (policy, reference, *load_reward_and_value(args, reference, dtype))]


@torch.no_grad()
def logprobs(policy):
    return token_logprobs(*response_logits(policy, QUERIES, RESPONSES), 0.7)


ROWS = [q + r for q, r in zip(QUERIES, RESPONSES)]


@torch.no_grad()
def plain_rewards(model, bias):
    """By a forward pass of the class, a row at a time."""
    model.config.pad_token_id = None
    return torch.tensor([float(model(input_ids=torch.tensor([row])).logits) for row in ROWS]) + bias


@pytest.mark.parametrize("packed", [True, False])
@torch.no_grad()
def test_each_role_starts_as_what_it_is_alone(roles, monkeypatch, packed):
    if not packed:
        for owner in (policies, reward_models):
            monkeypatch.setattr(owner, "use_packed_attention", lambda model: False)
    policy, reference, reward_model, value = load_four(roles.ppo_args("unused"))
    assert all(supports_packing(network) is packed for network in (policy, reference, reward_model, value))
    alone = logprobs(load_policy("sft_model_path", roles.sft))
    assert torch.equal(logprobs(policy), logprobs(reference))
    torch.testing.assert_close(logprobs(reference), alone, rtol=0, atol=1e-6)
    rewards, bias = read_rewards(reward_model, ROWS), reward_model.config.reward_bias
    assert rewards.std() > 0.01 and bias != 0
    torch.testing.assert_close(rewards, read_rewards(load_reward_model(roles.reward), ROWS), rtol=0, atol=1e-5)
    merged = AutoModelForSequenceClassification.from_pretrained(roles.reward, dtype=torch.float32)
    torch.testing.assert_close(rewards, plain_rewards(merged, bias), rtol=0, atol=1e-5)
    trunk = AutoModelForSequenceClassification.from_pretrained(roles.sft, num_labels=1, dtype=torch.float32)
    by_peft = PeftModel.from_pretrained(trunk, f"{roles.reward}/adapter")
    torch.testing.assert_close(rewards, plain_rewards(by_peft, bias), rtol=0, atol=1e-5)
    # the value after a row's last token but one, and after none: what the reward model says there
    trained = PolicyAndValue(policy, value)
    values = trained.values(QUERIES, RESPONSES, [1] * len(QUERIES))
    torch.testing.assert_close(values, read_rewards(reward_model, QUERIES), rtol=0, atol=1e-5)


def test_one_trunk_is_there_once(roles):
    """All four are trees over the same tensors; adapters, heads and the value's bias are trained, nothing else."""
    policy, reference, reward_model, value = load_four(roles.ppo_args("unused"))
    own = {id(p) for p in reference.parameters()}
    trained = PolicyAndValue(policy, value)
    others = [(n, p) for net in (trained, reward_model) for n, p in net.named_parameters() if id(p) not in own]
    assert all(".lora_" in name or name.endswith(("score.weight", "value_bias")) for name, _ in others)
    learning = {name for name, p in trained.named_parameters() if p.requires_grad}
    assert learning == {n for n, p in trained.named_parameters() if id(p) not in own}
    layers = {name.split(".lora_")[0] for name in learning if ".lora_" in name}
    assert len(layers) == 2 * sum(isinstance(m, torch.nn.Linear) for m in reference.base_model.modules())
    # the value network's adapters are copies: they start alike and are other tensors than the reward model's
    ours, theirs = (dict(n.named_parameters()) for n in (value, reward_model))
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name])
        assert (parameter is theirs[name]) is (id(parameter) in own)


@pytest.mark.parametrize("whole", [False, True])
def test_precisions_of_a_trunk_in_bf16(roles, whole):
    """What is trained stays float32, and heads keep the bits of their files; the trunk is read into bf16."""
    path = roles.whole if whole else roles.reward
    policy, reference, reward_model, value = load_four(roles.ppo_args("x", reward_model_path=path), torch.bfloat16)
    for network in (policy, reference, reward_model, value):
        for name, parameter in network.named_parameters():
            expected = torch.float32 if ".lora_" in name or name.startswith("score.") else torch.bfloat16
            assert parameter.dtype == expected, name
    head = load_file(f"{path}/model.safetensors")["score.weight"]
    assert torch.equal(reward_model.score.weight, head) and torch.equal(value.score.weight, head)


@pytest.fixture
def spied(monkeypatch):
    """What PPO's main works with: its four networks, and its optimiser."""
    found = SimpleNamespace(batches=[])
    for name in ("load_policy_and_reference", "load_reward_and_value", "prepare"):
        real = getattr(ppo_left_padding, name)

        def spy(*args, real=real, name=name):
            setattr(found, name, real(*args))
            if name == "load_reward_and_value":
                found.before = {k: v.clone() for k, v in found.load_policy_and_reference[1].state_dict().items()}
            return getattr(found, name)

        monkeypatch.setattr(ppo_left_padding, name, spy)
    return found


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"offload": True}], ids=["", "again", "off"])
def test_training_leaves_the_trunk_alone(roles, workdir, spied, changes, capsys):
    """KL 0 and ratio 1 at the start; after it plain checkpoints, equal to peft's own loading of what was kept."""
    args = roles.ppo_args("ppo", value_output_dir="value", save_freq=1, keep=9, **changes)
    ppo_left_padding.main(args)
    _, reference = spied.load_policy_and_reference
    assert all(torch.equal(spied.before[name], weight) for name, weight in reference.state_dict().items())
    model, optimizer, _ = spied.prepare
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert (
        stepped
        == {id(p) for p in model.parameters() if p.requires_grad}
        == {id(p) for n, p in model.named_parameters() if ".lora_" in n or n.endswith(("score.weight", "value_bias"))}
    )
    assert all((p.grad is not None) is p.requires_grad for p in model.parameters())
    metrics = pandas.read_json("runs/ppo/metrics.jsonl", lines=True)
    assert metrics["objective/kl"][0] == pytest.approx(0, abs=1e-5) and metrics["objective/kl"][1] != 0
    assert metrics["policy/first_pass_ratio_error"].max() < 1e-5
    said = capsys.readouterr().out
    assert said.count("merged in float32: its") == 2 and "WARNING" not in said
    for name, kind in (("ppo", "policy"), ("value", "reward")):
        trunk = PEFT[kind].from_pretrained(
            roles.sft, dtype=torch.float32, **({"num_labels": 1} if name == "value" else {})
        )
        by_peft = PeftModel.from_pretrained(trunk, f"{name}/adapter")
        merged, row = PEFT[kind].from_pretrained(name, dtype=torch.float32), torch.tensor([ROWS[1]])
        merged.config.pad_token_id = trunk.config.pad_token_id = None
        assert set(load_file(f"{name}/model.safetensors")) == set(trunk_names(kind, roles.sft))
        with torch.no_grad():
            torch.testing.assert_close(merged(row).logits, by_peft(row).logits, rtol=0, atol=1e-5)
        assert not torch.equal(load_file(f"{name}/model.safetensors")[changed(merged)], spied.before[changed(merged)])
    network = spied.load_policy_and_reference[0]
    assert has_adapters(network) and not has_adapters(reference)
    torch.testing.assert_close(logprobs(network), logprobs(load_policy("x", "ppo")), rtol=0, atol=1e-5)


def trunk_names(kind, path):
    """Weights of a plain checkpoint of this architecture."""
    names = set(load_file(f"{path}/model.safetensors"))
    return (
        names
        if kind == "policy"
        else {n for n in names if not n.startswith(("embed_out", "lm_head"))} | {"score.weight"}
    )


def changed(model) -> str:
    """Name of a weight that has an adapter."""
    return next(n for n, _ in model.named_parameters() if n.endswith(("query_key_value.weight", "q_proj.weight")))


def test_recomputed_activations_change_nothing(roles, workdir):
    for name, again in (("a", False), ("b", True)):
        ppo_left_padding.main(roles.ppo_args(name, gradient_checkpointing=again))
    one, other = (load_file(f"{name}/model.safetensors") for name in "ab")
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-6)


def test_a_stop_changes_nothing(roles, workdir, monkeypatch):
    """Stopped in each update, also inside it: the same bits; checkpoints hold adapters and their moments only."""
    args = roles.ppo_args("ppo", num_updates=3, value_output_dir="value", save_freq=1, keep=99)
    ppo_left_padding.main(replace(args, run_name="undisturbed", output_dir="other", value_output_dir="other_value"))
    real, asked, sessions, names = checkpoints.Checkpoints.stop_asked, [0], 0, set()

    def now_and_then(self):
        asked[0] += 1
        return asked[0] % 7 == 0 or real(self)

    monkeypatch.setattr(checkpoints.Checkpoints, "stop_asked", now_and_then)
    while True:
        sessions += 1
        try:
            ppo_left_padding.main(replace(args))
            break
        except SystemExit as stopped:
            assert stopped.code == REQUEUE_ME and sessions < 20
            for file in Path("runs/ppo/checkpoints").glob("*/rank_00000.safetensors"):
                names |= set(load_file(file))
                full = Path(f"{roles.sft}/model.safetensors").stat().st_size
                assert file.stat().st_size < full  # with moments; whole ones would take 24 bytes a parameter
    assert sessions > 2
    kept = {n.split(".", 1)[1] for n in names if n.startswith(("weight.", "exp_avg"))}
    assert kept and all(".lora_" in n or n.endswith(("score.weight", "value_bias")) for n in kept)
    for folder, other in (("ppo", "other"), ("value", "other_value")):
        compare_runs(Path("runs/ppo"), Path("runs/undisturbed"), Path(folder), Path(other))
        ours, theirs = (load_file(f"{f}/adapter/adapter_model.safetensors") for f in (folder, other))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [None, *(pytest.param(zero, marks=pytest.mark.torture) for zero in (2, 3))])
def test_bf16(world, workdir, zero):
    """A trunk in bf16: all roles start as the same networks, and what is kept loads as float32."""
    if choose_precision("auto") != "bf16":
        pytest.skip("this CPU does not multiply in bf16")
    sizes = {"world_size": 2, "deepspeed": True, "local_micro_batch_size": 2} if zero else {}
    bf16 = {"precision": "bf16"} | LORA | sizes
    args = world.ppo_args("ppo", reward_model_path="reward", num_eval_rows=4, **bf16)
    jobs = [("reward", world.reward_args("reward", run_eval=False, **bf16)), ("ppo_left_padding", args)]
    done = launch_all(jobs, workdir, 2 if zero else 1, zero)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    metrics = pandas.read_json("runs/ppo/metrics.jsonl", lines=True)
    first = metrics.iloc[0]
    assert first["objective/kl"] == first["objective/kl_k3"] == first["policy/first_pass_ratio_error"] == 0
    assert metrics["objective/kl_k3"][1] > 0
    assert all(w.dtype == torch.float32 for w in load_file("ppo/model.safetensors").values())
    assert json.loads(Path("ppo/config.json").read_text())["dtype"] == "float32"


def test_a_reward_model_that_was_trained_whole(roles, workdir, capsys):
    """Two trunks: policy and reference on the SFT policy's, value and reward on the reward model's."""
    args = roles.ppo_args("ppo", reward_model_path=roles.whole, value_output_dir="value")
    policy, reference, reward_model, value = load_four(args)
    assert torch.equal(logprobs(policy), logprobs(load_policy("x", roles.sft)))
    with torch.no_grad():
        rewards = read_rewards(load_reward_model(roles.whole), QUERIES)
        values = PolicyAndValue(policy, value).values(QUERIES, RESPONSES, [1] * len(QUERIES))
    torch.testing.assert_close(values, rewards, rtol=0, atol=1e-5)
    frozen = {id(p) for p in value.parameters() if not p.requires_grad}
    assert frozen == {id(p) for n, p in reward_model.named_parameters() if n != "score.weight"}
    assert not frozen & {id(p) for p in policy.parameters()}
    head = reward_model.score.weight.clone()
    ppo_left_padding.main(replace(args))
    assert "two trunks" in capsys.readouterr().out
    assert torch.equal(load_reward_model(roles.whole).score.weight, head)
    assert not torch.equal(load_file("value/model.safetensors")["score.weight"], head)


def test_sft(world, workdir, capsys):
    """Adapters on the base model; the policy is a plain one, which is the trunk of what follows."""
    sft.main(world.sft_args("sft", **LORA))
    losses = pandas.read_json("runs/sft/metrics.jsonl", lines=True)["train/sft/loss"].dropna()
    assert losses.iloc[-1] < losses.iloc[0] and "merged in float32: its logits" in capsys.readouterr().out
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (world.base, "sft"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    linear = [n for n, m in load_policy("x", world.base).base_model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert moved == {f"gpt_neox.{name}.weight" for name in linear}  # embedding, head, norms and biases stay
    merged = AutoModelForCausalLM.from_pretrained("sft")
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.base), "sft/adapter")
    with torch.no_grad():
        torch.testing.assert_close(merged(torch.tensor(ROWS[:1])).logits, by_peft(torch.tensor(ROWS[:1])).logits)
    reward.main(world.reward_args("reward", sft_model_path="sft", run_eval=False, **LORA))
    ppo_left_padding.main(world.ppo_args("ppo", sft_model_path="sft", reward_model_path="reward", **LORA))
    assert find_adapter("ppo", None) == "ppo/adapter"


def test_layers_by_name(world, workdir):
    sft.main(world.sft_args("sft", run_eval=False, **(LORA | {"lora_params": LoraParams(2, 4, "query_key_value")})))
    names = load_file("sft/adapter/adapter_model.safetensors")
    assert names and all("query_key_value.lora_" in name for name in names)
    assert all(2 in weight.shape for weight in names.values())


def test_sharing_is_not_copying(world):
    policy = load_policy("x", world.sft)
    other = share_weights(policy)
    assert other is not policy and other.config is not policy.config
    assert [id(p) for p in other.parameters()] == [id(p) for p in policy.parameters()]
    assert torch.equal(logprobs(other), logprobs(policy))


def other_trunk(roles):
    """The reward model's adapter with another SFT policy: one of the same architecture, trained differently."""
    sft.main(roles.world.sft_args("other_sft", base_model=roles.base, run_eval=False))
    return {"sft_model_path": "other_sft"}


def broken(change):
    def make(roles):
        shutil.copytree(roles.reward, "broken")
        file = Path("broken/adapter/adapter_config.json")
        file.write_text(change(json.loads(file.read_text())))
        return {"reward_model_path": "broken"}

    return make


BAD = {
    "rank 0": ({"lora_params": LoraParams(rank=0)}, "--lora.rank: found 0; expected a number above 0"),
    "rank -1": ({"lora_params": LoraParams(rank=-1)}, "--lora.rank: found -1; expected a number above 0"),
    "alpha": ({"lora_params": LoraParams(alpha=0)}, "--lora.alpha: found 0; expected a number above 0"),
    "target": ({"lora_params": LoraParams(target="q_prog")}, "--lora.target: found 'q_prog', which '"),
    "embedding": ({"lora_params": LoraParams(target="embed_in")}, "--lora.target: found 'embed_in', which '"),
    "without": ({"lora": False}, "--lora.rank: found 4 without --lora; expected --lora as well"),
    "no trunk": ({"sft_model_path": "nowhere/x/y"}, "--sft_model_path: found 'nowhere/x/y', which does not exist"),
    "adapter": (lambda r: {"sft_model_path": f"{r.reward}/adapter"}, "an adapter without its model; expected"),
    "adapter as reward": (lambda r: {"reward_model_path": f"{r.reward}/adapter"}, "an adapter without its model; exp"),
    "other trunk": (other_trunk, "expected a reward model that was trained on this SFT policy"),
    "no fingerprint": (broken(lambda c: json.dumps(c | {"auto_mapping": None})), "that does not name its trunk"),
    "torn": (broken(lambda c: json.dumps(c)[:50]), "that does not name its trunk"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(roles, workdir, capsys, name):
    change, expected = BAD[name]
    change = change(roles) if callable(change) else change
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        ppo_left_padding.main(roles.ppo_args("ppo", **change))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and expected in said, said
    assert not Path("ppo").exists() and not Path("runs/ppo").exists()
