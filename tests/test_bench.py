"""The benchmark: lengths, FLOPs by formula and counted, forced ends, one small run, and the committed report."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "benchmark"))
import workload
from workload import Workload

TINY = Workload(rows=4, query=0.05, hidden=64, layers=2, heads=2)
RESULTS = sorted(ROOT.glob("benchmark/results/*/runs.json"))
LONG = [file for file in RESULTS if '"long ' in file.read_text()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workload")
    workload.make(TINY, folder)
    return folder


def test_lengths_are_those_of_real_rows_and_the_same_for_any_size():
    for rows in (4, 16, 64):
        work = Workload(rows=rows)
        assert 315 < work.query_lengths().mean() < 335 and work.query_lengths().max() <= 512
        assert work.response_lengths(0).mean() == pytest.approx(40, abs=1)
        assert work.response_lengths(0).tolist() != work.response_lengths(1).tolist()


def test_flops_are_those_that_are_counted():
    """Eager attention computes all T^2 scores; the rest of the formula is exact."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    work, T = Workload(rows=1, hidden=64, layers=3, heads=2), 17
    config = GPTNeoXConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=256,
                           vocab_size=50304, attn_implementation="eager")  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.arange(T)[None], use_cache=False).logits
    forward = workload.trunk_flops(work, T, causal=False) + workload.head_flops(work, T)
    rotary = 2 * T * 8  # the outer product of positions and frequencies, where it is a matrix product
    assert counter.get_total_flops() == pytest.approx(forward, abs=rotary)
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    assert counter.get_total_flops() == 2 * forward
    # causal: each of T tokens sees itself and those before it
    less = workload.trunk_flops(work, T, causal=False) - workload.trunk_flops(work, T)
    assert less == 3 * 4 * 64 * (T * T - T * (T + 1) / 2)


def test_useful_flops_by_hand():
    work = Workload(rows=1)
    (Q,), (R,), (S,) = work.query_lengths(), work.response_lengths(0), work.response_lengths(1)
    trunk = lambda n: workload.trunk_flops(work, n)
    head = workload.head_flops(work, 1)
    assert workload.useful_flops("sft", work)["training"] == 3 * (trunk(Q + R) + (Q + R - 1) * head)
    assert workload.useful_flops("reward", work)["training"] == 3 * (trunk(Q + R) + trunk(Q + S) - trunk(Q))
    ppo = workload.useful_flops("ppo", work)
    assert ppo["training"] == 12 * (2 * trunk(Q + R) + R * head)
    assert ppo["rollout"] == 4 * trunk(Q + R) + 2 * R * head
    assert workload.real_tokens("ppo", work) == 4 * (Q + R) and workload.real_tokens("reward", work) == Q + R + S


def test_ends_are_forced_where_the_rows_say(folder, monkeypatch):
    """Padded and packed, and in no pass without a cache."""
    import pandas
    from transformers import DynamicCache, GPTNeoXForCausalLM

    from summarize_from_feedback_details import ppo_left_padding as ppo
    from summarize_from_feedback_details.common import sampling
    from summarize_from_feedback_details.common.check_inputs import TokenIds
    from summarize_from_feedback_details.common.noise import episode_keys
    from summarize_from_feedback_details.common.packed_rows import use_packed_attention

    monkeypatch.setattr(GPTNeoXForCausalLM, "forward", GPTNeoXForCausalLM.forward)  # put back after the test
    monkeypatch.setattr(DynamicCache, "batch_select_indices", DynamicCache.batch_select_indices)
    workload.force_ends(folder)
    rows = pandas.read_parquet(folder / "sft" / "train.parquet")
    queries = [ppo.strip_pads(row, workload.PAD) for row in rows["query_token"]]
    model = GPTNeoXForCausalLM.from_pretrained(folder / "policy").eval()
    tokens, R = sampling.pad_rows(queries, workload.PAD, "left"), TINY.response_length
    ids = TokenIds(workload.PAD, workload.EOS, workload.PAD + 1)
    for _ in range(2):
        keys = episode_keys(1, range(4), torch.device("cpu"))
        found, _ = sampling.sample_responses(model, tokens, keys, ids, R, 0.7)
        lengths = [len(ppo.strip_pads(row, workload.PAD)) for row in found]
        assert lengths == rows["reference_response_token_len"].tolist() == TINY.response_lengths(0).tolist()
        assert use_packed_attention(model)
    assert float(model(tokens[:, -1:]).logits.detach().abs().max()) < 100


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_one_run(folder, stage):
    command = [sys.executable, ROOT / "benchmark/one_run.py", "--side", "ours", "--stage", stage, "--folder", folder]
    command += ["--micro", 2, "--updates", 1, "--warm_up", 1, "--count_flops"]
    command += [part for name, value in vars(TINY).items() for part in (f"--work.{name}", value)]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    (seconds,), (phases,) = found["seconds"], found["phases"]
    assert sum(phases.values()) == pytest.approx(seconds) and all(value > 0 for value in phases.values())
    assert set(phases) == {"backward", "optimiser", "forward and the rest", *(["rollout"] if stage == "ppo" else [])}
    useful = sum(workload.useful_flops(stage, TINY).values())
    # no pads: what is computed beyond the useful is attention's upper half, and decoding's masked keys
    assert useful <= found["computed_flops"] < 1.1 * useful
    assert 0.1 < found["peak_gb"] <= found["peak_gb_with_saving"] < 4


def test_one_gpu(tmp_path, capsys):
    """Its smoke size, on a GPU if there is one: cells are measured once, and the report is of the measurements."""
    import gpu

    args = gpu.Args(smoke=True, output_dir=tmp_path)
    found = gpu.main(args)
    (ppo, _, *sampling), text = gpu.SMOKE, (tmp_path / "README.md").read_text()
    assert set(found) == {cell.name for cell in gpu.SMOKE} and not any("failed" in run for run in found.values())
    phases, (seconds,) = found[ppo.name]["phases"][0], found[ppo.name]["seconds"]
    assert set(phases) == set(gpu.PHASES[1:]) and all(value > 0 for value in phases.values())
    rollout = sum(phases[name] for name in ("prefill", "decoding", "scoring"))
    assert (
        f"| {ppo.name} | {seconds:.2f} | {rollout:.2f} | {phases['prefill']:.2f} | {phases['decoding']:.2f} |" in text
    )
    for cell in sampling:
        tokens = 4 * cell.work.response_length / found[cell.name]["seconds"][0]
        assert f"| {cell.name} |" in text and f"| {tokens:.0f} |" in text
    before = (tmp_path / "runs.json").stat().st_mtime_ns
    assert gpu.main(args) == found and (tmp_path / "runs.json").stat().st_mtime_ns == before
    if not torch.cuda.is_available():
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            gpu.main(gpu.Args(output_dir=tmp_path))
        assert stop.value.code == 2 and capsys.readouterr().err.startswith(
            "error: --smoke: found False, and there is no"
        )


def test_cells_of_a_gpu_by_hand():
    """Names tell cells apart; the formula of a cell is benchmark/memory.py's; shares are of what real tokens need."""
    import gpu
    from memory import PYTHIA, Layout, memory

    cells = gpu.cells()
    assert len({cell.name for cell in cells}) == len(cells) and {c.shape for c in cells} == set(gpu.HEADS) - {"tiny"}
    (whole,) = (c for c in cells if c.name == "ppo 1b, 512 rows, ours, micro batch 16")
    layout = Layout("ppo", 16, 370, 40, 64, width=4)
    assert whole.formula() == memory(PYTHIA["1b"], layout)["peak"] and whole.work.hidden == 2048
    (lora,) = (c for c in cells if c.shape == "6.9b")
    assert lora.lora and lora.formula() < 24e9
    phases = dict.fromkeys(gpu.PHASES[1:], 1.0)
    run = {"seconds": [6.0], "phases": [phases], "peak_gb": 10.0}
    flops = workload.useful_flops("ppo", whole.work)["training"]
    machine = {"name": "a card", "torch": "2", "peak_flops": flops / 1.5, "data_sheet_flops": None}
    line = gpu.report({whole.name: run}, cells, machine)[-len(cells) :][cells.index(whole)]
    assert "| 50% | 10.7 |" in line and f"| {workload.real_tokens('ppo', whole.work) / 6:.0f} |" in line
    assert workload.useful_flops("ppo", whole.work, lora=True)["training"] == pytest.approx(flops * 2 / 3)


def test_a_ratio_by_hand():
    import bench

    theirs, ours = [{"seconds": [4.0]}, {"seconds": [6.0]}], [{"seconds": [2.0]}, {"seconds": [2.0]}]
    assert bench.ratio(theirs, ours) == (2.5, 2.0, 3.0)


@pytest.mark.parametrize("file", [f for f in RESULTS if (f.parent / "README.md").exists()], ids=lambda f: f.parent.name)
def test_committed_report_is_made_of_its_measurements(file):
    """Every ratio of the table, and of docs/benchmark.md, from runs.json."""
    import bench

    runs = bench.Runs(file.parent, file.parent)
    text = (file.parent / "README.md").read_text()
    for name, (theirs, ours, *_) in bench.comparisons(runs).items():
        assert len(theirs) == len(ours) >= 3
        value, low, high = bench.ratio(theirs, ours)
        line = f"| {name} | **{value:.2f}x** | {low:.2f} to {high:.2f} |"
        assert line in text and line in (ROOT / "docs/benchmark.md").read_text()
    assert np.isfinite([s for run in runs.found.values() for s in run.get("seconds", [])]).all()
    assert not re.search(r"/(home|root|work|tmp)/", file.read_text() + text)


@pytest.mark.parametrize("file", LONG, ids=lambda file: file.parent.name)
def test_memory_of_long_runs_does_not_grow(file):
    """The committed table is that of its measurements, and the last updates need no more than the first."""
    import bench

    runs = bench.Runs(file.parent, file.parent)
    assert "\n".join(bench.memory_of_long_runs(runs)) in (file.parent / "memory.md").read_text()
    ours = {name: run["peaks_gb"] for name, run in runs.found.items() if name.startswith("long ") and " ours " in name}
    assert {name.split()[1] for name in ours} == {"sft", "reward", "ppo"} and len(ours) == 6  # fp32 and bf16
    assert all(len(p) == 200 and p[199] <= 1.1 * p[19] for p in ours.values())
    assert all(max(p[150:200]) <= 1.1 * max(p[:50]) for p in ours.values())
