"""Losses equal to those of TRL 1.16's trainers on fixed inputs (`golden/trl_losses.py` made the numbers)."""

import numpy as np
import pytest
import torch
from conftest import ROOT

from summarize_from_feedback_details import grpo, rloo

GOLDEN = {name: torch.from_numpy(value) for name, value in np.load(ROOT / "tests/golden/trl_losses.npz").items()}
CLIP, BETA = 0.2, 0.04


def check(name: str, new: torch.Tensor, loss: torch.Tensor) -> None:
    loss.backward()
    torch.testing.assert_close(loss.detach(), GOLDEN[f"{name}_loss"], rtol=0, atol=1e-5)
    torch.testing.assert_close(new.grad, GOLDEN[f"{name}_gradient"], rtol=0, atol=1e-5)
    assert GOLDEN[f"{name}_gradient"].abs().max() > 0.05


@pytest.mark.parametrize("name, clip", [("rloo", CLIP), ("rloo_unclipped", None)])
def test_rloo(name, clip):
    new, mask = GOLDEN["new"].clone().requires_grad_(True), GOLDEN["mask"].bool()
    summed = lambda values: (values * mask).sum(1)
    check(name, new, rloo.rloo_losses(summed(new), summed(GOLDEN["old"]), GOLDEN["advantages"], clip).mean())


@pytest.mark.parametrize("name, by_length, beta", [("grpo", True, BETA), ("grpo_over_tokens", False, BETA),
                                                   ("grpo_without_kl", True, 0.0)])  # fmt: skip
def test_grpo(name, by_length, beta):
    new, mask = GOLDEN["new"].clone().requires_grad_(True), GOLDEN["mask"].bool()
    losses = grpo.grpo_losses(new, GOLDEN["old"], GOLDEN["ref"], GOLDEN["advantages"], CLIP, beta)
    check(name, new, (losses * grpo.token_weights(mask, by_length)).sum())
