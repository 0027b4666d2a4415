"""Numbers of TRL 1.16's RLOO and GRPO losses on fixed inputs -> trl_losses.npz, which the tests compare with ours.

    pip install --no-deps --target ../trl trl==1.16.0
    PYTHONPATH=../trl python tests/golden/trl_losses.py

TRL's own loss functions are called, on log-probabilities that are given instead of computed by a model.
"""

from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

B, R, CLIP, BETA = 6, 5, 0.2, 0.04


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
    np.savez(Path(__file__).with_suffix(".npz"), **found)


if __name__ == "__main__":
    main()
