"""Real rows at the real lengths: the dataset, then a few updates of each stage with a tiny GPT-NeoX over 50,304 ids."""

import json
import subprocess
import sys

import pandas
import pytest
import torch
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from summarize_from_feedback_details import ppo_left_padding, reward, sft, tldr_dataset


@pytest.fixture(scope="module")
def real(shared, tmp_path_factory):
    """Tokenised real rows (query 512, response 53, ...) and a random base model with Pythia's vocabulary."""
    folder = tmp_path_factory.mktemp("real")
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizer")
    torch.manual_seed(0)
    config = GPTNeoXConfig(vocab_size=50304, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                           intermediate_size=64, max_position_embeddings=2048)  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    tldr_dataset.main(
        tldr_dataset.Args(
            base_model=str(folder / "base"), sft_dataset=str(shared / "tldr/posts"),
            preference_dataset=str(shared / "tldr/comparisons"), output_dir=str(folder / "data"),
            visuals_dir=str(folder / "visuals"), check_length_correctness=False,
        )
    )  # fmt: skip
    return folder


COMMON = {
    "lr": 1e-4,
    "precision": "fp32",
    "print_sample_output_freq": 0,
    "num_eval_rows": 6,
    "local_eval_batch_size": 6,
}


@pytest.mark.slow
def test_every_stage_on_real_rows(real, workdir):
    base, data = str(real / "base"), str(real / "data")
    found = sft.main(sft.Args(base_model=base, query_dataset=f"{data}/sft", output_dir="sft", run_name="sft",
                              batch_size=8, local_micro_batch_size=4, num_updates=3, **COMMON))  # fmt: skip
    assert found["validation/sft/loss"] < 10.9  # ln 50304 = 10.83
    found = reward.main(
        reward.Args(
            base_model=base, sft_model_path="sft", label_dataset=f"{data}/comparisons", query_dataset=f"{data}/sft",
            output_dir="rm", run_name="rm", batch_size=4, local_micro_batch_size=4, num_updates=2,
            num_normalization_rows=8, **COMMON,
        )
    )  # fmt: skip
    assert abs(found["eval/rm/demonstrations/after/mean"]) < 1e-6 and found["eval/rm/validation/pairs"] == 6
    found = ppo_left_padding.main(
        ppo_left_padding.Args(
            base_model=base, sft_model_path="sft", reward_model_path="rm", query_dataset=f"{data}/sft",
            output_dir="ppo", run_name="ppo", batch_size=4, local_micro_batch_size=2, num_updates=2, **COMMON,
        )
    )  # fmt: skip
    lines = [json.loads(line) for line in (workdir / "runs/ppo/metrics.jsonl").read_text().splitlines()]
    # an untrained policy writes all 53 tokens and no EOS: the score is set to -1
    assert lines[0]["objective/response_length"] > 40 and lines[0]["objective/scores"] == pytest.approx(-1, abs=0.5)
    assert lines[0]["policy/first_pass_ratio_error"] < 1e-3
    table = pandas.read_parquet("runs/ppo/tables/validation.parquet")
    assert len(table) == 6 and table["query"].str.startswith("SUBREDDIT: r/").all()


def test_dataset_script_runs_as_a_command(real):
    done = subprocess.run([sys.executable, tldr_dataset.__file__, "--base_model", str(real / "base"), "--sft_dataset",
                           "nothing/here"], capture_output=True, text=True, cwd=real)  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: --sft_dataset")
