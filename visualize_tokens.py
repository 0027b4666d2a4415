"""Look at summaries token by token: what each policy wrote, where its reward and its KL come from, what PPO shifted.

Reads   policies, a base model, a reward model (ours or the original's) and a tokenised dataset: folders or hub ids
Writes  nothing (the terminal), or one file each: --html (a page without network), --latex, --json

        python visualize_tokens.py                                  the latest finished run of `runs/`
        python visualize_tokens.py --num 4 --details                four posts, without asking, all numbers
        python visualize_tokens.py --html tokens.html --latex tokens.tex --json tokens.json
        python visualize_tokens.py --models sft=models/sft_policy ppo=models/ppo_policy --base_model models/toy/small \
            --reward_model models/reward --query_dataset data/toy_tokenized/sft
        python visualize_tokens.py --released 1b --seed 55513       the checkpoints of the paper, from the hub

A token's colour is the rank that the base model gives to the token the policy chose ("token distribution shift", Lin et
al. 2023, URIAL; section 8 of the paper): rank 1 unshifted, rank 2 or 3 marginal, beyond that shifted.
Everything else is PPO's own arithmetic, imported from `ppo_left_padding.py`. One model is in memory at a time.

Dimensions: B posts, Q query tokens, R response tokens, V vocabulary.
"""

import base64
import contextlib
import csv
import hashlib
import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import huggingface_hub
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import pre_tokenizers

from summarize_from_feedback_details import ppo_left_padding as ppo
from summarize_from_feedback_details.common.arguments import check_sizes, command_line, refuse
from summarize_from_feedback_details.common.check_inputs import (
    check_same_tokenizer,
    check_same_vocabulary,
    check_tokens,
    find_ids,
    find_model,
    find_tokenizer,
    load_rows,
)
from summarize_from_feedback_details.common.console import Progress, quiet_libraries
from summarize_from_feedback_details.common.files import refuse_uncreatable, write_whole
from summarize_from_feedback_details.common.logprobs import response_logits, scatter_tokens, token_logprobs
from summarize_from_feedback_details.common.machine import on_gpu
from summarize_from_feedback_details.common.noise import episode_keys
from summarize_from_feedback_details.common.policies import load_policy
from summarize_from_feedback_details.common.reward_models import load_reward_model, read_rewards
from summarize_from_feedback_details.common.run_files import find_run, newest_first, optimises_a_policy
from summarize_from_feedback_details.common.sampling import pad_rows, sample_responses, strip_pads
from summarize_from_feedback_details.toy_tldr import MANIFEST

HERE = Path(__file__).parent
ROWS_AT_A_TIME = 16  # of one forward pass
BANDS = ("unshifted", "marginal", "shifted")
STYLES = ("", "black on #ffd166 underline", "bold white on #b3400a underline")  # of the terminal
MARKS = ("", "°", "*")  # where there is no colour
REFERENCE = "reference"
NUMBERS = {  # key of a token's number: (short name, what it is)
    "rank": ("rank", "place of the token in the base model's next-token distribution (1: its first choice)"),
    "base_top": ("base's 1st", "token that the base model would have chosen here"),
    "base_logprob": ("base", "log-probability by the base model, in nats"),
    "logprob": ("policy", "log-probability by the policy that wrote the token, in nats"),
    "ref_logprob": ("ref", "log-probability by the reference policy of the KL, in nats"),
    "kl": ("KL", "policy - ref, PPO's estimate (k1) of the KL at this token, in nats"),
    "value": ("value", "what the value network expects just before the token, in reward units"),
    "reward_logit": ("RM", "reward head read at the token; only at the last one it is the score"),
    "reward": ("reward", "PPO's reward: -kl_coef x KL; the score lands one token after the end, if there is room"),
    "advantage": ("adv.", "generalised advantage, whitened over the posts shown of this policy"),
}


@dataclass
class Args:
    # what to look at; with neither --models nor --released: the latest finished run
    models: tuple[str, ...] = ()
    """policies, each `name=folder` or `name=hub_id` or `name=hub_id@revision` (the models below, too)"""
    released: Literal["1b", "2.8b", "6.9b"] | None = None
    """the paper's SFT and PPO policies and reward model of this size (of --seed), from the hub"""
    base_model: str | None = None
    """model whose ranks give the colours; its tokenizer is used (default: that of the run)"""
    ref_model: str | None = None
    """reference policy of the KL (default: the policy named `sft`, else the base model)"""
    reward_model: str | None = None
    """reward model, ours or the original's (default: that of the run; without one there are no scores and values)"""
    value_model: str | None = None
    """value network, saved like a reward model (default: the reward model, where PPO's value network began)"""
    query_dataset: str | None = None
    """tokenised SFT dataset whose queries are shown (default: that of the run, else the published one)"""
    split: str = "validation"
    """split of the dataset"""
    first: int = 0
    """row of the split to begin with"""
    num: int | None = None
    """posts to show, without asking in between (default: 8, of which a terminal asks to go on; 32 in files)"""
    runs_dir: str = "runs"
    """folder of the runs"""

    # what to show
    details: bool = False
    """also a table of all numbers per token (HTML: opened; JSON always holds them)"""
    html: str | None = None
    """write a page: one file, works without network"""
    latex: str | None = None
    """write a document for pdflatex"""
    json: str | None = None
    """write everything that is shown as JSON"""

    # sampling and PPO's arithmetic; what is left out is that of the run, else PPO's default
    seed: int | None = None
    """seed of the sampling noise (that of the run gives its responses again); with --released: which of its seeds"""
    response_length: int | None = None
    """tokens sampled at most (default: that of the run, else 53)"""
    temperature: float = 0.01
    """sampling temperature (0: greedy)"""
    logprob_temperature: float | None = None
    """divides the logits of all log-probabilities (default: PPO's 0.7); ranks do not depend on it"""
    kl_coef: float | None = None
    """weight of the KL in the reward (default: PPO's 0.05)"""
    gamma: float | None = None
    """discount per token (default: PPO's 1)"""
    lam: float | None = None
    """lambda of generalised advantage estimation (default: PPO's 0.95)"""


class Model(NamedTuple):
    """Where a checkpoint is; equal ones are loaded once."""

    path: str
    revision: str | None = None

    def __str__(self):
        return visible(self.path + (f" @ {self.revision}" if self.revision else ""))


class Scores(NamedTuple):
    """What the models say of one column of responses (the reference's or one policy's); None where no model says it."""

    responses: torch.Tensor  # [B, R] token ids, pads after the stop token; R leaves room behind the longest or is full
    logprobs: torch.Tensor | None = None  # [B, R] of the policy that wrote them
    ref_logprobs: torch.Tensor | None = None  # [B, R]
    base_logprobs: torch.Tensor | None = None  # [B, R]
    ranks: torch.Tensor | None = None  # [B, R] 1 is the base model's first choice
    base_top: torch.Tensor | None = None  # [B, R] id of its first choice
    scores: torch.Tensor | None = None  # [B]
    values: torch.Tensor | None = None  # [B, R] before each token
    reward_logits: torch.Tensor | None = None  # [B, R] at each token


# ----------------------------------------------------------------------------------------------------------------------
# what is at hand


def locate(text: str) -> Model:
    """`folder`, `hub_id` or `hub_id@revision` -> Model."""
    if "@" not in text or os.path.exists(text):
        return Model(text)
    return Model(*text.rsplit("@", 1))


READ_OF_RUN = {  # arguments without which a run cannot be shown
    "sft": {"output_dir", "base_model"}, "reward": {"output_dir"},
    "policy optimisation": {"output_dir", "base_model", "sft_model_path"},
}  # fmt: skip


def latest_run(runs_dir: str, stage: str, **wanted: str) -> dict[str, Any] | None:
    """Arguments of the newest finished run of a stage whose arguments hold `wanted`; None where there is none."""
    for folder in newest_first(Path(runs_dir)):
        summary, args = find_run(folder) or ({"state": "unreadable"}, {})
        found = "policy optimisation" if optimises_a_policy(summary, args) else summary.get("stage")
        finished = (found, summary["state"]) == (stage, "finished")
        # best of n has no model of its own
        if finished and all(args.get(name) for name in READ_OF_RUN[stage]) and wanted.items() <= args.items():
            return args
    return None


def read_latest_run(args: Args) -> tuple[dict[str, Model], dict[str, Any]]:
    """Policies of the latest finished run, and its settings under the names of `ppo_left_padding.Args`."""
    if (run := latest_run(args.runs_dir, "policy optimisation")) is not None:
        sft, trained = Model(run["sft_model_path"], run.get("sft_model_revision")), {"ppo": Model(run["output_dir"])}
    elif (run := latest_run(args.runs_dir, "sft")) is not None:
        sft, trained = Model(run["output_dir"]), {}
        reward = latest_run(args.runs_dir, "reward", sft_model_path=run["output_dir"])
        run |= {"reward_model_path": reward and reward["output_dir"], "reward_model_revision": None}
        run.pop("temperature", None)  # of its evaluation; PPO's divides the log-probabilities
    else:
        expected = "name=folder_or_hub_id, or --released 1b, or a finished run (./hello_world.sh makes one)"
        refuse("models", f"nothing, and no finished run in '{args.runs_dir}'", expected)
    print(f"run: {Path(args.runs_dir) / run['run_name']}")
    # paths in a run are relative to where it was started, beside its `runs/`
    beside = lambda path: path if path is None or os.path.exists(path) else str(Path(args.runs_dir).parent / path)
    there = lambda path: beside(path) if path is None or os.path.exists(beside(path)) else path
    run |= {name: there(run.get(name)) for name in ("base_model", "reward_model_path", "query_dataset")}
    return {name: model._replace(path=there(model.path)) for name, model in ({"sft": sft} | trained).items()}, run


def read_released(size: str, seed: int | None) -> tuple[dict[str, Model], dict[str, Any]]:
    """The paper's checkpoints of this size and seed, in the form of `read_latest_run`."""
    table = list(csv.DictReader((HERE / "released_checkpoints.csv").open()))
    rows = [row for row in table if f"-{size}-" in row["base_model"]]
    seeds = sorted({row["seed"] for row in rows})
    if str(seed or seeds[0]) not in seeds:
        refuse("seed", str(seed), f"with --released {size} one of {', '.join(seeds)}")
    of = {row["stage"]: row for row in rows if row["seed"] == str(seed or seeds[0])}
    run = {"base_model": of["sft"]["base_model"], "base_model_revision": None, "seed": int(of["sft"]["seed"])}
    run |= {"reward_model_path": of["reward"]["hub_id"], "reward_model_revision": of["reward"]["revision"]}
    stages = {"sft": "sft", "ppo": "ppo_left_padding"}  # as the table of released checkpoints calls them
    return {name: Model(of[stage]["hub_id"], of[stage]["revision"]) for name, stage in stages.items()}, run


def read_models(args: Args) -> tuple[dict[str, Model], dict[str, Any]]:
    """The policies of --models."""
    policies = {}
    for text in args.models:
        name, _, path = text.partition("=")
        if not re.fullmatch(r"[\w.+-]+", name) or not path or name == REFERENCE or name in policies:
            expected = f"name=folder_or_hub_id, with a name of letters and digits, once, not `{REFERENCE}`"
            refuse("models", repr(text), expected)
        policies[name] = locate(path)
    if args.base_model is None:
        refuse("base_model", "nothing", "with --models: a folder or hub id of the model that gives the ranks")
    return policies, {}


def make_plan(args: Args) -> SimpleNamespace:
    """Fill in what was left out: from the run, the table of released checkpoints, or PPO's defaults."""
    if args.models and args.released:
        refuse("released", f"{args.released} beside --models", "one of the two")
    if args.models:
        policies, run = read_models(args)
    else:
        policies, run = read_released(args.released, args.seed) if args.released else read_latest_run(args)
    model = lambda name: Model(run[name], run.get(name.replace("_path", "") + "_revision")) if run.get(name) else None
    given = lambda name: locate(getattr(args, name)) if getattr(args, name) is not None else None
    plan = SimpleNamespace(policies=policies, base_note="")
    plan.base = given("base_model") or model("base_model")
    if args.base_model is None and (Path(plan.base.path) / MANIFEST).exists():
        plan.base, plan.base_note = policies["sft"], "the SFT policy: the toy world's base model is random"
    plan.ref = given("ref_model") or policies.get("sft") or plan.base
    plan.reward = given("reward_model") or model("reward_model_path")
    plan.value = given("value_model") or plan.reward
    plan.value_note = "" if given("value_model") else "the reward model, where PPO's value network began"
    default = ppo.Args()
    plan.dataset = given("query_dataset") or model("query_dataset") or Model(default.query_dataset)
    hparams = {f.name: (run.get("ppo") or {}).get(f.name, f.default) for f in fields(ppo.PpoHParams)}
    hparams |= {n: getattr(args, n) for n in ("kl_coef", "gamma", "lam") if getattr(args, n) is not None}
    pick = lambda name, own=None: own if own is not None else run.get(name, getattr(default, name))
    plan.settings = SimpleNamespace(  # what `compute_experience` and the sampling read
        ppo=ppo.PpoHParams(**hparams), non_eos_penalty=pick("non_eos_penalty"),
        penalty_reward_value=pick("penalty_reward_value"), truncate_token=pick("truncate_token"),
        seed=pick("seed", args.seed), response_length=pick("response_length", args.response_length),
        temperature=args.temperature, logprob_temperature=pick("temperature", args.logprob_temperature),
    )  # fmt: skip
    return plan


def check_plan(args: Args, plan: SimpleNamespace):
    """Refuse what cannot work, before any model is loaded. Returns (tokenizer, rows, id of the stop token)."""
    check_sizes(
        args,
        positive=("num", "response_length", "logprob_temperature"),
        at_least_zero=("first", "seed", "temperature", "kl_coef"),
    )
    for name in ("gamma", "lam"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) <= 1:
            refuse(name, str(getattr(args, name)), "a number from 0 to 1")
    outputs = {name: getattr(args, name) for name in ("html", "latex", "json") if getattr(args, name) is not None}
    for name, path in outputs.items():
        check_output(name, path)
        if sum(os.path.abspath(path) == os.path.abspath(other) for other in outputs.values()) > 1:
            refuse(name, f"'{path}', which another output is written to", "a file of its own")
    typed = lambda name: "released" if args.released and not getattr(args, name) else name
    base = find_model(typed("base_model"), *plan.base, "policy")
    found = [("models", model, "policy") for model in plan.policies.values()] + [("ref_model", plan.ref, "policy")]
    found += [("reward_model", plan.reward, "reward"), ("value_model", plan.value, "reward")]
    for name, model, kind in found:
        if model is not None:
            config = find_model(typed(name), *model, kind)
            check_same_vocabulary(typed(name), model.path, config, "base_model", plan.base.path, base)
    tokenizer = find_tokenizer("base_model", *plan.base)
    tokens = ["query_token", "reference_response_token"]
    columns = [*tokens, "query", "reference_response"]
    dataset = load_rows("query_dataset", *plan.dataset, "sft", columns, [args.split])
    check_tokens("query_dataset", {args.split: dataset[args.split]}, tokens, base["vocab_size"], tokenizer.pad_token_id)
    rows = dataset[args.split]
    check_same_tokenizer("query_dataset", rows[0], "query", "query_token", tokenizer)
    if args.first >= len(rows):
        refuse("first", str(args.first), f"a row below {len(rows)}, the rows of split '{args.split}'")
    number = args.num or (32 if outputs else 8)
    rows = rows.select(range(args.first, min(len(rows), args.first + number)))
    lengths = lambda column: [len(strip_pads(tokens, tokenizer.pad_token_id)) for tokens in rows[column]]
    longest, positions = max(lengths("query_token")), base.get("max_position_embeddings", math.inf)
    if longest + plan.settings.response_length > positions:
        found = f"{plan.settings.response_length} after queries of {longest} tokens"
        refuse("response_length", found, f"at most {positions - longest}: the models have {positions} positions")
    longest = max(map(sum, zip(lengths("query_token"), lengths("reference_response_token"))))
    if longest >= positions:
        refuse("query_dataset", f"a post and reference of {longest} tokens", f"fewer than the {positions} positions")
    return tokenizer, rows, find_ids(plan.settings.truncate_token, tokenizer)


def check_output(argument: str, path: str) -> None:
    """Refuse a file that cannot be written."""
    if not path or (os.path.exists(path) and not os.path.isfile(path)):
        refuse(argument, f"'{path}', which is no file", "a file to be written")
    refuse_uncreatable(argument, path)


# ----------------------------------------------------------------------------------------------------------------------
# numbers: each function loads one model, reads all posts, and lets go of it


@contextlib.contextmanager
def loaded(argument: str, model: Model, device: torch.device, kind: str = "policy"):
    """Yield a language model or a reward model in float32, ready to read; its memory is given back after."""
    try:
        if kind == "reward":
            network = load_reward_model(*model, argument)
        else:
            network = load_policy(argument, *model)
    except (OSError, RuntimeError, ValueError) as error:  # e.g. a hub id whose configuration alone is in the cache
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        refuse(argument, f"'{model}', which cannot be loaded: {reason}", "a whole checkpoint")
    network = network.to(device).eval().requires_grad_(False)
    yield network
    network.to("meta")  # whoever still holds it holds no weights
    torch.cuda.empty_cache()


def in_batches(queries: list[list[int]], progress: Progress):
    """Yield slices of all posts."""
    for start in range(0, len(queries), ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        yield part
        progress.step(len(queries[part]))


@torch.no_grad()
def sample(model, queries, rows: list[int], ids, settings, device, progress: Progress) -> torch.Tensor:
    """Responses [B, R] of a policy; token t of row i gets the t-th draw of (seed, i), as in PPO's evaluation."""
    R, found = settings.response_length, []
    for part in in_batches(queries, progress):
        keys = episode_keys(settings.seed, rows[part], device)
        query_tokens = pad_rows(queries[part], ids.pad, "left").to(device)
        responses, _ = sample_responses(model, query_tokens, keys, ids, R, settings.temperature)
        found.append(responses.cpu())
    return torch.cat(found)


@torch.no_grad()
def read_policy(model, queries, responses, pad_id: int, temperature: float, progress: Progress):
    """What a language model says of the responses: log-probs, ranks, its own first choices, all [B, R].

    Args:
        responses: [B, R] token ids, pads after the last.
        temperature: divides the logits of the log-probs.
    """
    found = []
    for part in in_batches(queries, progress):
        mask = responses[part] != pad_id
        real = [strip_pads(row, pad_id) for row in responses[part]]
        logits, targets = response_logits(model, queries[part], real)  # [N, V], [N]
        # rank 1 is the largest logit; the temperature changes no order
        ranks = 1 + (logits > logits.gather(1, targets[:, None])).sum(1)
        columns = token_logprobs(logits, targets, temperature), ranks, logits.argmax(1)
        found.append([scatter_tokens(column.cpu(), mask, 0.0) for column in columns])
    logprobs, ranks, top = (torch.cat(column) for column in zip(*found))
    return logprobs, ranks.long(), top.long()


@torch.no_grad()
def read_head(model, queries, responses, pad_id: int, device, progress: Progress):
    """A reward or value network read everywhere: scores [B], before each token [B, R], at each token [B, R]."""
    found = []
    network = ppo.PolicyAndValue(None, model).to(device)
    for part in in_batches(queries, progress):
        mask = responses[part] != pad_id
        real = [strip_pads(row, pad_id) for row in responses[part]]
        scores = read_rewards(model, [q + r for q, r in zip(queries[part], real)])
        # `values` reads BEFORE each token: with one more of each row, those one place on are those AT each token; the
        # last is the value at the position right after the end, where there is room for it
        counts = [len(row) + 1 for row in real]
        read = network.values(queries[part], real, counts).cpu().split(counts)
        R, mask_p1 = responses.shape[1], torch.arange(responses.shape[1]) < torch.tensor(counts)[:, None]
        before = scatter_tokens(torch.cat([row[:R] for row in read]), mask_p1, 0.0)
        found.append([scores.cpu(), before, scatter_tokens(torch.cat([row[1:] for row in read]), mask, 0.0)])
    return tuple(torch.cat(column) for column in zip(*found))


def score_everything(plan: SimpleNamespace, queries, references, rows: list[int], ids, device) -> dict[str, Scores]:
    """Sample from each policy, then let each model read all responses: column name -> Scores."""
    settings, pad_id = plan.settings, ids.pad
    references = [[*reference, pad_id] for reference in references]  # room behind the longest
    columns = {REFERENCE: Scores(pad_rows(references, pad_id, "right"))}
    read = lambda model, responses, progress: read_policy(
        model, queries, responses, pad_id, settings.logprob_temperature, progress
    )
    for name, policy in plan.policies.items():
        with loaded("models", policy, device) as model:
            progress = Progress(f"{name}: posts sampled and read", 2 * len(queries))
            responses = sample(model, queries, rows, ids, settings, device, progress)
            columns[name] = Scores(responses, read(model, responses, progress)[0])
    total = len(queries) * len(columns)
    for policy in dict.fromkeys([plan.ref, plan.base]):
        what = "base_model" if policy == plan.base else "ref_model"
        with loaded(what, policy, device) as model:
            progress = Progress(f"{what.replace('_', ' ')}: responses read", total)
            for name, column in columns.items():
                logprobs, ranks, top = read(model, column.responses, progress)
                if policy == plan.ref:
                    column = column._replace(ref_logprobs=logprobs)
                if policy == plan.base:
                    column = column._replace(base_logprobs=logprobs, ranks=ranks, base_top=top)
                columns[name] = column
    for network in dict.fromkeys(model for model in (plan.reward, plan.value) if model is not None):
        what = "reward_model" if network == plan.reward else "value_model"
        with loaded(what, network, device, "reward") as model:
            progress = Progress(f"{what.replace('_', ' ')}: responses read", total)
            for name, column in columns.items():
                scores, values, logits = read_head(model, queries, column.responses, pad_id, device, progress)
                if network == plan.reward:
                    column = column._replace(scores=scores, reward_logits=logits)
                if network == plan.value:
                    column = column._replace(values=values)
                columns[name] = column
    return columns


# ----------------------------------------------------------------------------------------------------------------------
# from ids to text that can be shown


def visible(text: str) -> str:
    """Text with everything that a screen would act on, or not show, written out; line breaks stay.

    >>> visible("a\\x1b[2J\\u202eb")
    'a\\\\x1b[2J\\\\u202eb'
    """
    hidden = lambda c: unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") and c not in "\n\u200d"
    return "".join(c.encode("unicode_escape").decode() if hidden(c) else c for c in text)


def byte_reader(tokenizer) -> Callable[[int], bytes]:
    """Token id -> its bytes. A token of byte-level BPE may be half a character, so bytes are all that it surely has."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # a printable byte stands for itself, the others for U+0100 and on
    stand_ins = iter(sorted(c for c in alphabet if ord(c) > 255))
    to_byte = {chr(b) if chr(b) in alphabet else next(stand_ins): b for b in range(256)}
    byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}

    def read(token: int) -> bytes:
        if token in added or token >= len(tokenizer):
            return added.get(token, f"<id {token}>").encode()
        if not byte_level:
            return tokenizer.decode([token]).encode()
        return bytes(to_byte[c] for c in tokenizer.convert_ids_to_tokens(token))

    return read


def token_texts(pieces: list[bytes]) -> list[str]:
    """The text of each token: a character stands where its first byte is; bytes that are no character as `\\xNN`.

    >>> token_texts([b"a ", b"\\xc3", b"\\xa9b", b"\\xff"])
    ['a ', 'é', 'b', '\\\\xff']
    """
    owner = [i for i, piece in enumerate(pieces) for _ in piece]
    data, texts, at = b"".join(pieces), [""] * len(pieces), 0
    while at < len(data):
        for size in range(1, 5):
            with contextlib.suppress(UnicodeDecodeError):
                text = visible(data[at : at + size].decode())
                break
        else:
            text, size = f"\\x{data[at]:02x}", 1
        texts[owner[at]] += text
        at += size
    return texts


def number(value) -> float | None:
    """A number for JSON: five decimals, None where it is not finite."""
    return round(float(value), 5) if math.isfinite(float(value)) else None


def band_of(rank: int) -> int:
    """0 unshifted, 1 marginal, 2 shifted.

    >>> [band_of(rank) for rank in (1, 2, 3, 4)]
    [0, 1, 1, 2]
    """
    return 0 if rank == 1 else 1 if rank <= 3 else 2


def read_columns(name: str, column: Scores, ids, settings, read: Callable[[int], bytes]) -> list[dict[str, Any]]:
    """One column of responses as plain data, one object per post with one object per token."""
    pad_id = ids.pad
    per_token = {"base_logprob": column.base_logprobs, "logprob": column.logprobs, "ref_logprob": column.ref_logprobs,
                 "value": column.values, "reward_logit": column.reward_logits}  # fmt: skip
    experience, scored_as = None, column.scores
    if column.logprobs is not None:
        per_token["kl"] = column.logprobs - column.ref_logprobs
        if column.scores is not None:
            then = column.logprobs, column.ref_logprobs, column.values, column.scores
            rollout = ppo.Rollout(torch.arange(len(column.responses)), column.responses, *then, column.logprobs)
            experience = ppo.compute_experience(rollout, ids, settings)
            per_token |= {"reward": experience.rewards, "advantage": experience.advantages}
            scored_as = experience.scores
    found = []
    for b, row in enumerate(column.responses.tolist()):
        row = [i for i in row if i != pad_id]
        tokens = []
        for t, (token, text) in enumerate(zip(row, token_texts([read(i) for i in row]))):
            rank = int(column.ranks[b, t])
            top = token_texts([read(int(column.base_top[b, t]))])[0]
            tokens.append({"id": token, "text": text, "rank": rank, "band": band_of(rank), "base_top": top})
            if not text or "\\x" in text:
                tokens[-1]["bytes"] = read(token).hex(" ")
            tokens[-1] |= {key: number(values[b, t]) for key, values in per_token.items() if values is not None}
        response = {"name": name, "text": "".join(token["text"] for token in tokens), "tokens": tokens}
        response |= {"ended": ids.stop in row, "shares": band_shares(tokens)}
        if column.scores is not None:
            response |= {"score": number(column.scores[b]), "scored_as": number(scored_as[b])}
        if column.logprobs is not None:
            response["kl"] = number(sum(token["kl"] or 0.0 for token in tokens))
        if experience is not None:
            response["reward"] = number((experience.rewards[b] * ~experience.padding_mask_p1[b]).sum())
            if len(row) < column.responses.shape[1]:  # the place right after the end, where the score lands
                n = len(row)
                response["end"] = {name: number(getattr(experience, f"{name}s")[b, n]) for name in ("value", "reward")}
        found.append(response)
    return found


def band_shares(tokens: list[dict]) -> list[float]:
    """Shares of unshifted, marginal and shifted tokens."""
    return [round(sum(token["band"] == band for token in tokens) / max(len(tokens), 1), 4) for band in range(3)]


def make_page(args: Args, plan: SimpleNamespace, rows, columns: dict[str, Scores], tokenizer, ids) -> dict[str, Any]:
    """Everything that is shown, as plain data: what --json writes, and what the other three outputs render."""
    settings, read = plan.settings, byte_reader(tokenizer)
    by_column = [read_columns(name, column, ids, settings, read) for name, column in columns.items()]
    posts = []
    for i, query in enumerate(rows["query"]):
        title = re.search(r"^TITLE: *(\S.*)$", query, re.M) or re.search(r"(\S.*)", query)
        subreddit = re.search(r"^SUBREDDIT: *(\S+)$", query, re.M)
        post = {"row": args.first + i, "title": visible(title[1]) if title else "(empty)", "query": visible(query)}
        posts.append(post | {"subreddit": subreddit and visible(subreddit[1]), "responses": [c[i] for c in by_column]})
    totals = []
    for name, column in zip(columns, by_column):
        mean = lambda values: number(sum(values) / len(values))
        total = {"name": name, "tokens": mean([len(r["tokens"]) for r in column])}
        total |= {"ended": mean([r["ended"] for r in column])}
        total["shares"] = band_shares([token for response in column for token in response["tokens"]])
        for key in ("score", "kl", "reward"):
            if key in column[0]:
                total[key] = mean([r[key] for r in column])
        totals.append(total)
    used = {key for column in by_column for response in column for token in response["tokens"] for key in token}
    about = {
        "models": {name: str(model) for name, model in plan.policies.items()},
        "base model (ranks)": str(plan.base) + (f" ({plan.base_note})" if plan.base_note else ""),
        "reference policy (KL)": str(plan.ref),
        "reward model": str(plan.reward or "none"),
        "value network": f"{plan.value or 'none'}"
        + (f" ({plan.value_note})" if plan.value and plan.value_note else ""),
        "dataset": f"{plan.dataset}, split {args.split}, rows {args.first} to {args.first + len(rows) - 1}",
        "sampling": f"seed {settings.seed}, temperature {settings.temperature}, "
        f"at most {settings.response_length} tokens",
        "arithmetic": f"log-probabilities at temperature {settings.logprob_temperature}, kl_coef "
        f"{settings.ppo.kl_coef}, gamma {settings.ppo.gamma}, lambda {settings.ppo.lam}"
        + (f"; a response without an end is scored {settings.penalty_reward_value}" * settings.non_eos_penalty),
    }
    numbers = {key: {"short": short, "long": text} for key, (short, text) in NUMBERS.items() if key in used}
    return {"about": about, "numbers": numbers, "bands": list(BANDS), "totals": totals, "posts": posts,
            "details": args.details}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# terminal


def shown(key: str, value) -> str:
    """A number as tables show it."""
    if value is None:
        return ""
    if key in ("rank", "base_top"):
        return str(value).replace("\n", "↵")
    return "0.00" if abs(value) < 0.005 else f"{value:+.2f}"


def shown_token(token: dict) -> str:
    """A token's text: line breaks marked, and `◂` where it only goes on with the character before."""
    return token["text"].replace("\n", "↵\n") or "◂"


def headline(response: dict) -> str:
    """One line on a response: score, KL, length."""
    parts = []
    if "score" in response:
        parts.append(f"score {response['score']:+.2f}")
        if response["scored_as"] != response["score"] and response["name"] != REFERENCE:
            parts[-1] += f" (no end: counts as {response['scored_as']:+.2f})"
    parts += [f"KL {response['kl']:.2f} nats"] if "kl" in response else []
    parts.append(f"{len(response['tokens'])} tokens" + ("" if response["ended"] else ", no end"))
    return ", ".join([*parts, " / ".join(f"{share:.0%} {band}" for share, band in zip(response["shares"], BANDS))])


def details_rows(response: dict, numbers: dict) -> tuple[list[str], list[list[str]]]:
    """Keys that a response has, and its tokens' numbers as text; the last row is the place after the end."""
    keys = [key for key in numbers if response["tokens"] and key in response["tokens"][0]]
    rows = [[shown_token(t).replace("\n", ""), *(shown(key, t[key]) for key in keys)] for t in response["tokens"]]
    if "end" in response:
        rows.append(["(after the end)", *(shown(key, response["end"].get(key)) for key in keys)])
    return keys, rows


def print_post(console: Console, page: dict, post: dict, place: str) -> None:
    """One post: query, responses coloured by rank, tables of numbers with --details."""
    console.rule(Text(f"{place}: row {post['row']}"))
    console.print(Text(post["query"]))
    for response in post["responses"]:
        console.print(Text.assemble((f"\n{response['name']}: ", "bold"), headline(response)))
        text = Text()
        for token in response["tokens"]:
            band = token["band"]
            mark = MARKS[band] if console.color_system is None else ""
            text.append(shown_token(token) + mark, STYLES[band])
        console.print(text)
        if page["details"]:
            keys, rows = details_rows(response, page["numbers"])
            # a narrow terminal gets the columns in several tables
            fit = max(2, (console.width - 18) // 9)
            for start in range(0, len(keys), fit):
                table = Table("token", box=None, pad_edge=False)
                for key in keys[start : start + fit]:
                    table.add_column(page["numbers"][key]["short"], justify="right", overflow="fold")
                for row in rows:
                    table.add_row(*(Text(cell) for cell in [row[0], *row[1 + start : 1 + start + fit]]))
                console.print(table)


def wait_for_key() -> str:
    """The next key pressed, without Enter; empty where the input ends."""
    import termios
    import tty

    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)
    try:
        tty.setcbreak(stdin, termios.TCSADRAIN)  # its default throws away what was typed meanwhile
        return os.read(stdin, 16).decode(errors="replace")  # an arrow key is several bytes
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)


def print_page(page: dict, ask: bool) -> None:
    """Everything in the terminal; with `ask`, a key press goes on to the next post."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    for name, text in page["about"].items():
        for policy, model in text.items() if isinstance(text, dict) else [(name, text)]:
            console.print(Text.assemble((f"{policy}: ", "bold"), model))
    marks = MARKS if console.color_system is None else [""] * 3
    legend = [(f"{band}{mark}", style) for band, mark, style in zip(BANDS, marks, STYLES)]
    ranks = [" (rank 1 of the base model), ", " (2 or 3), ", " (beyond)"]
    console.print(Text.assemble(("tokens: ", "bold"), *(part for pair in zip(legend, ranks) for part in pair)))
    if page["details"]:
        for entry in page["numbers"].values():
            console.print(Text.assemble((f"{entry['short']}: ", "bold"), entry["long"]))
    for i, post in enumerate(page["posts"]):
        print_post(console, page, post, f"post {i + 1} of {len(page['posts'])}")
        if ask and i + 1 < len(page["posts"]):
            console.print(Text("any key: next post, q: quit", "dim"))
            key = wait_for_key()
            if key in ("", "q", "Q", "\x1b", "\x04"):
                break
    table = Table("mean over posts", box=None)
    for total in page["totals"]:
        table.add_column(Text(total["name"]), justify="right")
    rows = {"score": "score", "kl": "KL (nats)", "reward": "score - kl_coef x KL", "tokens": "tokens", "ended": "ended"}
    for key, text in rows.items():
        if any(key in total for total in page["totals"]):
            table.add_row(text, *(f"{total[key]:.2f}" if key in total else "" for total in page["totals"]))
    for band, name in enumerate(BANDS):
        table.add_row(f"{name} tokens", *(f"{total['shares'][band]:.0%}" for total in page["totals"]))
    console.rule()
    console.print(table)


# ----------------------------------------------------------------------------------------------------------------------
# files


def make_html(page: dict) -> str:
    """The page `visualize_tokens.html` with the data in it. Only the template's own script and style may run."""
    html = (HERE / "visualize_tokens.html").read_text(encoding="utf-8")
    # inside <script type="application/json"> only `<` could end the data; U+2028 and its like are written as \u....
    data = json.dumps(page, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    for kind in ("script", "style"):
        block = re.search(rf"<{kind}>(.*?)</{kind}>", html, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        html = html.replace(f"{kind.upper()}_HASH", f"'sha256-{digest}'")
    return html.replace("PAGE_DATA", data)


LATEX_HEAD = r"""\documentclass[10pt]{article}
\usepackage[a4paper,margin=2cm]{geometry}
\usepackage{color,longtable}
\definecolor{marginal}{rgb}{1,0.84,0.45}
\definecolor{shifted}{rgb}{0.98,0.65,0.52}
\setlength{\parindent}{0pt}\setlength{\parskip}{4pt}\setlength{\fboxsep}{1pt}\sloppy
\newcommand{\band}[2]{\colorbox{#1}{\strut\smash{\underline{#2}}}\allowbreak}
\newcommand{\marginal}[1]{\band{marginal}{#1}}
\newcommand{\shifted}[1]{\band{shifted}{\textbf{#1}}}
\newcommand{\hex}[1]{{\fboxsep0.5pt\fbox{\tiny #1}}}
\begin{document}
"""
LATEX_CHARACTERS = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"{\ttfamily\char34}", "'": "'{}", "`": "`{}", "-": "-{}", "\u2018": "`{}",
    "\u2019": "'{}", "\u201c": "``{}", "\u201d": "''{}", "\u2013": "--{}", "\u2014": "---{}", "\u2026": r"\ldots{}",
    "\u00a0": "~", "↵": r"$\hookleftarrow$", "◂": r"$\triangleleft$", "ß": r"\ss{}", "æ": r"\ae{}", "ø": r"\o{}",
    "£": r"\pounds{}",
}  # fmt: skip
LATEX_ACCENTS = {"\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0308": '"', "\u030a": "r",
                 "\u0327": "c", "\u030c": "v"}  # fmt: skip


def tex(text: str) -> str:
    """Text as plain ASCII LaTeX; what the standard fonts cannot show becomes a boxed code point.

    >>> tex("50% é 🤔")
    "50\\\\% {\\\\'e} \\\\hex{1F914}"
    """
    found = []
    for c in text:
        plain = unicodedata.normalize("NFD", c)
        if c in LATEX_CHARACTERS:
            found.append(LATEX_CHARACTERS[c])
        elif c.isascii():
            found.append(c)
        elif len(plain) == 2 and plain[0].isascii() and plain[0].isalpha() and plain[1] in LATEX_ACCENTS:
            letter = {"i": r"\i", "j": r"\j"}.get(plain[0], plain[0])
            accent = LATEX_ACCENTS[plain[1]]
            found.append(f"{{\\{accent}{{{letter}}}}}" if accent.isalpha() else f"{{\\{accent}{letter}}}")
        else:
            found.append(rf"\hex{{{ord(c):04X}}}")
    return "".join(found)


def make_latex(page: dict) -> str:
    """A document that plain pdflatex compiles; colours by rank."""
    lines = [LATEX_HEAD]
    for name, text in page["about"].items():
        for policy, model in text.items() if isinstance(text, dict) else [(name, text)]:
            lines.append(rf"\textbf{{{tex(policy)}}}: {tex(model)}\par")
    ranks = r"(rank 1 of the base model), \marginal{marginal} (2 or 3), \shifted{shifted} (beyond)"
    lines.append(rf"\textbf{{tokens}}: unshifted {ranks}\par")
    if page["details"]:
        lines += [rf"\textbf{{{tex(e['short'])}}}: {tex(e['long'])}\par" for e in page["numbers"].values()]
    for post in page["posts"]:
        lines.append(rf"\section*{{Row {post['row']}: {tex(post['title'])}}}")
        lines += [tex(line) + r"\par" for line in post["query"].splitlines() if line.strip()]
        for response in post["responses"]:
            lines.append(rf"\medskip\textbf{{{tex(response['name'])}}} \textit{{{tex(headline(response))}}}\par")
            words = []
            for token in response["tokens"]:
                text = shown_token(token)
                space = " " * (text[0] == " ")  # outside the box, so that lines can break there
                broken = r"\par " * text.endswith("\n")
                box = [r"{%s}\allowbreak ", r"\marginal{%s}", r"\shifted{%s}"][token["band"]]
                words.append(space + box % tex(text[len(space) :].replace("\n", "") or "~") + broken)
            lines.append("".join(words) + r"\par")
            if page["details"]:
                keys, rows = details_rows(response, page["numbers"])
                head = [tex(cell) for cell in ["token", *(page["numbers"][key]["short"] for key in keys)]]
                lines.append(rf"{{\scriptsize\begin{{longtable}}{{l{'r' * len(keys)}}}")
                lines += [" & ".join(head) + r"\\\hline\endhead"]
                # a row must not begin with what `\\` would take for its option
                lines += ["{}" + " & ".join(tex(cell) for cell in row) + r"\\" for row in rows]
                lines.append(r"\end{longtable}}")
    return "\n".join([*lines, r"\end{document}", ""])


# ----------------------------------------------------------------------------------------------------------------------


def main(args: Args) -> dict[str, Any]:
    """Show what is asked for; returns the page as plain data."""
    quiet_libraries()
    huggingface_hub.utils.logging.set_verbosity_error()  # where there is no network: one line of ours, not six of its
    plan = make_plan(args)
    tokenizer, rows, ids = check_plan(args, plan)
    device = torch.device("cuda" if on_gpu() else "cpu")
    pad_id = tokenizer.pad_token_id
    because = f": {plan.base_note}" if plan.base_note else ""
    print(f"{len(rows)} posts of {plan.dataset}; ranks by {plan.base}{because}", flush=True)
    queries = [strip_pads(q, pad_id) for q in rows["query_token"]]
    references = [strip_pads(r, pad_id) for r in rows["reference_response_token"]]
    numbers = list(range(args.first, args.first + len(rows)))
    columns = score_everything(plan, queries, references, numbers, ids, device)
    page = make_page(args, plan, rows, columns, tokenizer, ids)
    outputs = {"html": make_html, "latex": make_latex, "json": lambda page: json.dumps(page, allow_nan=False, indent=1)}
    outputs = {name: make for name, make in outputs.items() if getattr(args, name) is not None}
    for name, make in outputs.items():
        write_whole(getattr(args, name), make(page))
        print(f"{name}: {getattr(args, name)}", flush=True)
    if not outputs:
        print_page(page, ask=args.num is None and sys.stdin.isatty() and sys.stdout.isatty())
    return page


if __name__ == "__main__":
    try:
        command_line(main, Args)
    except BrokenPipeError:  # the reader has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
