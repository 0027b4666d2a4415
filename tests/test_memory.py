"""The memory formula of docs/cluster.md: by hand, and against the peaks that were measured."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
import memory

PEAKS = json.loads((ROOT / "benchmark/results/memory.json").read_text())["peaks"]


def test_parameters_of_the_papers_models():
    # the models' pages: 1,011,781,632, 2,775,208,960 and 6,857,302,016 parameters
    assert [s.policy for s in memory.PAPER] == pytest.approx([1_011_781_632, 2_775_208_960, 6_857_302_016], rel=1e-6)


def test_terms_by_hand():
    shape = memory.Shape("x", layers=2, hidden=10, vocabulary=100)
    assert shape.trunk == 100 * 10 + 2 * (1200 + 130) + 20 and shape.policy == shape.trunk + 1000
    plain = memory.memory(shape, memory.Layout("sft", rows=3, tokens=7, responses=7, width=4))
    N = shape.policy
    assert (plain["weights"], plain["gradients"], plain["optimizer"], plain["frozen"]) == (4 * N, 4 * N, 8 * N, 0)
    assert plain["activations"] == 3 * 7 * 10 * 4 * 2 * memory.SAVED_PER_LAYER
    assert plain["logits"] == 4 * 3 * 7 * 100
    ppo = {"stage": "ppo", "rows": 1, "tokens": 5, "responses": 2, "rollout_rows": 6, "processes": 4}
    zero2, zero3 = (memory.memory(shape, memory.Layout(**ppo, zero=stage)) for stage in (2, 3))
    N = shape.policy + shape.trunk
    assert zero2["optimizer"] == zero3["optimizer"] == 3 * N and zero2["cache"] == 2 * 2 * 2 * 10 * 5 * 6
    assert zero2["weights"] == 2 * N and zero3["weights"] == N / 2 and zero2["frozen"] == 2 * N
    assert zero3["rollout"] - zero3["cache"] == N / 2 + 3 * N + 2 * N + 2 * N


@pytest.mark.parametrize("name", PEAKS)
def test_formula_is_within_15_percent_of_what_was_measured(name):
    shape, run = name.split(": ")
    shapes = {s.name: s for s in memory.MEASURED}
    predicted = memory.memory(shapes[shape], memory.measured_layouts()[run])["peak"] / 1e9
    assert predicted == pytest.approx(PEAKS[name]["measured_gb"], rel=0.15)
    assert len(PEAKS) >= 14
