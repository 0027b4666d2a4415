"""REINFORCE: the policy gradient of the score with a baseline. The example of docs/adding_an_algorithm.md.

Reads   the SFT dataset's queries, an SFT policy, a reward model
Writes  a policy in --output_dir; metrics and a table of validation responses with scores in runs/<run_name>

Dimensions: B episodes, R response tokens, N response tokens of all rows.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from summarize_from_feedback_details.common.arguments import (
    RunArgs,
    check_optimisation,
    check_sizes,
    command_line,
    derive_sizes,
    derive_updates,
    may_change,
)
from summarize_from_feedback_details.common.check_inputs import find_ids, find_models, find_tokenizer, load_queries
from summarize_from_feedback_details.common.checkpoints import Checkpoints, fingerprint
from summarize_from_feedback_details.common.evaluation import evaluating, first_rows, score_policy
from summarize_from_feedback_details.common.logprobs import response_logits, scatter_tokens, token_logprobs
from summarize_from_feedback_details.common.noise import episode_keys
from summarize_from_feedback_details.common.packed_rows import supports_packing
from summarize_from_feedback_details.common.policies import load_policy
from summarize_from_feedback_details.common.reward_models import load_reward_model, read_rewards
from summarize_from_feedback_details.common.run_folder import RunFolder
from summarize_from_feedback_details.common.sampling import pad_rows, sample_responses, strip_pads
from summarize_from_feedback_details.common.training import Gradient, epoch_order, freeze, launch, prepare, save_model


@dataclass
class Args(RunArgs):
    # run
    exp_name: str = may_change("reinforce")
    output_dir: str = may_change("models/reinforce_policy")
    seed: int = 1
    print_sample_output_freq: int = may_change(0)
    eval_freq: int = may_change(0)
    num_eval_rows: int | None = None
    # optimisation
    eps: float = 1e-5
    lr: float = 3e-6
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    optimizer: Literal["adam", "adamw"] = "adamw"
    scheduler: str = "linear"
    warm_up_steps: int = 0
    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    gradient_checkpointing: bool = may_change(False)
    # sizes
    world_size: int | None = may_change(None)
    total_episodes: int | None = None
    num_updates: int | None = None
    batch_size: int | None = None
    local_micro_batch_size: int = may_change(16)
    gradient_accumulation_steps: int | None = may_change(None)
    local_eval_batch_size: int = may_change(64)
    # task
    base_model: str = "EleutherAI/pythia-1b-deduped"
    base_model_revision: str | None = None
    sft_model_path: str = "models/sft_policy"
    sft_model_revision: str | None = None
    reward_model_path: str = "models/reward"
    reward_model_revision: str | None = None
    query_dataset: str = "data/sft"
    dataset_revision: str | None = None
    response_length: int = 53
    truncate_token: str = "eos"
    eval_temperature: float = 0.01
    # algorithm
    temperature: float = 0.7
    kl_coef: float = 0.05
    """weight of the KL in the reward"""


class Policy(torch.nn.Module):
    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, queries: list, responses: list, temperature: float) -> torch.Tensor:  # [N]
        return token_logprobs(*response_logits(self.model, queries, responses), temperature)


def roll_out(policy: Policy, frozen: tuple, queries: list, episodes: np.ndarray, ids: Any, args: Args) -> list:
    """Responses [B, R], their log-probs under the policy and the reference [B, R], scores [B]."""
    device, columns = next(policy.parameters()).device, []
    for part in (slice(i, i + args.local_eval_batch_size) for i in range(0, len(queries), args.local_eval_batch_size)):
        tokens = pad_rows(queries[part], ids.pad, "left").to(device)
        keys = episode_keys(args.seed, episodes[part], device)
        responses, _ = sample_responses(policy.model, tokens, keys, ids, args.response_length, args.temperature)
        real = [strip_pads(row, ids.pad) for row in responses.cpu()]
        read = lambda model, part=part, real=real: model(queries[part], real, args.temperature)
        logprobs = (scatter_tokens(read(model), responses != ids.pad, 0.0) for model in (policy, Policy(frozen[0])))
        scores = read_rewards(frozen[1], [q + r for q, r in zip(queries[part], real)])
        columns.append((responses, *logprobs, scores))
    return [torch.cat(column) for column in zip(*columns)]


def main(args: Args) -> dict[str, float]:
    run = RunFolder(args, "reinforce")
    if run.is_finished():
        return run.final_metrics()
    check_sizes(args, ("response_length", "temperature"), at_least_zero=("kl_coef", "eval_temperature"))
    check_optimisation(args)
    derive_sizes(args, default_batch_size=512)
    derive_updates(args)
    RunFolder.check(args)
    models = find_models(args, base_model="policy", sft_model_path="policy", reward_model_path="reward")
    tokenizer = find_tokenizer("base_model", args.base_model, args.base_model_revision)
    dataset, ids = load_queries(args, tokenizer, models), find_ids(args.truncate_token, tokenizer)
    RunFolder.refuse_taken(args)
    accelerator = launch(args, "episodes")
    with run.open(accelerator):
        train = dataset["train"].with_format("numpy", columns=["query_token"])["query_token"]
        order = epoch_order(len(train), args.num_updates * args.batch_size, args.seed)
        policy, ref = (load_policy("sft_model_path", args.sft_model_path, args.sft_model_revision) for _ in "ab")
        frozen = ref, load_reward_model(args.reward_model_path, args.reward_model_revision)
        model, optimizer, scheduler = prepare(accelerator, Policy(policy), args)
        for network in frozen:
            freeze(network, accelerator, offload=False)
        data = {"query_dataset": fingerprint(np.concatenate(train[:1000]))}
        checkpoints = Checkpoints(run, accelerator, model, optimizer, scheduler, data)
        for update in run.progress("reinforce updates", checkpoints.resume().update + 1, args.num_updates):
            episodes = np.arange((update - 1) * args.batch_size, update * args.batch_size)
            queries = [strip_pads(row, ids.pad) for row in train[order[episodes]]]
            mine = np.arange(accelerator.process_index, args.batch_size, args.world_size)
            with evaluating(accelerator, model) as whole:
                local = roll_out(whole, frozen, [queries[i] for i in mine], episodes[mine], ids, args)
            back = accelerator.gather(torch.tensor(mine, device=accelerator.device)).argsort()
            responses, logprobs, ref_logprobs, scores = (accelerator.gather(column)[back] for column in local)
            kl, mask = (logprobs - ref_logprobs).sum(1), responses != ids.pad
            rewards = scores - args.kl_coef * kl
            advantages = rewards - rewards.mean()  # the baseline
            model.train()
            gradient, lengths = Gradient(accelerator, model, optimizer, checkpoints), mask.sum(1).cpu()
            total_lengths = [len(query) + int(n) for query, n in zip(queries, lengths)]
            for mb, _ in gradient.micro_batches(total_lengths, sort_by_length=not supports_packing(policy)):
                real = [strip_pads(responses[i].cpu(), ids.pad) for i in mb]
                new = scatter_tokens(model([queries[i] for i in mb], real, args.temperature), mask[mb], 0.0).sum(1)
                gradient.add(-(advantages[mb] * new).sum() / args.batch_size, {"responses": responses[mb]})
            metrics = {
                "objective/scores": scores.mean(), "objective/kl": kl.mean(),
                "objective/entropy": -logprobs.sum(1).mean(), "objective/response_length": lengths.float().mean(),
                "objective/eos_rate": (responses == ids.stop).any(1).float().mean(),
                "train/reinforce/grad_norm": gradient.step(), "train/reinforce/episode": update * args.batch_size,
            }  # fmt: skip
            scheduler.step()
            run.log(update, {name: float(value) for name, value in metrics.items()}, note=f"score {scores.mean():.3f}")
            checkpoints.after_update(update)
        checkpoints.save(args.num_updates)
        with evaluating(accelerator, model) as whole:
            rows = first_rows(dataset["validation"], args.num_eval_rows)
            found = score_policy(whole.model, frozen[1], rows, tokenizer, args, "policy, validation")
        run.log(args.num_updates + 1, {"eval/reinforce/validation/score": float(np.mean(found["score"]))})
        paths = {"policy": args.output_dir, "table": run.table("validation", found)}
        save_model(accelerator, run, model, policy, tokenizer, args.output_dir)
        run.deliver(paths)
    checkpoints.remove()
    return dict(run.metrics)


if __name__ == "__main__":
    command_line(main, Args)
