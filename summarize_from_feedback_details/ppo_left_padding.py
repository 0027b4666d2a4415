"""PPO: queries, an SFT policy and a reward model -> a policy whose summaries score higher.

Reads   the SFT dataset's queries (`tldr_dataset.py`), an SFT policy (`sft.py`), a reward model (`reward.py`, or one of
        the original code)
Writes  a policy (`AutoModelForCausalLM`, tokenizer included) in --output_dir; metrics and a table of validation
        responses with scores in runs/<run_name>
Paper   section 6 (PPO): left-padded queries, EOS trick, KL in the reward, separate policy and value networks

Laptop  python summarize_from_feedback_details/ppo_left_padding.py --base_model models/toy/small \
            --sft_model_path models/sft_policy --reward_model_path models/reward --query_dataset data/toy_tokenized/sft
1 GPU   python summarize_from_feedback_details/ppo_left_padding.py --local_micro_batch_size 4 --gradient_checkpointing
8 GPUs  accelerate launch --config_file deepspeed.yaml summarize_from_feedback_details/ppo_left_padding.py --deepspeed

Dimensions: B rows, Q query tokens, R response tokens, T = Q + R, V vocabulary, D hidden.

One update: every process samples its share of the batch; the rollouts (a few MB) are gathered, so that rewards,
whitening and mini-batches are those of the whole batch on any number of processes; then the mini-batches are dealt out.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from summarize_from_feedback_details.common.adapters import LoraParams, LoraSettings, trunk_of
from summarize_from_feedback_details.common.arguments import (
    RunArgs,
    check_optimisation,
    check_sizes,
    command_line,
    derive_sizes,
    derive_updates,
    derived,
    drop_revisions,
    may_change,
)
from summarize_from_feedback_details.common.check_inputs import TokenIds
from summarize_from_feedback_details.common.checkpoints import Checkpoints, fingerprint_queries
from summarize_from_feedback_details.common.console import print_metrics
from summarize_from_feedback_details.common.engines import importance_weights, mismatch_metrics
from summarize_from_feedback_details.common.evaluation import (
    evaluating,
    first_rows,
    print_samples,
    report_scores,
    score_policy,
)
from summarize_from_feedback_details.common.logprobs import (
    INVALID_LOGPROB,
    masked_mean,
    masked_var,
    masked_whiten,
    response_logits,
    response_positions,
    scatter_tokens,
    token_entropies,
    token_logprobs,
)
from summarize_from_feedback_details.common.machine import memory_gb
from summarize_from_feedback_details.common.packed_rows import hidden_at, supports_packing
from summarize_from_feedback_details.common.policies import load_policy_and_reference
from summarize_from_feedback_details.common.precision import exact, keep_exact, trunk_dtype
from summarize_from_feedback_details.common.reward_models import load_reward_and_value
from summarize_from_feedback_details.common.rollouts import (
    CLOSING_METRICS,
    Prompts,
    chunks,
    find_task,
    gather_in_order,
    objective_metrics,
    roll_out,
    warn,
)
from summarize_from_feedback_details.common.run_folder import RunFolder
from summarize_from_feedback_details.common.sampling import first_true_indices, strip_pads
from summarize_from_feedback_details.common.text_metrics import text_metrics
from summarize_from_feedback_details.common.training import (
    Gradient,
    epoch_order,
    freeze,
    launch,
    lent,
    prepare,
    save_model,
)
from summarize_from_feedback_details.common.zero import full_weights

STATISTICS = ("loss/policy", "loss/value", "policy/ratio", "policy/clipfrac", "policy/approxkl", "value/clipfrac",
              "policy/entropy")  # fmt: skip


@dataclass
class PpoHParams:
    noptepochs: int = 4
    """passes over each batch"""
    vf_coef: float = 0.1
    """weight of the value loss"""
    cliprange: float = 0.2
    """the policy's ratio is clipped to 1 +- this"""
    cliprange_value: float = 0.2
    """value predictions are clipped to the old ones +- this"""
    gamma: float = 1.0
    """discount per token"""
    lam: float = 0.95
    """lambda of generalised advantage estimation"""
    whiten_rewards: bool = False
    """divide the rewards by their standard deviation"""
    kl_coef: float = 0.05
    """beta, weight of the KL penalty in the reward"""


@dataclass
class Args(RunArgs):
    # run
    exp_name: str = may_change("ppo_left_padding")
    """name of the experiment, the first part of the run's name"""
    output_dir: str = may_change("models/ppo_policy")
    """folder of the trained policy"""
    value_output_dir: str | None = may_change(None)
    """also keep the trained value network, in this folder: `visualize_tokens.py` shows its values"""
    seed: int = 44413
    """seed of the order of queries and of the sampling noise"""
    print_sample_output_freq: int = may_change(10)
    """print a few validation responses every so many updates (0: never)"""
    run_eval: bool = True
    """evaluate on validation after training: a table of responses with their scores"""
    eval_freq: int = may_change(0)
    """also evaluate every so many updates, a table of responses each (0: only at the end)"""
    num_eval_rows: int | None = None
    """rows of the validation split to evaluate on (default: the whole split)"""

    # optimisation
    eps: float = 1e-5
    """epsilon of the optimiser"""
    lr: float = 3e-6
    """peak learning rate"""
    weight_decay: float = 0.01
    """decoupled weight decay (with --optimizer adam: L2)"""
    max_grad_norm: float | None = None
    """clip the global gradient norm, policy and value network together, to this (default: no clipping)"""
    optimizer: Literal["adam", "adamw"] = "adamw"
    """optimiser"""
    # Detail: learning rate - linear to 0 over updates
    scheduler: str = "linear"
    """learning rate schedule over all updates: linear, cosine (to 0), constant, constant_with_warmup"""
    warm_up_steps: int = 0
    """updates of linear warm-up"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the hardware multiplies in it, else fp32"""
    lora: bool = False
    """train adapters (LoRA) on frozen weights instead of all weights: much less memory; they want a learning rate about
    ten times higher"""
    lora_params: LoraSettings = field(default_factory=LoraParams)
    """the adapters' own settings, with --lora: `--lora.rank` and so on"""
    gradient_checkpointing: bool = may_change(False)
    """compute activations again in the backward pass: less memory, about a third more time"""
    offload: bool = may_change(False)
    """keep the reference policy and the reward model in host memory while the policy trains"""

    # sizes, in episodes; those left out are derived
    world_size: int | None = may_change(None)
    """number of processes; refused when another number was launched"""
    total_episodes: int | None = None
    """episodes in all (default: 1,000,000, the paper's; those that do not fill a last batch are left out)"""
    num_updates: int | None = None
    """updates (default: total_episodes // batch_size)"""
    nminibatches: int = 1
    """mini-batches that a batch is cut into; one optimiser step each"""
    local_micro_batch_size: int = may_change(16)
    """episodes of one forward pass on one process"""
    gradient_accumulation_steps: int | None = may_change(None)
    """forward passes per mini-batch (default: what makes up batch_size)"""
    batch_size: int | None = None
    """episodes of one update on all processes (default: 512, the paper's)"""
    local_rollout_forward_batch_size: int = may_change(64)
    """episodes that one process samples at a time"""
    local_eval_batch_size: int | None = may_change(None)
    """rows that one process samples at a time in evaluation (default: local_rollout_forward_batch_size)"""
    local_mini_batch_size: int | None = derived()
    """episodes of one mini-batch on one process, derived"""
    mini_batch_size: int | None = derived()
    """episodes of one mini-batch on all processes, derived"""

    # task
    base_model: str = "EleutherAI/pythia-1b-deduped"
    """base model of the policy: folder or hub id; its tokenizer is used"""
    base_model_revision: str | None = None
    """hub revision of the base model"""
    sft_model_path: str = "vwxyzjn/EleutherAI_pythia-1b-deduped__sft__tldr"
    """SFT policy to start from: folder or hub id (default: a released one)"""
    sft_model_revision: str | None = "sft__44413__1708611267"
    """hub revision of the SFT policy (a folder has none)"""
    reward_model_path: str = "vwxyzjn/EleutherAI_pythia-1b-deduped__reward__tldr"
    """reward model, ours or the original's: folder or hub id (default: a released one)"""
    reward_model_revision: str | None = "reward__44413__1708628552"
    """hub revision of the reward model (a folder has none)"""
    query_dataset: str = "vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144"
    """tokenised SFT dataset, whose queries are the prompts: folder or hub id"""
    dataset_revision: str | None = None
    """hub revision of the dataset"""
    response_length: int = 53
    """tokens sampled at most per response"""
    truncate_token: str = "eos"
    """responses end after this token: `eos`, or the text of a single token"""
    eval_temperature: float = 0.01
    """sampling temperature in evaluation (0: greedy)"""

    # algorithm
    temperature: float = 0.7
    """divides the logits of old, new and reference log-probabilities alike"""
    rollout_engine: Literal["hf", "hf_graph", "hf_bf16"] = "hf"
    """who samples in training: the policy itself; the same as a CUDA graph; a copy in bf16, for runs in float32"""
    penalty_reward_value: float = -1.0
    """score of a response without the truncate token"""
    non_eos_penalty: bool = True
    """whether a response without the truncate token gets that score"""
    ppo: PpoHParams = field(default_factory=PpoHParams)
    """the algorithm's own settings, written `--ppo.kl_coef` and so on"""


# ----------------------------------------------------------------------------------------------------------------------
# models


class PolicyAndValue(torch.nn.Module):
    """The two trained networks as one module: one optimiser, one DeepSpeed engine.

    Detail: separate networks - the policy starts from SFT, the value network is a full copy of the reward model, head
    and bias included.

    Args:
        policy: causal language model.
        value_model: sequence-classification model with one label; its normalising constant, `config.reward_bias`, is
            where the value head's bias starts.
    """

    def __init__(self, policy: torch.nn.Module, value_model: torch.nn.Module):
        super().__init__()
        self.policy, self.value_model = policy, value_model
        self.value_bias = keep_exact(torch.nn.Parameter(torch.tensor([value_model.config.reward_bias])))

    def forward(self, queries: list, responses: list, value_counts: list[int], temperature: float):
        """What training needs of B episodes, token lists without pads; one row behind the other in each result.

        Returns:
            log-probabilities [N] and, without gradients, entropies [N] at the N response tokens, in nats; values, so
            many of each response as `value_counts` says, in reward units.
        """
        logits, targets = response_logits(self.policy, queries, responses)
        entropies = token_entropies(logits, temperature)
        return token_logprobs(logits, targets, temperature), entropies, self.values(queries, responses, value_counts)

    def values(self, queries: list[list[int]], responses: list[list[int]], value_counts: list[int]) -> Tensor:
        """values[t] is read at the token BEFORE response token t: it has seen the query and the tokens < t."""
        inputs, before = response_positions(self.value_model, queries, responses, value_counts)
        values = self.value_model.score(hidden_at(self.value_model, inputs, before))[:, 0]
        return values + exact(self.value_bias)


# ----------------------------------------------------------------------------------------------------------------------
# rollout


class Rollout(NamedTuple):
    """What was sampled and computed for the episodes of a batch, in the order of episodes."""

    query_rows: Tensor  # [B] row of the dataset
    responses: Tensor  # [B, R] token ids, pads after the stop token
    logprobs: Tensor  # [B, R] of the policy, nats
    ref_logprobs: Tensor  # [B, R] of the reference policy, nats
    values: Tensor  # [B, R] before each token, reward units
    scores: Tensor  # [B] of the reward model
    sampled_logprobs: Tensor  # [B, R] of who sampled, see --rollout_engine


class Experience(NamedTuple):
    """What a rollout comes to, see `compute_experience`; [B, R] each but where stated."""

    responses: Tensor  # token ids, pads after the stop token
    padding_mask: Tensor  # True after the last token of the response
    padding_mask_p1: Tensor  # the same, one position later
    sequence_lengths: Tensor  # [B] index of the last token
    contains_stop: Tensor  # [B] whether the response ends with the stop token
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor  # [B]
    kl: Tensor
    non_score_rewards: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor

    def take(self, episodes: Any) -> "Experience":
        """That of some episodes of the batch."""
        return Experience(*(column[episodes] for column in self))


def generalised_advantages(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016): [B, R], [B, R] -> [B, R]."""
    advantages, after = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        next_values = values[:, t + 1] if t + 1 < values.shape[1] else 0.0
        after = rewards[:, t] + gamma * next_values - values[:, t] + gamma * lam * after
        advantages[:, t] = after
    return advantages


def compute_experience(rollout: Rollout, ids: TokenIds, args: Args) -> Experience:
    """From what was sampled to what is learned: masks, rewards, advantages, returns over the WHOLE batch."""
    _, responses, logprobs, ref_logprobs, values, scores, sampled_logprobs = rollout
    R = responses.shape[1]
    # a response always has a first token, so that index is at least 0
    sequence_lengths = first_true_indices(responses == ids.pad) - 1  # [B]
    contains_stop = (responses == ids.stop).any(1)  # [B]
    if args.non_eos_penalty:
        # Detail: no EOS - the score IS SET to -1 (TRL subtracts instead: not the same)
        scores = torch.where(contains_stop, scores, torch.full_like(scores, args.penalty_reward_value))
    columns = torch.arange(R, device=responses.device)
    padding_mask = columns > sequence_lengths[:, None]  # [B, R]
    # Detail: where the score lands - at the position right after EOS when there is room, else at the last token; so
    # that position is kept in values and returns, too. Its value has seen EOS and nothing later.
    sequence_lengths_p1 = sequence_lengths + 1
    padding_mask_p1 = columns > sequence_lengths_p1[:, None]
    logprobs = logprobs.masked_fill(padding_mask, INVALID_LOGPROB)
    ref_logprobs = ref_logprobs.masked_fill(padding_mask, INVALID_LOGPROB)
    values = values.masked_fill(padding_mask_p1, 0.0)
    # Detail: KL in the reward - per token -beta * (logprob - ref_logprob), the k1 estimate, fixed beta
    kl = logprobs - ref_logprobs
    non_score_rewards = -args.ppo.kl_coef * kl
    rewards = non_score_rewards.clone()
    ends = torch.where(sequence_lengths_p1 < R, sequence_lengths_p1, sequence_lengths)
    rewards[torch.arange(len(rewards), device=ends.device), ends] += scores
    if args.ppo.whiten_rewards:
        # Detail: reward whitening - no mean shift; off in the released runs
        rewards = masked_whiten(rewards, ~padding_mask_p1, shift_mean=False).masked_fill(padding_mask_p1, 0.0)
    advantages = generalised_advantages(rewards, values, args.ppo.gamma, args.ppo.lam)
    returns = advantages + values
    # Detail: advantage whitening - biased variance, over real tokens
    # Deviates: over the whole batch of all processes; the original whitened on each GPU
    advantages = masked_whiten(advantages, ~padding_mask).masked_fill(padding_mask, 0.0)
    advantages = advantages * importance_weights(args, logprobs, sampled_logprobs)
    return Experience(responses, padding_mask, padding_mask_p1, sequence_lengths, contains_stop, logprobs, ref_logprobs,
                      values, scores, kl, non_score_rewards, rewards, advantages, returns)  # fmt: skip


def ppo_losses(
    new_logprobs: Tensor, vpreds: Tensor, logprobs: Tensor, values: Tensor, advantages: Tensor, returns: Tensor,
    cliprange: float, cliprange_value: float,
) -> dict[str, Tensor]:  # fmt: skip
    """Clipped policy loss and clipped value loss of each token (Schulman et al. 2017; value clipping of the baselines).

    Args:
        new_logprobs, logprobs: [B, R] nats, of the policy now and when it sampled.
        vpreds, values: [B, R] value predictions now and then.
        advantages, returns: [B, R].

    Returns:
        dict of [B, R]: `pg` and `vf` (with its factor 0.5) losses, to be averaged over real tokens by the caller;
        `ratio`; `pg_clipped` and `vf_clipped` (bool, where the clipped term is the larger).
    """
    # Detail: clipping - the ratio to 1 +- 0.2, the value prediction to the old value +- 0.2; the larger loss counts
    ratio = torch.exp(new_logprobs - logprobs)
    pg_losses, pg_losses2 = -advantages * ratio, -advantages * ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    clipped = torch.clamp(vpreds, values - cliprange_value, values + cliprange_value)
    vf_losses1, vf_losses2 = (vpreds - returns) ** 2, (clipped - returns) ** 2
    return {
        "pg": torch.max(pg_losses, pg_losses2), "vf": 0.5 * torch.max(vf_losses1, vf_losses2), "ratio": ratio,
        "pg_clipped": pg_losses2 > pg_losses, "vf_clipped": vf_losses2 > vf_losses1,
    }  # fmt: skip


def micro_batch_loss(model: Callable, queries: list[list[int]], episodes: Experience, counts: list[int], args: Args):
    """One micro batch's part of the loss over its mini-batch, and of the statistics.

    Args:
        model: `PolicyAndValue`, wrapped or not.
        queries: b lists of token ids; episodes: their part of the batch's experience.
        counts: real tokens of the whole mini-batch, and those of the value loss (one more where there is room).

    Returns:
        loss []; STATISTICS [7], to be added up over micro batches; largest |ratio - 1| [].
    """
    mask, mask_p1 = ~episodes.padding_mask, ~episodes.padding_mask_p1  # [b, R]
    real = [row[keep].tolist() for row, keep in zip(episodes.responses.cpu(), mask.cpu())]
    new_logprobs, entropies, vpreds = model(queries, real, mask_p1.sum(1).tolist(), args.temperature)
    new_logprobs = scatter_tokens(new_logprobs, mask, INVALID_LOGPROB)  # [b, R]
    entropies, vpreds = scatter_tokens(entropies, mask, 0.0), scatter_tokens(vpreds, mask_p1, 0.0)
    then = (episodes.logprobs, episodes.values, episodes.advantages, episodes.returns)
    losses = ppo_losses(new_logprobs, vpreds, *then, args.ppo.cliprange, args.ppo.cliprange_value)
    # Deviates: means over the real tokens of the whole mini-batch; the original averaged each micro batch by itself,
    # and its statistics over pads
    mean = lambda values: (values * mask).sum() / counts[0]
    mean_p1 = lambda values: (values * mask_p1).sum() / counts[1]
    pg_loss, vf_loss = mean(losses["pg"]), mean_p1(losses["vf"])
    with torch.no_grad():
        approx_kl = 0.5 * (new_logprobs - episodes.logprobs) ** 2
        means = mean(losses["ratio"]), mean(losses["pg_clipped"]), mean(approx_kl)
        statistics = torch.stack([pg_loss, vf_loss, *means, mean_p1(losses["vf_clipped"]), mean(entropies)])
        ratio_error = ((losses["ratio"] - 1.0) * mask).abs().max()
    # Detail: nothing else - no entropy bonus, no adaptive KL, no pretraining loss
    return pg_loss + args.ppo.vf_coef * vf_loss, statistics, ratio_error


class Networks(NamedTuple):
    """The four networks of PPO."""

    trained: PolicyAndValue
    ref_policy: torch.nn.Module
    reward_model: torch.nn.Module


@torch.no_grad()
def make_rollout(
    networks: Networks, prompts: Prompts, recompute_logprobs: bool, ids: TokenIds, args: Args,
    poll: Callable = lambda: None,
) -> Rollout:  # fmt: skip
    """Sample a response to each query and compute what PPO needs of it, --local_rollout_forward_batch_size at a time.

    Args:
        recompute_logprobs: compute the policy's log-probs again by the forward pass of training instead of taking those
            of sampling: in bf16 the two differ by rounding, and the first-pass ratio has to be 1.
        poll: called before each forward pass that samples.
    """
    (trained, ref_policy, reward_model), device = networks, networks.trained.value_bias.device
    three = trained.policy, ref_policy, reward_model
    responses, *sampled = roll_out(three, prompts, recompute_logprobs, ids, args, poll)
    # Detail: critic sees the untruncated response - values[t] has seen the tokens < t only, and those that are kept are
    # read at EOS at the latest: what stands after EOS influences nothing, so the truncated one gives the same values
    # one more where there is room
    mask_p1 = torch.arange(args.response_length, device=device) <= responses.mask.sum(1)[:, None]
    counts = mask_p1.sum(1).tolist()
    read = lambda part: trained.values(prompts.queries[part], responses.real[part], counts[part])
    values = scatter_tokens(torch.cat([read(part) for part in chunks(prompts, args)]), mask_p1, 0.0)
    logprobs, ref_logprobs, scores = sampled
    rows = torch.tensor(prompts.rows, device=device)
    return Rollout(rows, responses.tokens, logprobs, ref_logprobs, values, scores, responses.logprobs)


def rollout_metrics(experience: Experience) -> dict[str, float]:
    """Metrics of a batch of episodes; means are over all episodes, or all real tokens."""
    mask, mask_p1 = ~experience.padding_mask, ~experience.padding_mask_p1
    errors = experience.returns - experience.values
    unexplained = masked_var(errors, mask_p1, unbiased=False) / masked_var(experience.returns, mask_p1, unbiased=False)
    e = experience
    metrics = objective_metrics(e.scores, e.contains_stop, mask, e.logprobs, e.kl, e.non_score_rewards) | {
        "value/error": masked_mean(errors.abs(), mask_p1), "value/explained_variance": 1.0 - unexplained,
        "value/mean": masked_mean(experience.values, mask_p1),
        "value/returns": masked_mean(experience.returns, mask_p1),
    }  # fmt: skip
    return {name: float(value) for name, value in metrics.items()}


def training_metrics(stats: Tensor, ratio_error: float) -> dict[str, float]:
    """Metrics of the passes over a batch, [passes, STATISTICS]: means over passes, the first and the last one apart."""
    metrics = {name: float(stats[:, i].mean()) for i, name in enumerate(STATISTICS)}
    metrics["policy/entropy"] = float(stats[0, STATISTICS.index("policy/entropy")])  # of the policy that sampled
    metrics["policy/approxkl_last_pass"] = float(stats[-1, STATISTICS.index("policy/approxkl")])
    return metrics | {"policy/first_pass_ratio_error": ratio_error}


def check_args(args: Args):
    """Refuse what cannot work; fill in what was left out. Returns (tokenizer, dataset, ids)."""
    check_sizes(
        args,
        positive=("response_length", "temperature", "local_rollout_forward_batch_size", "ppo.noptepochs",
                  "ppo.cliprange", "ppo.cliprange_value"),
        at_least_zero=("eval_temperature", "ppo.vf_coef", "ppo.kl_coef"), shares=("ppo.gamma", "ppo.lam"),
    )  # fmt: skip
    check_optimisation(args)
    derive_sizes(args, default_batch_size=512)
    derive_updates(args)
    args.local_eval_batch_size = args.local_eval_batch_size or args.local_rollout_forward_batch_size
    RunFolder.check(args)
    found = find_task(args)
    RunFolder.refuse_taken(args)
    return found


def main(args: Args) -> dict[str, float]:
    """Run the stage; returns the final metrics."""
    # ------------------------------------------------------------------------------------------------------------------
    # sizes
    drop_revisions(args, "sft_model", "reward_model")
    run = RunFolder(args, "ppo_left_padding")
    if run.is_finished():
        return run.final_metrics()
    tokenizer, dataset, ids = check_args(args)
    accelerator = launch(args, "episodes")
    device, world_size = accelerator.device, args.world_size
    in_float32 = accelerator.mixed_precision == "no"
    run.say(f"{args.num_updates} updates, {args.ppo.noptepochs} passes each")

    with run.open(accelerator):
        # --------------------------------------------------------------------------------------------------------------
        # data
        train = dataset["train"].with_format("numpy", columns=["query_token"])
        texts = dataset["train"].select_columns(["query", "reference_response"])
        validation = first_rows(dataset["validation"], args.num_eval_rows)
        # Detail: prompts [21] - the SFT queries, reshuffled at each pass
        order = epoch_order(len(train), args.num_updates * args.batch_size, args.seed)

        # --------------------------------------------------------------------------------------------------------------
        # models, optimiser
        torch.manual_seed(args.seed)
        dtype = trunk_dtype(args, accelerator)
        policy, ref_policy = load_policy_and_reference(args, dtype)
        freeze(ref_policy, accelerator, args.offload)
        reward_model, value_model = load_reward_and_value(args, ref_policy, dtype)
        freeze(reward_model, accelerator, args.offload)
        run.parameters = sum(p.numel() for p in ref_policy.parameters())
        if args.lora:
            shared = next(trunk_of(value_model).parameters()) is next(trunk_of(ref_policy).parameters())
            run.say(f"adapters on {'one trunk' if shared else 'two trunks: the reward model was trained whole'}")
        packed = supports_packing(policy) and supports_packing(reward_model)
        run.say(f"rows are read {'packed' if packed else 'padded: this architecture cannot pack them'}")
        model = PolicyAndValue(policy, value_model)
        model, optimizer, scheduler = prepare(accelerator, model, args)
        unwrapped = accelerator.unwrap_model(model)
        networks = Networks(unwrapped, ref_policy, reward_model)

        def evaluate(rows: Any, what: str) -> dict[str, list]:
            with evaluating(accelerator, model) as trained, lent(reward_model, device):
                return score_policy(trained.policy, reward_model, rows, tokenizer, args, what)

        # --------------------------------------------------------------------------------------------------------------
        # loop
        checkpoints = Checkpoints(run, accelerator, model, optimizer, scheduler, fingerprint_queries(train))
        resumed = checkpoints.resume()
        for update in run.progress("ppo updates", resumed.update + 1, args.num_updates):
            start = time.time()
            # rollout: each rank samples its share of the batch, rows of similar length together
            episodes = np.arange((update - 1) * args.batch_size, update * args.batch_size)
            queries = [strip_pads(q, ids.pad) for q in train[order[episodes]]["query_token"]]
            stats = torch.zeros(args.ppo.noptepochs, len(STATISTICS), device=device, dtype=torch.float64)
            # of the first pass over the first mini-batch, where it is noise
            ratio_error = torch.zeros(1, device=device)
            inside = resumed.inside(update)
            if inside:
                rollout = Rollout(*(inside.shared[name].to(device) for name in Rollout._fields))
                stats.copy_(inside.local["stats"])
                ratio_error.copy_(inside.shared["ratio_error"])
            else:
                model.eval()
                prompts, mine = Prompts(queries, order[episodes], episodes).share(accelerator)
                with accelerator.autocast(), full_weights(model):
                    local = make_rollout(networks, prompts, not in_float32, ids, args, checkpoints.poll)
                rollout = Rollout(*gather_in_order(accelerator, local, mine))
            assert torch.equal(rollout.query_rows.cpu(), torch.from_numpy(order[episodes]))
            experience = compute_experience(rollout, ids, args)
            rollout_seconds = time.time() - start

            # optimisation: passes over the whole batch, cut into the same mini-batches on any number of ranks
            model.train()
            lengths = np.array([len(q) + int(n) + 1 for q, n in zip(queries, experience.sequence_lengths.tolist())])
            for step in range(inside.step if inside else 0, args.ppo.noptepochs * args.nminibatches):
                epoch, i = divmod(step, args.nminibatches)
                shuffled = np.random.default_rng([args.seed, update, epoch]).permutation(args.batch_size)
                mini_batch = shuffled.reshape(args.nminibatches, args.mini_batch_size)[i]
                masks = experience.padding_mask, experience.padding_mask_p1
                counts = [int((~mask[mini_batch]).sum()) for mask in masks]
                before = stats.clone()

                def state() -> tuple[dict, dict]:
                    worst = accelerator.gather(ratio_error).max().reshape(1)
                    return rollout._asdict() | {"ratio_error": worst}, {"stats": before}

                checkpoints.mark(update - 1, step, state)
                gradient = Gradient(accelerator, model, optimizer, checkpoints)
                for part, _ in gradient.micro_batches(lengths[mini_batch].tolist(), sort_by_length=not packed):
                    mb = mini_batch[part]
                    mb_queries, mb_experience = [queries[j] for j in mb], experience.take(mb)
                    loss, values, error = micro_batch_loss(model, mb_queries, mb_experience, counts, args)
                    evidence = {"queries": mb_queries, "query_rows": order[episodes[mb]]}
                    gradient.add(loss, mb_experience._asdict() | evidence)
                    stats[epoch] += values
                    ratio_error = torch.max(ratio_error, error) if step == 0 else ratio_error
                grad_norm = gradient.step()
            lr = scheduler.get_last_lr()[0]
            scheduler.step()
            stats = accelerator.reduce(stats, "sum") / args.nminibatches
            ratio_error = float(accelerator.gather(ratio_error).max())

            # what happened
            seconds = time.time() - start
            metrics = rollout_metrics(experience) | training_metrics(stats, ratio_error)
            metrics |= {
                "train/ppo/lr": lr, "train/ppo/grad_norm": grad_norm, "train/ppo/episode": update * args.batch_size,
                "time/ppo/rollout_seconds": rollout_seconds, "time/ppo/training_seconds": seconds - rollout_seconds,
                "time/ppo/episodes_per_second": args.batch_size / seconds,
                "time/ppo/sampled_tokens_per_second": int((~experience.padding_mask).sum()) / rollout_seconds,
                "memory/ppo/peak_gb": memory_gb(device),
            }  # fmt: skip
            metrics |= mismatch_metrics(args, rollout.logprobs, rollout.sampled_logprobs, ~experience.padding_mask)
            metrics |= text_metrics(texts[order[episodes]], rollout.responses, tokenizer)
            if run.is_main:
                warn(update, metrics, in_float32)
            if args.run_eval and args.eval_freq and update % args.eval_freq == 0 and update < args.num_updates:
                found = evaluate(validation, f"update {update}, validation")
                run.table(f"validation_{update}", found)
                metrics |= report_scores("ppo", found)
            if args.print_sample_output_freq and update % args.print_sample_output_freq == 0:
                found = evaluate(first_rows(validation, 2 * world_size), "samples")
                print_samples(found)
                run.table(f"samples_{update}", found)
            run.log(update, metrics, f"score {metrics['objective/scores']:.3f} kl {metrics['objective/kl']:.3f}")
            checkpoints.after_update(update)

        # --------------------------------------------------------------------------------------------------------------
        # evaluation and saving
        checkpoints.save(args.num_updates)
        paths = {"policy": args.output_dir}
        if args.run_eval:
            found = evaluate(validation, "policy, validation")
            paths["table"] = run.table("validation", found)
            run.log(args.num_updates + 1, report_scores("ppo", found))
        save_model(accelerator, run, model, policy, tokenizer, args.output_dir)
        if args.value_output_dir:
            with full_weights(model):
                value_model.config.reward_bias = float(exact(unwrapped.value_bias).detach())
            save_model(accelerator, run, model, value_model, tokenizer, args.value_output_dir)
        if run.is_main:
            print_metrics("PPO", run.metrics, (*CLOSING_METRICS, "value/explained_variance"))
        run.deliver(paths)
    checkpoints.remove()
    return dict(run.metrics)


if __name__ == "__main__":
    command_line(main, Args)
