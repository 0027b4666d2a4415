"""Losses equal to those of TRL 1.16's trainers on fixed inputs (`golden/trl_losses.py` made the numbers)."""

import numpy as np
import pytest
import torch
from conftest import ROOT

from summarize_from_feedback_details import dpo, grpo, online_dpo, rloo

GOLDEN = {name: torch.from_numpy(value) for name, value in np.load(ROOT / "tests/golden/trl_losses.npz").items()}
CLIP, BETA, DPO_BETA = 0.2, 0.04, 0.3


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
    losses = grpo.grpo_losses(new, GOLDEN["old"], GOLDEN["ref"], GOLDEN["advantages"][:, None], CLIP, beta)
    check(name, new, (losses * grpo.token_weights(mask, by_length)).sum())


def ratios(new: torch.Tensor, rows: slice | list[int] = slice(None)) -> torch.Tensor:
    """log(pi / ref) of the responses: all chosen, then all rejected."""
    return (new - GOLDEN["ref"][rows]).sum(1)


@pytest.mark.parametrize("name, settings", [("dpo", {}), ("ipo", {"ipo": True})])
def test_dpo(name, settings):
    new = GOLDEN["dpo_new"].clone().requires_grad_(True)
    chosen, rejected = ratios(new).chunk(2)
    # TRL averages IPO's log-ratios over tokens (5 here); the paper's equation 17 and the original code add them up
    margins = (chosen - rejected) / (5 if name == "ipo" else 1)
    check(name, new, dpo.dpo_losses(margins, DPO_BETA, **settings).mean())


@pytest.mark.parametrize("pair", [0, 1, 2])
def test_conservative_dpo(pair):
    rows = [pair, pair + 3]
    new = GOLDEN["dpo_new"][rows].clone().requires_grad_(True)
    chosen, rejected = ratios(new, rows)
    check(f"smoothed{pair}", new, dpo.dpo_losses(chosen - rejected, DPO_BETA, label_smoothing=0.1))


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_online_dpo(kind):
    new = GOLDEN["dpo_new"].clone().requires_grad_(True)
    first, second = ratios(new).chunk(2)
    sides = online_dpo.preferences(torch.stack(GOLDEN["scores"].chunk(2), 1).flatten())
    assert set(sides.tolist()) == {-1.0, 1.0}
    losses = online_dpo.dpo_losses(sides * (first - second), DPO_BETA, ipo=kind == "ipo")
    check(f"online_{kind}", new, losses.mean())
