"""What both sides of the benchmark compute: models, rows, forced ends of responses; FLOPs by formula; the peak.

Everything is a function of the arguments here; lengths are quantiles, not draws, so that every size has the same mix.
Dimensions: T tokens of a row, D hidden, V vocabulary.
"""

import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# deciles of the queries of 854 TL;DR posts in tokens of the Pythia tokenizer, cut at 512; mean 330
QUERY_DECILES = (61, 205, 239, 263, 295, 325, 358, 390, 428, 461, 512)
RESPONSE_LENGTHS = (27, 53)  # uniform between, the EOS included: mean 40
WORDS, EOS, PAD = 50277, 0, 50277  # as in the Pythia tokenizer: the pad lies inside the padded vocabulary


@dataclass
class Workload:
    """One stage's rows; `rows` are those of one update, and all there are, so that both sides see the same ones."""

    rows: int
    query: float = 1.0  # factor on the lengths of queries
    response: float = 1.0  # factor on the lengths of responses
    hidden: int = 512
    layers: int = 6
    heads: int = 8
    seed: int = 1

    @property
    def response_length(self) -> int:
        return round(RESPONSE_LENGTHS[1] * self.response)

    def query_lengths(self) -> np.ndarray:
        """[rows] tokens, in a shuffled order."""
        at = (np.arange(self.rows) + 0.5) / self.rows * 10
        lengths = np.interp(at, np.arange(11), QUERY_DECILES) * self.query
        return self.rng(0).permutation(lengths.round().astype(int))

    def response_lengths(self, which: int) -> np.ndarray:
        """[rows] tokens, the EOS included; `which` 0 or 1: of chosen (and everything else), or of rejected."""
        low, high = RESPONSE_LENGTHS[0] * self.response, self.response_length
        at = (np.arange(self.rows) + 0.5) / self.rows
        return self.rng(1 + which).permutation((low + at * (high - low)).round().astype(int))

    def rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream])


def make_tokenizer():
    """Words `w1`, `w2`, ...; a word is a token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {"<|endoftext|>": EOS} | {f"w{i}": i for i in range(1, WORDS)} | {"[PAD]": PAD}
    inner = Tokenizer(WordLevel(words, unk_token="w1"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", pad_token="[PAD]")


def make_models(work: Workload, folder: Path, lora: bool = False) -> None:
    """Random weights: `policy` and `reward`, with the tokenizer.

    Args:
        lora: the policy in bf16, and of the reward model the adapter on it alone.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPTNeoXConfig

    config = GPTNeoXConfig(
        hidden_size=work.hidden, num_hidden_layers=work.layers, num_attention_heads=work.heads,
        intermediate_size=4 * work.hidden, vocab_size=50304, max_position_embeddings=2048, bos_token_id=EOS,
        eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    tokenizer = make_tokenizer()
    torch.manual_seed(work.seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        policy = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if lora else torch.float32)
    policy.save_pretrained(folder / "policy")
    config.num_labels = 1
    if lora:
        make_reward_adapter(config, folder)
    else:
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(folder / name)


def make_reward_adapter(config, folder: Path) -> None:
    """What PPO reads of a reward model that `reward.py --lora` trained on `policy`: its adapter and head, at random."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForSequenceClassification

    from summarize_from_feedback_details.common import adapters

    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
        adapters.add_adapter(model, adapters.LoraParams(), str(folder / "policy"), None)
    config.reward_bias, config.architectures = 0.0, [type(model).__name__]
    config.save_pretrained(folder / "reward")
    names = {name: p for name, p in model.named_parameters() if ".lora_" in name or name.startswith("score.")}
    weights = {adapters.PREFIX + n.replace(adapters.NAME, "."): torch.randn(p.shape) * 0.01 for n, p in names.items()}
    adapters.save_adapter(model, weights, folder / "reward" / adapters.FOLDER)
    head = {"score.weight": weights[f"{adapters.PREFIX}score.weight"]}
    save_file(head, folder / "reward" / "model.safetensors")  # stands for the merged weights, which PPO does not read


def make_rows(work: Workload, folder: Path) -> None:
    """The same rows for both sides: `sft` and `comparisons` in our columns, `lengths.json`; TRL reads ours, too."""
    import datasets

    tokenizer, rng = make_tokenizer(), work.rng(9)
    draw = lambda n: rng.integers(1, WORDS, n).tolist()
    query_width, R = round(QUERY_DECILES[-1] * work.query), work.response_length
    left = lambda tokens, width: [PAD] * (width - len(tokens)) + tokens
    right = lambda tokens, width: tokens + [PAD] * (width - len(tokens))
    sft, pairs = [], []
    for length, first, second in zip(work.query_lengths(), work.response_lengths(0), work.response_lengths(1)):
        query, chosen, rejected = draw(length), draw(first - 1) + [EOS], draw(second - 1) + [EOS]
        text = tokenizer.decode(query)
        sft.append({
            "query": text, "query_token": left(query, query_width), "reference_response": tokenizer.decode(chosen),
            "reference_response_token": right(chosen, R), "reference_response_token_len": len(chosen),
            "query_reference_response_token": right(query + chosen, query_width + R),
            "query_reference_response_token_response_label": right([PAD] * length + chosen, query_width + R),
            "query_reference_response_token_len": length + len(chosen),
        })  # fmt: skip
        pairs.append({
            "query": text, "query_token": left(query, query_width),
            "query_chosen_token": right(query + chosen, query_width + R), "query_chosen_token_len": length + first,
            "query_rejected_token": right(query + rejected, query_width + R),
            "query_rejected_token_len": length + second,
        })  # fmt: skip
    for name, rows in (("sft", sft), ("comparisons", pairs)):
        for split in ("train", "validation"):
            path = folder / name / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows if split == "train" else rows[:1]).to_parquet(str(path))


def make(work: Workload, folder: Path, lora: bool = False) -> None:
    """Write all of it, once."""
    if not (folder / "made.json").exists():
        make_models(work, folder, lora)
        make_rows(work, folder)
        (folder / "made.json").write_text(json.dumps(vars(work)))


def force_ends(folder: Path) -> None:
    """Make sampled responses end where the rows' references do, on both sides: random weights would never say EOS.

    While a GPT-NeoX policy is used with a key-value cache, the logit of EOS is -1e4 before the row's end and 1e4 at it.
    A row is known by the sum of its query's ids.
    """
    import pandas
    import torch
    from transformers import DynamicCache, GPTNeoXForCausalLM

    rows = pandas.read_parquet(folder / "sft" / "train.parquet")
    ends = {
        int(query[query != PAD].sum()): length - 1
        for query, length in zip(rows["query_token"], rows["reference_response_token_len"])
    }
    assert len(ends) == len(rows)
    plain, select, now = GPTNeoXForCausalLM.forward, DynamicCache.batch_select_indices, {}

    def leave(self, indices):  # rows that have ended leave the batch
        now["ends"] = now["ends"][indices]
        select(self, indices)

    DynamicCache.batch_select_indices = leave

    @functools.wraps(plain)
    def forward(self, input_ids=None, attention_mask=None, use_cache=None, **kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # transformers 5.24 renamed it
        begins = cache is not None and cache.get_seq_length() == 0
        out = plain(self, input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache, **kwargs)
        if cache is None or not use_cache:
            return out
        last = out.logits[0] if "pieces" in kwargs else out.logits[:, -1]  # [B, V]
        if begins:  # the queries are read; ours reads them packed
            sizes = [size for size, _ in kwargs.get("pieces", [])]
            queries = input_ids[0].split(sizes) if sizes else input_ids * attention_mask
            found = torch.tensor([ends[int(query.sum())] for query in queries])
            now["ends"], now["t"] = found.to(last.device), 0
        else:
            now["t"] += 1  # number of the token that is drawn from these logits
        # ours reads a query once that several responses share
        now["ends"] = now["ends"].repeat_interleave(len(last) // len(now["ends"]))
        last[:, EOS] = torch.where(now["ends"] == now["t"], 1e4, -1e4)
        return out

    GPTNeoXForCausalLM.forward = forward


# ----------------------------------------------------------------------------------------------------------------------
# FLOPs: 2 per multiply-add of matrix products; norms, activations, softmax and the optimiser are not counted


def trunk_flops(work: Workload, length: int, causal: bool = True) -> float:
    """One forward pass of one row of T tokens through the layers.

    Per layer and token: query, key, value and output projections 8 D^2, MLP of width 4 D 16 D^2; attention scores and
    sums 4 D for each token that is seen: T (T + 1) / 2 pairs where causal, else T^2.
    """
    seen = length * (length + 1) / 2 if causal else length**2
    return work.layers * (24 * work.hidden**2 * length + 4 * work.hidden * seen)


def head_flops(work: Workload, positions: int) -> float:
    """Logits at so many positions: 2 D V each."""
    return 2 * work.hidden * 50304 * positions


def useful_flops(stage: str, work: Workload, passes: int = 4, lora: bool = False) -> dict[str, float]:
    """What an update needs at least, over real tokens, by phase; a backward pass is twice its forward pass.

    A pair of the reward model shares its query. PPO: the rollout reads the query and each sampled token once with the
    policy and each row once with reference, value and reward model; training makes `passes` passes. With LoRA the
    backward pass is one forward pass: frozen weights have no gradient (what the adapters add is not counted).
    """
    query, first, second = work.query_lengths(), work.response_lengths(0), work.response_lengths(1)
    trunk, both = lambda lengths: sum(trunk_flops(work, int(n)) for n in lengths), 2 if lora else 3
    if stage == "sft":
        return {"training": both * (trunk(query + first) + head_flops(work, int((query + first - 1).sum())))}
    if stage == "reward":
        shared = trunk(query + first) + trunk(query + second) - trunk(query)
        return {"training": both * shared}
    row, head = trunk(query + first), head_flops(work, int(first.sum()))
    return {"rollout": 4 * row + 2 * head, "training": both * passes * (2 * row + head)}


def real_tokens(stage: str, work: Workload, passes: int = 4) -> int:
    """Tokens of an update's rows, each once (a query that two responses share: once), times the passes over them."""
    query, first, second = work.query_lengths(), work.response_lengths(0), work.response_lengths(1)
    if stage == "reward":
        return int((query + first + second).sum())
    return int((query + first).sum()) * (passes if stage == "ppo" else 1)


def matmul_peak(bf16: bool = False, size: int = 2048, seconds: float = 2.0, device: str = "cpu") -> float:
    """FLOP/s of this machine: the best of repeated products of two [size, size] matrices."""
    import torch

    dtype = torch.bfloat16 if bf16 else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    best, start = 0.0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        wait()
        at = time.perf_counter()
        a @ b
        wait()
        best = max(best, 2 * size**3 / (time.perf_counter() - at))
    return best
