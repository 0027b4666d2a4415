"""Best of n: queries, an SFT policy and a reward model -> the best of n samples, the yardstick of what is trained.

Reads   the SFT dataset's validation queries (`tldr_dataset.py`), an SFT policy (`sft.py`) or any other, a reward model
        (`reward.py`, or one of the original code)
Writes  in runs/<run_name>: a table of the best responses, for `eval/judge.py`; one of all samples; and for each n up to
        --best_of the expected score of the best of n beside its KL. No model is trained
Paper   Stiennon et al. 2020, section 4.3; Gao et al. 2023, "Scaling Laws for Reward Model Overoptimization" (arXiv
        2210.10760), section 3.1; the estimate from N samples: Nakano et al. 2021 (arXiv 2112.09332), appendix I

Laptop  python summarize_from_feedback_details/best_of_n.py --base_model models/toy/small --best_of 16 \
            --sft_model_path models/sft_policy --reward_model_path models/reward --query_dataset data/toy_tokenized/sft
1 GPU   python summarize_from_feedback_details/best_of_n.py
8 GPUs  accelerate launch --config_file deepspeed.yaml summarize_from_feedback_details/best_of_n.py

Dimensions: B queries, N samples of each.
"""

import hashlib
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas
import torch
from accelerate.utils import gather_object

from summarize_from_feedback_details.common.arguments import (
    RunArgs,
    check_sizes,
    check_world_size,
    command_line,
    derived,
    drop_revisions,
    may_change,
    refuse,
)
from summarize_from_feedback_details.common.check_inputs import TokenIds
from summarize_from_feedback_details.common.console import print_metrics
from summarize_from_feedback_details.common.evaluation import first_rows, gather_rows
from summarize_from_feedback_details.common.policies import load_policy
from summarize_from_feedback_details.common.reward_models import load_reward_model
from summarize_from_feedback_details.common.rollouts import Prompts, find_task, read_scores, respond
from summarize_from_feedback_details.common.run_files import find_run
from summarize_from_feedback_details.common.run_folder import RunFolder
from summarize_from_feedback_details.common.sampling import strip_pads
from summarize_from_feedback_details.common.training import connect, freeze

# of the samples; the best has the highest score after the penalty for a missing EOS
COLUMNS = ("row", "sample", "response", "score", "penalised", "response_length", "has_eos")
APART = 10**7  # between the noise of two samples of a query: sample j is the same whatever --best_of and the rows are


@dataclass
class Args(RunArgs):
    # run
    exp_name: str = may_change("best_of_n")
    """name of the experiment, the first part of the run's name"""
    output_dir: str | None = derived()
    """no model is written"""
    seed: int = 44413
    """seed of the sampling noise"""
    num_eval_rows: int | None = None
    """rows of the validation split (default: the whole split)"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the hardware multiplies in it, else fp32"""
    world_size: int | None = may_change(None)
    """number of processes; refused when another number was launched"""
    queries_at_once: int = may_change(16)
    """queries, on all processes, after which what is sampled is written: a run that is stopped goes on from there"""
    local_rollout_forward_batch_size: int = may_change(64)
    """responses that one process samples at a time"""

    # task
    base_model: str = "EleutherAI/pythia-1b-deduped"
    """base model of the policy: folder or hub id; its tokenizer is used"""
    base_model_revision: str | None = None
    """hub revision of the base model"""
    sft_model_path: str = "vwxyzjn/EleutherAI_pythia-1b-deduped__sft__tldr"
    """policy to sample from: folder or hub id (default: a released one)"""
    sft_model_revision: str | None = "sft__44413__1708611267"
    """hub revision of the policy (a folder has none)"""
    reward_model_path: str = "vwxyzjn/EleutherAI_pythia-1b-deduped__reward__tldr"
    """reward model, ours or the original's: folder or hub id (default: a released one)"""
    reward_model_revision: str | None = "reward__44413__1708628552"
    """hub revision of the reward model (a folder has none)"""
    query_dataset: str = "vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144"
    """tokenised SFT dataset: folder or hub id"""
    dataset_revision: str | None = None
    """hub revision of the dataset"""
    response_length: int = 53
    """tokens sampled at most per response"""
    truncate_token: str = "eos"
    """responses end after this token: `eos`, or the text of a single token"""

    # algorithm
    best_of: int = 64
    """samples of each query"""
    temperature: float = 0.7
    """sampling temperature"""
    penalty_reward_value: float = -1.0
    """score of a response without the truncate token"""
    non_eos_penalty: bool = True
    """whether a response without the truncate token gets that score"""


def expected_best(scores: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For n = 1 ... N the mean value of the best of n samples, over all choices of n of the N: [B, N] -> [B, N].

    The sample with the i-th lowest score is the best of n in C(i - 1, n - 1) of the C(N, n) choices.

    Args:
        scores: [B, N], by which the best is chosen.
        values: [B, N], of which the mean is taken: the scores themselves, or what another judge says.

    >>> expected_best(np.array([[3.0, 1.0, 2.0]]), np.array([[3.0, 1.0, 2.0]])).round(3).tolist()
    [[2.0, 2.667, 3.0]]
    """
    N = scores.shape[1]
    in_order = np.take_along_axis(values, np.argsort(scores, axis=1, kind="stable"), axis=1)  # [B, N]
    choices = lambda a, b: math.lgamma(a + 1) - math.lgamma(b + 1) - math.lgamma(a - b + 1)  # log C(a, b)
    weights = [[math.exp(choices(i - 1, n - 1) - choices(N, n)) if i >= n else 0.0 for n in range(1, N + 1)]
               for i in range(1, N + 1)]  # fmt: skip
    return in_order @ np.array(weights)


def kl_of_best(n: np.ndarray) -> np.ndarray:
    """KL between the best of n samples and one sample: log n - (n - 1) / n nats (Stiennon et al. 2020, appendix G.3).

    >>> kl_of_best(np.array([1, 2, 4])).round(3).tolist()
    [0.0, 0.193, 0.636]
    """
    return np.log(n) - (n - 1) / n


@torch.no_grad()
def sample_queries(
    networks: tuple[torch.nn.Module, torch.nn.Module], rows: Any, numbers: list[int], tokenizer: Any, ids: TokenIds,
    args: Args,
) -> list[tuple]:  # fmt: skip
    """--best_of samples of each of these rows: tuples of `COLUMNS`."""
    queries = [strip_pads(rows[number]["query_token"], ids.pad) for number in numbers]
    row, sample = np.repeat(numbers, args.best_of), np.tile(np.arange(args.best_of), len(numbers))
    repeated = [query for query in queries for _ in range(args.best_of)]
    prompts = Prompts(repeated, row, sample * APART + row)
    responses = respond(networks[0], prompts, ids, args)
    scores = read_scores(networks[1], prompts, responses, args)
    stops = (responses.tokens == ids.stop).any(1)
    penalised = scores
    if args.non_eos_penalty:
        penalised = torch.where(stops, scores, torch.full_like(scores, args.penalty_reward_value))
    texts = [text.strip() for text in tokenizer.batch_decode(responses.real, skip_special_tokens=True)]
    lengths = list(map(len, responses.real))
    columns = (scores.tolist(), penalised.tolist(), lengths, stops.tolist())
    return list(zip(row.tolist(), sample.tolist(), texts, *columns))


def best_responses(samples: pandas.DataFrame, rows: Any, tokenizer: Any) -> dict[str, list]:
    """The best sample of each row as columns of a table, beside the query and the reference."""
    best = samples.loc[samples.groupby("row")["penalised"].idxmax()]
    numbers = best["row"].tolist()
    references = [text.replace(tokenizer.eos_token, "").strip() for text in rows[numbers]["reference_response"]]
    columns = {"query": list(rows[numbers]["query"]), "response": best["response"].tolist(), "reference": references}
    return columns | {name: best[name].tolist() for name in ("score", "response_length", "has_eos")}


def check_args(args: Args):
    """Refuse what cannot work; fill in what was left out. Returns (tokenizer, dataset, ids)."""
    positive = ("best_of", "response_length", "local_rollout_forward_batch_size", "queries_at_once", "num_eval_rows")
    check_sizes(args, (*positive, "temperature"), at_least_zero=("seed",))
    check_world_size(args)
    if args.push_to_hub:
        refuse("push_to_hub", "True", "nothing: no model is trained")
    RunFolder.check(args)
    found = find_task(args)
    RunFolder.refuse_taken(args)
    return found


def main(args: Args) -> dict[str, float]:
    """Sample and score; returns the final metrics."""
    drop_revisions(args, "sft_model", "reward_model")
    run = RunFolder(args, "best_of_n")
    if run.is_finished():
        return run.final_metrics()
    tokenizer, dataset, ids = check_args(args)
    accelerator = connect(args)
    rank, world = accelerator.process_index, accelerator.num_processes
    before = find_run(run.path)

    with run.open(accelerator):
        rows = first_rows(dataset["validation"], args.num_eval_rows)
        policy = load_policy("sft_model_path", args.sft_model_path, args.sft_model_revision)
        reward_model = load_reward_model(args.reward_model_path, args.reward_model_revision)
        networks = freeze(policy, accelerator, False), freeze(reward_model, accelerator, False)
        run.parameters = sum(p.numel() for p in policy.parameters())
        run.reset_logs(None)
        run.seconds_before = before[0]["wall_clock_seconds"] if before else 0.0
        # samples of other models at the same place, or in another precision, are not mixed in
        made_with = (run.args_as_given["models"], accelerator.mixed_precision, rows["query_token"])
        folder = run.path / f"samples_{hashlib.sha256(repr(made_with).encode()).hexdigest()[:12]}"
        starts = range(0, len(rows), args.queries_at_once)
        for part in run.progress("best of n parts", 1, len(starts)):
            numbers = list(range(len(rows)))[starts[part - 1] :][: args.queries_at_once]
            file = folder / f"{numbers[0]:08d}_{len(numbers)}.parquet"
            if any(accelerator.gather(torch.tensor([file.exists()], device=accelerator.device)).tolist()):
                run.bar.step()
                continue
            with accelerator.autocast():
                mine = numbers[rank::world]
                found = gather_object(sample_queries(networks, rows, mine, tokenizer, ids, args) if mine else [])
            if run.is_main:
                write_part(file, sorted(found))
            run.bar.step()
            gather_rows([])  # ends all processes where a signal asked to stop: what is written stays

        # --------------------------------------------------------------------------------------------------------------
        # what the best of n is worth
        accelerator.wait_for_everyone()
        samples = pandas.concat(map(pandas.read_parquet, sorted(folder.glob("*.parquet"))))
        samples = samples.drop_duplicates(["row", "sample"]).sort_values(["row", "sample"], ignore_index=True)
        scores = samples["penalised"].to_numpy().reshape(len(rows), args.best_of)
        n, expected = np.arange(1, args.best_of + 1), expected_best(scores, scores)  # [N], [B, N]
        means, errors, kl = expected.mean(0), expected.std(0) / math.sqrt(len(rows)), kl_of_best(n)
        for i in range(args.best_of):
            numbers = {
                "objective/scores": means[i],
                "objective/scores_standard_error": errors[i],
                "objective/kl": kl[i],
            }
            run.log(i + 1, {name: float(value) for name, value in numbers.items()})
        for name in ("response_length", "has_eos"):
            values = samples[name].to_numpy(float).reshape(scores.shape)
            metric = "objective/eos_rate" if name == "has_eos" else f"objective/{name}"
            run.metrics[metric] = float(expected_best(scores, values).mean(0)[-1])
        curve = {"n": n, "score": means, "standard_error": errors, "kl": kl}
        paths = {"best": run.table("validation", best_responses(samples, rows, tokenizer))}
        paths |= {"curve": run.table("best_of_n", curve), "samples": run.table("samples", samples.to_dict("list"))}
        if run.is_main:
            print_metrics(f"Best of {args.best_of}", run.metrics, tuple(run.metrics))
        run.deliver(paths)
        accelerator.wait_for_everyone()
    for folder in run.path.glob("samples_*") if run.is_main else ():
        shutil.rmtree(folder, ignore_errors=True)  # they stand in one table now
    return dict(run.metrics)


def write_part(file: Path, found: list[tuple]) -> None:
    """Write what was sampled, whole or not at all."""
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(".partial")
    pandas.DataFrame(found, columns=list(COLUMNS)).to_parquet(partial)
    partial.replace(file)


if __name__ == "__main__":
    command_line(main, Args)
