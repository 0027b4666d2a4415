"""Losses of TRL 1.16 (RLOO, GRPO, DPO, online DPO) on fixed inputs -> trl_losses.npz, which tests compare with ours.

    pip install --no-deps --target ../trl trl==1.16.0
    PYTHONPATH=../trl python tests/golden/trl_losses.py

TRL's own loss functions are called, on log-probabilities that are given instead of computed by a model.
"""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import torch
from trl.experimental.online_dpo.online_dpo_trainer import OnlineDPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

B, R, CLIP, BETA, DPO_BETA = 6, 5, 0.2, 0.04, 0.3


def loss_and_gradient(trainer: type, new: torch.Tensor, inputs: dict, **settings):
    """Loss of TRL's `_compute_loss`, and its gradient by the log-probabilities [B, R]."""
    new = new.clone().requires_grad_(True)
    this = MagicMock()
    this._get_per_token_logps_and_entropies.return_value = (new, torch.zeros_like(new), None)
    defaults = {"aux_loss_enabled": False, "epsilon_low": CLIP, "epsilon_high": CLIP, "beta": BETA,
                "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "use_vllm": False,
                "importance_sampling_level": "token", "current_gradient_accumulation_steps": 1,
                "_entropy_bonus_enabled": False, "max_completion_length": R}  # fmt: skip
    for name, value in (defaults | settings).items():
        setattr(this, name, value)
    this.model.training = True
    this.args.delta, this.args.use_bias_correction_kl = None, False
    this.accelerator.gather.side_effect = this.accelerator.gather_for_metrics.side_effect = lambda x: x
    this.accelerator.reduce.side_effect = lambda x, **_: x
    loss = trainer._compute_loss(this, this.model, inputs)
    loss.backward()
    return loss.detach().numpy(), new.grad.numpy()


def dpo_loss_and_gradient(new: torch.Tensor, ref: torch.Tensor, mask: torch.Tensor, **settings):
    """Loss of TRL's `DPOTrainer._compute_loss`; rows are all chosen, then all rejected."""
    new, this, summed = new.clone().requires_grad_(True), MagicMock(), (ref * mask).sum(1).chunk(2)
    this.configure_mock(ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", beta=DPO_BETA,
                        loss_weights=[1.0], aux_loss_enabled=False, label_smoothing=0.0,
                        use_weighting=False)  # fmt: skip
    this.configure_mock(**settings)
    this.accelerator.device = "cpu"
    this.accelerator.gather_for_metrics.side_effect = lambda x: x
    # a token before each response, which predicts its first one
    inputs = {
        "input_ids": torch.ones(len(new), R + 1, dtype=torch.long), "attention_mask": torch.ones(len(new), R + 1),
        "completion_mask": torch.cat([torch.zeros(len(new), 1, dtype=torch.long), mask], 1),
        "ref_chosen_logps": summed[0], "ref_rejected_logps": summed[1],
    }  # fmt: skip
    logged = {"entropy": new.detach(), "mean_logits": new.detach(), "is_top1": mask.bool()}
    outputs = SimpleNamespace(log_probs=new * mask, **logged)
    loss = DPOTrainer._compute_loss(this, lambda **_: outputs, inputs, False)
    loss.backward()
    return loss.detach().numpy(), new.grad.numpy()


def online_dpo_loss_and_gradient(
    new: torch.Tensor, ref: torch.Tensor, mask: torch.Tensor, scores: torch.Tensor, kind: str
):
    """Loss of TRL's `OnlineDPOTrainer.training_step`; rows are the first response to each query, then the second."""
    new, this, rows = new.clone().requires_grad_(True), MagicMock(), len(new)
    this._generate.return_value = (mask, mask, mask, mask, None)
    this._forward.side_effect = [new, ref]
    this._calculate_rewards_from_functions.return_value = scores.clone()
    this.configure_mock(beta=DPO_BETA, eos_token_ids=[1])
    this.args.configure_mock(use_vllm=False, missing_eos_penalty=None, loss_type=kind, torch_empty_cache_steps=None,
                             n_gpu=1, optim="adamw", gradient_accumulation_steps=1)  # fmt: skip
    this.accelerator.gather_for_metrics.side_effect = lambda x: x
    this.accelerator.backward.side_effect = lambda loss, **_: loss.backward()
    loss = OnlineDPOTrainer.training_step(this, MagicMock(), {"prompt": ["query"] * (rows // 2)})
    return loss.numpy(), new.grad.numpy()


def main() -> None:
    rng = torch.Generator().manual_seed(7)
    new, old, ref = (-3 * torch.rand(B, R, generator=rng) for _ in range(3))
    old, ref = new + 0.2 * (old + 1.5), new + 0.3 * (ref + 1.5)  # ratios around 1, some of them clipped
    lengths = torch.tensor([5, 3, 1, 4, 2, 5])
    mask = (torch.arange(R) < lengths[:, None]).long()
    advantages = torch.randn(B, generator=rng)
    inputs = {
        "prompt_ids": mask, "prompt_mask": mask, "completion_ids": mask, "completion_mask": mask,
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref,
        "old_logps": (old * mask).sum(1),
    }  # fmt: skip
    found = {name: value.numpy() for name, value in
             {"new": new, "old": old, "ref": ref, "mask": mask, "advantages": advantages}.items()}  # fmt: skip
    for name, trainer, settings in (
        ("rloo", RLOOTrainer, {}),
        ("rloo_unclipped", RLOOTrainer, {"epsilon_low": 1e6, "epsilon_high": 1e6}),
        ("grpo", GRPOTrainer, {"loss_type": "grpo"}),
        ("grpo_over_tokens", GRPOTrainer, {"loss_type": "bnpo"}),
        ("grpo_without_kl", GRPOTrainer, {"loss_type": "grpo", "beta": 0.0}),
    ):
        found[f"{name}_loss"], found[f"{name}_gradient"] = loss_and_gradient(trainer, new, inputs, **settings)
        print(name, found[f"{name}_loss"])
    policy, mask = new + 1.0 * torch.rand(B, R, generator=rng), mask * 0 + 1  # IPO of TRL averages: equal lengths
    found["dpo_new"] = policy.numpy()
    found["dpo_loss"], found["dpo_gradient"] = dpo_loss_and_gradient(policy, ref, mask, loss_types=["sigmoid"])
    found["ipo_loss"], found["ipo_gradient"] = dpo_loss_and_gradient(policy, ref, mask, loss_types=["ipo"])
    # of one pair, "aot" is conservative DPO: there is nothing to sort
    for i in range(B // 2):
        pair = [i, i + B // 2]
        settings = {"loss_types": ["aot"], "label_smoothing": 0.1}
        numbers = dpo_loss_and_gradient(policy[pair], ref[pair], mask[pair], **settings)
        found[f"smoothed{i}_loss"], found[f"smoothed{i}_gradient"] = numbers
    found["scores"] = torch.randn(B, generator=rng).numpy()
    scores = torch.from_numpy(found["scores"])
    for kind in ("sigmoid", "ipo"):
        numbers = online_dpo_loss_and_gradient(policy, ref, mask, scores, kind)
        found[f"online_{kind}_loss"], found[f"online_{kind}_gradient"] = numbers
    np.savez(Path(__file__).with_suffix(".npz"), **found)


if __name__ == "__main__":
    main()
