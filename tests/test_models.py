"""Families of models as transformers builds them, tiny and random: through each stage's own functions they give what
plain passes over one row at a time give. Checkpoints whose config names another pad; a tokenizer in plain Python."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import World
from test_packed_rows import compare_gradients
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ByT5Tokenizer,
    GPTNeoXConfig,
    LlamaConfig,
    MptConfig,
)

from summarize_from_feedback_details import ppo_left_padding as ppo
from summarize_from_feedback_details import reward, sft, tldr_dataset
from summarize_from_feedback_details.common import precision, reward_models, sampling, training
from summarize_from_feedback_details.common.adapters import LoraParams, add_adapter, merge_adapters, share_weights
from summarize_from_feedback_details.common.check_inputs import TokenIds, check_context, find_model, find_tokenizer
from summarize_from_feedback_details.common.packed_rows import supports_packing, use_packed_attention

VOCAB, PAD, BOS, EOS = 96, 96, 1, 2  # the pad lies behind the embedding
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {"intermediate_size": 64, "num_key_value_heads": 2}
WINDOW = {"sliding_window": 6, "head_dim": 8}  # shorter than a row
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
FAMILIES = {
    "gpt_neox": {"intermediate_size": 64},
    "llama": GROUPED,  # Llama 3: grouped heads
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "gemma": GROUPED | {"head_dim": 8},
    "gemma2": GROUPED | WINDOW,
    "gemma3_text": GROUPED | WINDOW,
    "mistral": GROUPED | WINDOW,
    "mixtral": GROUPED | EXPERTS,
    "phi": GROUPED,
    "phi3": GROUPED,
    "olmo2": GROUPED,
    "gpt_oss": GROUPED | WINDOW | EXPERTS,
    "smollm3": GROUPED,
    "starcoder2": GROUPED,
    "deepseek_v3": LATENT | {"intermediate_size": 64, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
                             "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
    "stablelm": GROUPED,
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "gpt2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "falcon": {},
    "bloom": {},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "llama4_text": GROUPED | EXPERTS | {"head_dim": 8, "intermediate_size_mlp": 64, "attention_chunk_size": 6},
}  # fmt: skip
# no packed rows: capped scores, sinks, attention written out
PADDED = {"gemma2", "gpt_oss", "stablelm", "gptj", "falcon", "bloom", "mpt", "llama4_text"}
QUERIES = [[5, 6, 7, 8, 9, 10, 11, 12], [13, 14], [15, 16, 17, 18]]
RESPONSES = [[20, 21, EOS], [22, 23, 24, 25, 26, EOS], [27]]
ROWS = [q + r for q, r in zip(QUERIES, RESPONSES)]


def close(ours, theirs):
    """To 1e-5 of the largest number."""
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(theirs.abs().max())))


def tiny(family: str, kind: type, pad: int | None):
    """A random model; with `pad` its config's pad, as many checkpoints name the end-of-text token there."""
    config = AutoConfig.for_model(
        family, **SIZES, **FAMILIES[family], pad_token_id=pad, bos_token_id=BOS, eos_token_id=EOS, num_labels=1
    )
    torch.manual_seed(0)
    model = kind.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():  # small enough for a smooth loss, large enough that every token counts
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    training.disable_dropout(model)
    return model


def ours_and_plain(family: str, kind: type):
    """The model as the stages read it, and the same as transformers alone reads it."""
    ours, plain = tiny(family, kind, pad=EOS), tiny(family, kind, pad=None)
    assert use_packed_attention(ours) == supports_packing(ours) == (family not in PADDED)
    return ours, plain


def plain_logprobs(model, row: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities [T - 1, V] of a row by itself."""
    return (model(torch.tensor([row]), use_cache=False).logits[0, :-1] / temperature).log_softmax(-1)


def plain_response_logprobs(model, temperature: float) -> list[torch.Tensor]:
    return [
        plain_logprobs(model, q + r, temperature)[len(q) - 1 :].gather(1, torch.tensor(r)[:, None])[:, 0]
        for q, r in zip(QUERIES, RESPONSES)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_along_plain_passes(family):
    """Log-probabilities of responses, greedy samples, SFT's loss and gradients, and an update that lowers it."""
    policy, plain = ours_and_plain(family, AutoModelForCausalLM)
    with torch.no_grad():
        logits, targets = ppo.response_logits(policy, QUERIES, RESPONSES)
        close(ppo.token_logprobs(logits, targets, 0.7), torch.cat(plain_response_logprobs(plain, 0.7)))
        queries, R = sampling.pad_rows(QUERIES, PAD, "left"), 8
        responses, logprobs = sampling.sample_responses(policy, queries, None, TokenIds(PAD, EOS, VOCAB), R, 0.0)
        for query, written, found in zip(QUERIES, responses.tolist(), logprobs):
            row = list(query)
            while len(row) < len(query) + R and row[-1] != EOS:
                row.append(int(plain(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
            expected = row[len(query) :]
            assert [token for token in written if token != PAD] == expected
            at = plain_logprobs(plain, row)[len(query) - 1 :].gather(1, torch.tensor(expected)[:, None])[:, 0]
            close(found[: len(expected)], at)
    rows, packed = [(r, 1) for r in ROWS], supports_packing(policy)
    loss = sft.batch_losses(sft.Policy(policy), rows, 1.0, packed, "cpu").mean()
    expected = torch.stack(
        [F.nll_loss(plain_logprobs(plain, row), torch.tensor(row[1:])) for row in ROWS]
    ).mean()  # fmt: skip
    loss.backward()
    expected.backward()
    close(loss.detach(), expected.detach())
    compare_gradients(policy, plain)
    torch.optim.SGD(policy.parameters(), lr=1e-2).step()
    with torch.no_grad():
        after = sft.batch_losses(sft.Policy(policy), rows, 1.0, packed, "cpu").mean()
    assert after < loss


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_frozen_network_in_bf16_computes_the_same_bits(family, tied):
    """Its products' weights are rounded once, not for each product, also where the head is the embedding."""
    model = tiny(family, AutoModelForCausalLM, pad=None)
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    twin, row = copy.deepcopy(model), torch.tensor([ROWS[0]])
    precision.cast_products(twin)
    assert any(p.dtype == torch.bfloat16 for p in twin.parameters())
    assert all(p.dtype == torch.float32 for p in twin.get_input_embeddings().parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(row, use_cache=False).logits, twin(row, use_cache=False).logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_adapters_of_a_policy(family, tmp_path):
    """Merged weights in a plain model give what the adapters give; the reference on the same trunk stays as it is."""
    policy, plain = ours_and_plain(family, AutoModelForCausalLM)
    plain.save_pretrained(tmp_path)
    read = lambda model: ppo.token_logprobs(*ppo.response_logits(model, QUERIES, RESPONSES), 0.7)
    reference = share_weights(policy)
    before = read(reference)
    add_adapter(policy, LoraParams(rank=2), str(tmp_path), None)
    assert torch.equal(read(policy), before)
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    plain.load_state_dict(merge_adapters(policy, policy.state_dict())[0])
    after = torch.cat(plain_response_logprobs(plain, 0.7))
    close(read(policy), after)
    assert torch.equal(read(reference), before) and (after - before).abs().max() > 0.1


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "llama4_text"])  # which has no reward model
def test_a_reward_model_and_ppo_along_plain_passes(family):
    """Rewards, values at each prefix, and the gradients of a reward model's loss and of PPO's."""
    scorer, plain = ours_and_plain(family, AutoModelForSequenceClassification)
    alone = lambda row: plain(torch.tensor([row])).logits[0, 0]
    scorer.config.reward_bias = 0.25
    with torch.no_grad():
        close(reward_models.read_rewards(scorer, ROWS), torch.stack([alone(row) + 0.25 for row in ROWS]))
    pairs = [(ROWS[0], QUERIES[0] + [30, EOS]), (ROWS[1], [7, EOS]), (ROWS[2], QUERIES[2] + [31, 32, 33, EOS])]
    packed = supports_packing(scorer)
    chosen, rejected = reward.pair_rewards(reward.RewardModel(scorer), pairs, packed, packed, "cpu")
    loss = reward.preference_losses(chosen, rejected).mean()
    expected = -F.logsigmoid(torch.stack([alone(c) - alone(r) for c, r in pairs])).mean()
    loss.backward()
    expected.backward()
    close(loss.detach(), expected.detach())
    compare_gradients(scorer, plain)
    scorer.zero_grad(), plain.zero_grad()

    policy, plain_policy = ours_and_plain(family, AutoModelForCausalLM)
    scorer.config.reward_bias = 0.5
    model = ppo.PolicyAndValue(policy, scorer)
    responses, R = sampling.pad_rows(RESPONSES, PAD, "right"), 6
    task = {"rollout_engine": "hf", "non_eos_penalty": True, "penalty_reward_value": -1.0}
    args = SimpleNamespace(ppo=ppo.PpoHParams(), **task, temperature=0.7)
    then = [torch.linspace(-1.0 - i, -0.5, 3 * R).view(3, R) for i in range(3)]  # log-probs, of the reference, values
    rollout = ppo.Rollout(torch.arange(3), responses, *then, torch.tensor([0.3, -0.2, 0.1]), then[0])
    adv = ppo.compute_experience(rollout, TokenIds(PAD, EOS, VOCAB), args)
    mask, mask_p1 = ~adv.padding_mask, ~adv.padding_mask_p1
    counts = (int(mask.sum()), int(mask_p1.sum()))
    loss, *_ = ppo.micro_batch_loss(model, QUERIES, adv, counts, args)
    values = [alone((q + r)[: len(q) + t]) + 0.5 for q, r, n in zip(QUERIES, RESPONSES, mask_p1.sum(1))
              for t in range(n)]  # fmt: skip
    new = ppo.scatter_tokens(torch.cat(plain_response_logprobs(plain_policy, 0.7)), mask, ppo.INVALID_LOGPROB)
    losses = ppo.ppo_losses(new, ppo.scatter_tokens(torch.stack(values), mask_p1, 0.0), adv.logprobs, adv.values,
                            adv.advantages, adv.returns, 0.2, 0.2)  # fmt: skip
    expected = (losses["pg"] * mask).sum() / counts[0] + 0.1 * (losses["vf"] * mask_p1).sum() / counts[1]
    loss.backward()
    expected.backward()
    close(loss.detach(), expected.detach())
    compare_gradients(policy, plain_policy)
    compare_gradients(scorer, plain)
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    assert all(p.isfinite().all() for p in model.parameters())


# what a config may name as pad: the end-of-text token, the first one, any other, one behind the embedding, none
PADS = {"eos": lambda t: t.eos_token_id, "bos": lambda t: t.bos_token_id, "inside": lambda t: 5,
        "outside": lambda t: len(t) + 10, "negative": lambda t: -1, "unset": lambda t: None}  # fmt: skip


def save_base(folder: str, world: World, pad: str, room: int) -> None:
    """A random base model over the toy tokenizer; `room`: rows of its embedding behind the tokenizer's last token."""
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    sizes = SIZES | {"vocab_size": len(tokenizer) + room, "intermediate_size": 64, "initializer_range": 0.2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    kind = GPTNeoXConfig if pad == "outside" else LlamaConfig  # whose embedding has a row for its pad, or does not load
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**sizes, **ids, pad_token_id=PADS[pad](tokenizer)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def compare_with_the_plain_class(folder: str, bias_of_ours: bool = True) -> None:
    """Our rewards of a few rows are the plain class's, one at a time and, where it reads batches, padded left or right.

    It looks for the last token that is not the config's pad: another one's would be a reward at the wrong token.
    """
    model = reward_models.load_reward_model(folder)
    bias = model.config.reward_bias
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = [[*ROWS[0][:-1], eos], [*ROWS[1][:-1], 5, eos], [*ROWS[2], tokenizer.bos_token_id], [5, 5], [9, 8, eos, eos]]
    with torch.no_grad():
        ours = reward_models.read_rewards(model.eval(), rows)
        for reward_of_row, row in zip(ours, rows):
            close(reward_of_row, plain(torch.tensor([row])).logits[0, 0] + bias)
        if pad >= plain.config.vocab_size:
            assert plain.config.pad_token_id is None
            with pytest.raises(ValueError, match="no padding token is defined"):
                plain(torch.tensor([[5, 6], [7, 8]]))
            return
        assert plain.config.pad_token_id == pad
        for side in ("left", "right"):
            tokens = sampling.pad_rows(rows, pad, side)
            close(ours, plain(tokens, attention_mask=(tokens != pad).long()).logits[:, 0] + bias)


@pytest.mark.parametrize("room", [0, 3])
@pytest.mark.parametrize("pad", PADS)
def test_a_reward_model_is_read_at_the_same_token_by_the_plain_class(pad, room, world, workdir):
    save_base("base", world, pad, room)
    changes = {"base_model": "base", "sft_model_path": "base", "run_eval": False, "total_episodes": 8}
    reward.main(world.reward_args(workdir / "rm", num_normalization_rows=4, **changes))
    compare_with_the_plain_class("rm")


def test_no_checkpoint_keeps_another_pad(world, workdir):
    """The policies' and the value network's: not even where the reward model comes from elsewhere, with pad = EOS."""
    save_base("base", world, "eos", room=3)
    ours, eos = (getattr(find_tokenizer("base_model", "base"), name) for name in ("pad_token_id", "eos_token_id"))
    sft.main(world.sft_args(workdir / "policy", base_model="base", run_eval=False, total_episodes=8))
    torch.manual_seed(1)
    scorer = AutoModelForSequenceClassification.from_pretrained("base", num_labels=1, dtype=torch.float32)
    assert scorer.config.pad_token_id == eos
    scorer.save_pretrained("rm")
    models = {"base_model": "base", "sft_model_path": "policy", "reward_model_path": "rm", "value_output_dir": "value"}
    ppo.main(world.ppo_args(workdir / "ppo", num_updates=1, run_eval=False, **models))
    for file in ("policy/config", "policy/generation_config", "ppo/config", "ppo/generation_config", "value/config"):
        assert json.loads((workdir / f"{file}.json").read_text())["pad_token_id"] == ours != eos
    compare_with_the_plain_class("value")


@pytest.mark.parametrize("family", ["cohere", "granite", "xglm", "codegen", "llama4_text", "roberta", "minimax"])
def test_a_policy_that_no_reward_model_can_follow_is_refused(family, tmp_path, capsys):
    """Before SFT: no class of transformers, one with another head, or a state that sampling would have to keep."""
    config = AutoConfig.for_model(family).to_dict()
    names = {"llama4_text": "Llama4", "xglm": "XGLM", "codegen": "CodeGen", "minimax": "MiniMax"}
    config["architectures"] = [names.get(family, family.title()) + "ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as stopped:
        find_model("base_model", str(tmp_path), None, "policy")
    error = capsys.readouterr().err
    words = "from keys and values alone" if family == "minimax" else "no reward model to train next; expected GPT-NeoX"
    assert stopped.value.code == 2 and words in error and error.count("\n") == 1, error


def test_code_of_its_own_beside_a_known_architecture_is_not_needed(world, tmp_path):
    """As many repositories have it: transformers holds the architecture by now."""
    config = find_model("base_model", world.base, None, "policy")
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    for file in ("model.safetensors", "generation_config.json"):
        (tmp_path / file).symlink_to(f"{world.base}/{file}")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_model("base_model", str(tmp_path), None, "policy")["auto_map"]
    AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("load", [find_tokenizer, tldr_dataset.load_tokenizer])
def test_a_tokenizer_with_code_of_its_own_is_refused(load, world, workdir, capsys):
    """transformers asks at the terminal whether to run it, and advises an argument that no stage has."""
    AutoTokenizer.from_pretrained(world.base).save_pretrained("base")
    config = json.loads((workdir / "base/tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "XyzTokenizer", "auto_map": {"AutoTokenizer": ["xyz.XyzTokenizer", None]}}
    (workdir / "base/tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as stopped:
        load("base_model", "base")
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert "contains custom code" in said.err and "trust_remote_code" not in said.err


def test_a_tokenizer_in_plain_python(world, workdir):
    """It has no Rust backend to encode with: ByT5's tokens are bytes, from the dataset through SFT to a checkpoint."""
    ByT5Tokenizer().save_pretrained("base")
    tokenizer, pad = tldr_dataset.load_tokenizer("base_model", "base")
    assert getattr(tokenizer, "backend_tokenizer", None) is None and pad == len(tokenizer)
    texts = ["TL;DR: naïve 🙂\n", "", " [PAD] "]
    assert tldr_dataset.encode(tokenizer, texts) == [[byte + 3 for byte in text.encode()] for text in texts]
    sizes = SIZES | {"vocab_size": len(tokenizer), "intermediate_size": 64, "max_position_embeddings": 512}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, eos_token_id=1)).save_pretrained("base")
    lengths = {"length": 250, "max_sft_response_length": 100, "max_sft_query_response_length": 350}
    raw = {kind: str(world.folder / "raw" / kind) for kind in ("sft", "comparisons")}
    tldr_dataset.main(
        tldr_dataset.Args(
            base_model="base", sft_dataset=raw["sft"], preference_dataset=raw["comparisons"], output_dir="rows",
            tldr_params=tldr_dataset.TldrHParams(**lengths), check_length_correctness=False,
        )
    )  # fmt: skip
    changes = {"base_model": "base", "query_dataset": "rows/sft", "run_eval": False, "total_episodes": 8}
    assert sft.main(world.sft_args(workdir / "policy", **changes))["train/sft/loss"] < 7
    assert AutoTokenizer.from_pretrained("policy").encode("é", add_special_tokens=False) == [198, 172]


def test_a_context_that_mpt_calls_by_another_name(capsys):
    with pytest.raises(SystemExit):
        check_context("base_model", "mpt", MptConfig(max_seq_len=40).to_dict(), 41, "the longest row")
    assert "found 'mpt' with a context of 40 tokens; expected at least 41" in capsys.readouterr().err
