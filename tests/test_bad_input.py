"""Bad input is refused before any model is loaded: one line that names the argument, exit code 2, nothing written."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
from conftest import OFFLINE, STAGES, launch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from summarize_from_feedback_details import ppo_left_padding, reward, sft
from summarize_from_feedback_details.common.arguments import DROPPED, refuse_dropped
from summarize_from_feedback_details.ppo_left_padding import PpoHParams

MODULES = {"sft": sft, "reward": reward, "ppo": ppo_left_padding}
ROWS = "query_reference_response_token"  # a token column that SFT and the reward model read
# every token column that a stage reads
READ = {
    ("sft", "query_dataset"): ("query_token", ROWS, f"{ROWS}_response_label"),
    ("reward", "label_dataset"): ("query_token", "query_chosen_token", "query_rejected_token"),
    ("reward", "query_dataset"): ("query_token", ROWS),
    ("ppo", "query_dataset"): ("query_token", "reference_response_token"),
}
# what a config.json may ask for: changes, and what is said
CONFIGS = {
    "custom": ({"model_type": "xyz", "auto_map": {"AutoConfig": "xyz.XyzConfig"}}, "with code of its own (auto_map)"),
    "unknown": ({"model_type": "xyz"}, "of model type xyz; expected an architecture that transformers holds"),
    "four_bits": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
                  "quantised (bitsandbytes); expected weights in full"),
    "attention": ({"attn_implementation": "flash_attention_9"}, "which cannot be built (ValueError: Specified `attn_"),
    "heads": ({"num_attention_heads": 5}, "divisible by the number of attention heads"),
}  # fmt: skip
if find_spec("flash_attn") is None:
    CONFIGS["flash"] = ({"attn_implementation": "flash_attention_2"}, "package for FlashAttention2 doesn't seem to be")


def rewrite(source: str, folder: Path, change, drop: str | None = None) -> str:
    """A few rows of a tokenised dataset with `change(split, row)` applied, or without a split."""
    for split, rows in datasets.load_dataset(source).items():
        if split == drop:
            continue
        rows = [change(split, dict(row)) for row in rows.select(range(4))]
        nested = ("info", "summaries", "extra")  # their nulls would get other types in each split
        rows = [{k: v for k, v in row.items() if k not in nested} for row in rows if row is not None]
        kept = datasets.Dataset.from_list(rows) if rows else datasets.load_dataset(source)[split].select([])
        (folder / "data").mkdir(parents=True, exist_ok=True)
        kept.to_parquet(folder / f"data/{split}-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def bad(world, tmp_path_factory):
    """Everything that can be wrong with a folder, made once."""
    root, found = tmp_path_factory.mktemp("bad"), {}
    pad_id = AutoTokenizer.from_pretrained(world.sft).pad_token_id

    def second(name, value):  # of the second row that is asked for
        calls = itertools.count()
        return lambda split, row: row | {name: value(row[name])} if next(calls) == 1 else row

    def column(name, value):
        return lambda split, row: row | {name: value(row[name])}

    for kind, source, token in (("sft", world.sft_rows, "query_token"), ("pairs", world.pairs, "query_chosen_token")):
        make = lambda name, change, drop=None, s=source, k=kind: found.__setitem__(
            f"{k}_{name}", rewrite(s, root / f"{k}_{name}", change, drop)
        )
        make("no_column", lambda split, row, t=token: {k: v for k, v in row.items() if k != t})
        make("empty_split", lambda split, row: None if split == "train" else row)
        make("no_split", lambda split, row: row, "validation")
        for read in {
            c for (_, a), columns in READ.items() if (a == "label_dataset") == (kind == "pairs") for c in columns
        }:
            make(f"strings {read}", column(read, lambda v: [str(i) for i in v]))
            calls = itertools.count()
            make(f"ragged {read}", column(read, lambda v, calls=calls: v + [1] * (next(calls) % 2)))
            make(f"large_ids {read}", column(read, lambda v: v[:-1] + [10**6]))
            make(f"negative_ids {read}", column(read, lambda v: v[:-1] + [-7]))
            make(f"hole {read}", second(read, lambda v: None))
            make(f"pads_only {read}", second(read, lambda v: [pad_id] * len(v)))
        make("no_text", second("query", lambda v: None))
        length = {"sft": ROWS, "pairs": "query_chosen_token"}[kind] + "_len"
        make("text_length", column(length, str))
        make("other_vocabulary", column("query_token", lambda v: [(i + 5) % 300 for i in v]))
    (root / "empty").mkdir()
    found["empty"] = str(root / "empty")
    (root / "file").write_text("x")
    found["file"] = str(root / "file")
    (root / "full").mkdir()
    (root / "full/notes.txt").write_text("x")
    found["full"] = str(root / "full")
    for name, source in (("sft", world.sft), ("reward", world.reward)):
        faults = "context no_config garbage torn zeros shard lone_shard adapter vocabulary tokenizer two_labels no_head"
        for fault in faults.split():
            folder = root / f"{name}_{fault}"
            shutil.copytree(source, folder)
            weights, config = folder / "model.safetensors", folder / "config.json"
            if fault == "context":
                config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 40}))
            elif fault == "no_config":
                config.unlink()
            elif fault == "garbage":
                config.write_text("{not json")
            elif fault == "torn":
                weights.write_bytes(weights.read_bytes()[:-1000])
            elif fault == "zeros":
                weights.write_bytes(bytes(weights.stat().st_size))
            elif fault == "shard":
                weights.unlink()
                index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
                (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            elif fault == "lone_shard":
                weights.rename(folder / "model-00001-of-00002.safetensors")
            elif fault == "adapter":
                weights.rename(folder / "adapter_model.safetensors")
            elif fault == "two_labels" and name == "reward":  # transformers does not write the labels of two
                AutoModelForSequenceClassification.from_pretrained(source, num_labels=2, ignore_mismatched_sizes=True
                                                                   ).save_pretrained(folder)  # fmt: skip
                assert "id2label" not in json.loads(config.read_text())
            elif fault == "no_head":
                save_file({k: v for k, v in load_file(weights).items() if k != "score.weight"}, weights)
            elif fault == "vocabulary":
                config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 77}))
            elif fault == "tokenizer":
                tokenizer = AutoTokenizer.from_pretrained(source)
                tokenizer.add_tokens(["zebra"])
                tokenizer.save_pretrained(folder)
            found[f"{name}_{fault}"] = str(folder)
        for fault, (change, _) in CONFIGS.items():
            shutil.copytree(source, root / f"{name}_{fault}")
            config = root / f"{name}_{fault}" / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | change))
            found[f"{name}_{fault}"] = str(config.parent)
    shutil.copytree(world.sft, root / "pad_is_eos")
    AutoTokenizer.from_pretrained(world.sft, eos_token="[PAD]").save_pretrained(root / "pad_is_eos")
    found["pad_is_eos"] = str(root / "pad_is_eos")
    for name, change in (("scalar", {}), ("scalar_vocabulary", {"vocab_size": 77})):  # as the original wrote them
        shutil.copytree(world.reward, root / name)
        base = json.loads((root / name / "config.json").read_text()) | change
        config = {
            "architectures": ["ScalarModel"],
            "base_config": base,
            "bias": 0.0,
            "hidden_size": base["hidden_size"],
        }
        (root / name / "config.json").write_text(json.dumps(config))
        found[name] = str(root / name)
    for architecture in ("Mamba", "RecurrentGemma"):
        shutil.copytree(world.sft, root / architecture)
        config = root / architecture / "config.json"
        config.write_text(
            json.dumps(json.loads(config.read_text()) | {"architectures": [f"{architecture}ForCausalLM"]})
        )
        found[architecture] = str(root / architecture)
    return found


def dataset_cases(stage: str, argument: str, kind: str):
    other = "sft_rows" if kind == "pairs" else "pairs"
    expected = {"no_column": "column", "empty_split": "empty", "other_vocabulary": "does not decode",
                "no_text": "without a value", "text_length": "whole numbers in each row"}  # fmt: skip
    faults = {"strings": "whole numbers", "ragged": "one length", "large_ids": "1000000", "negative_ids": "-7",
              "hole": "one length", "pads_only": "pads only"}  # fmt: skip
    yield stage, argument, lambda w, b: "no/such/folder", "does not exist"
    yield stage, argument, lambda w, b: "nobody/nothing", "offline"
    yield stage, argument, lambda w, b: b["empty"], "empty folder"
    yield stage, argument, lambda w, b: b["file"], "which is a file"
    yield stage, argument, lambda w, b: getattr(w, other), "holds"
    if stage == "ppo":  # which does not read that column
        del expected["text_length"]
    for name, words in expected.items():
        yield stage, argument, lambda w, b, n=name: b[f"{kind}_{n}"], words
    for read, (fault, words) in itertools.product(READ[stage, argument], faults.items()):
        if (read, fault) != ("reference_response_token", "pads_only"):  # a reference may be empty
            yield stage, argument, lambda w, b, n=f"{fault} {read}": b[f"{kind}_{n}"], words
    if not (stage == "reward" and kind == "sft"):
        yield stage, argument, lambda w, b: b[f"{kind}_no_split"], "validation"


def checkpoint_cases(stage: str, argument: str, kind: str):
    yield stage, argument, lambda w, b: "no/such/folder", "does not exist"
    yield stage, argument, lambda w, b: "nobody/nothing", "offline"
    yield stage, argument, lambda w, b: b["empty"], "empty folder"
    yield stage, argument, lambda w, b: b["file"], "which is a file"
    yield stage, argument, lambda w, b: w.sft if kind == "reward" else w.reward, "found"
    if kind == "sft":
        yield stage, argument, lambda w, b: b["Mamba"], "does not sample from keys and values alone"
        yield stage, argument, lambda w, b: b["RecurrentGemma"], "does not sample from keys and values alone"
        yield stage, argument, lambda w, b: b["scalar"], "a ScalarModel"
        if argument == "base_model":
            yield stage, argument, lambda w, b: b["pad_is_eos"], "whose end-of-text token is [PAD]"
    else:
        yield stage, argument, lambda w, b: b["scalar_vocabulary"], "vocabulary of 77"
    if argument != "base_model" or stage == "sft":  # which reads no row otherwise
        yield stage, argument, lambda w, b: b[f"{kind}_context"], "a context of 40 tokens; expected at least"
    expected = {
        "no_config": "config.json",
        "garbage": "config.json",
        "torn": "torn",
        "zeros": "torn",
        "shard": "without",
        "lone_shard": "without model.safetensors, with model-00001-of-00002.safetensors alone",
        "adapter": "without model.safetensors, with adapter_model.safetensors alone",
    } | {fault: words for fault, (_, words) in CONFIGS.items()}
    if kind == "reward":
        expected |= {"two_labels": "a classifier of 2 labels", "no_head": "without the weights score.weight"}
    if argument != "base_model":
        expected |= {"vocabulary": "vocabulary of 77", "tokenizer": "another tokenizer"}
    for fault, words in expected.items():
        yield stage, argument, lambda w, b, f=fault: b[f"{kind}_{f}"], words


def value_cases():
    for stage in MODULES:
        positive = (
            "eps local_micro_batch_size batch_size total_episodes num_updates local_eval_batch_size num_eval_rows"
        )
        for name in f"{positive} max_grad_norm gradient_accumulation_steps".split():
            for value in (0, -1):
                yield stage, name, value, "more than 0"
        for name in ("lr", "weight_decay", "warm_up_steps", "eval_freq", "print_sample_output_freq"):
            yield stage, name, -1, "at least 0"
        for name in ("lr", "eps", "weight_decay"):
            yield stage, name, math.nan, "found nan"
        yield stage, "lr", math.inf, "found inf"
        yield stage, "scheduler", "zigzag", "one of linear, cosine"
        yield stage, "batch_size", 7, "multiple of"
        yield stage, "gradient_accumulation_steps", 3, "expected 2 (--batch_size 8 / "
        yield stage, "world_size", 2, "expected 1"
        yield stage, "run_name", "a/b", "plain folder name"
        yield stage, "seed", -1, "at least 0"
        for folder in ("runs", "runs/model", "runs/../runs/model", "runs/model/checkpoints/policy", "."):
            yield stage, "output_dir", folder, "where the run itself is kept"
        yield stage, "output_dir", lambda w, b: b["full"], "another run's results"
        yield stage, "output_dir", lambda w, b: b["file"], "which is a file"
        yield stage, "output_dir", lambda w, b: b["file"] + "/below", "cannot be"
        yield stage, "push_to_hub", True, "no hub login"
        yield stage, "deepspeed", True, "a launch without DeepSpeed"
    for stage in ("sft", "reward"):
        yield stage, "total_episodes", 10**6, "at most"
        yield stage, "num_updates", 1000, "32 episodes / 8"
        yield stage, "num_train_epochs", 0, "more than 0"
    yield "reward", "num_normalization_rows", 0, "more than 0"
    for stage in ("sft", "ppo"):
        yield stage, "response_length", 0, "more than 0"
        yield stage, "truncate_token", "two words", "tokens"
        yield stage, "truncate_token", "[PAD]", "never drawn"
    yield "sft", "temperature", -0.1, "at least 0"
    yield "sft", "query_loss_weight", -1.0, "at least 0"
    yield "ppo", "temperature", 0.0, "more than 0"
    yield "ppo", "eval_temperature", -1.0, "at least 0"
    for folder in (".", "model", "model/value"):  # the policy's folder is `model`
        yield "ppo", "value_output_dir", folder, "--output_dir" if folder != "." else "where the run itself is kept"
    yield "ppo", "nminibatches", 0, "more than 0"
    yield "ppo", "local_rollout_forward_batch_size", 0, "more than 0"
    yield "ppo", "total_episodes", 7, "at least one batch"
    yield "ppo", "total_episodes", 10**15, "at most 1,000,000,000"
    rates = (("gamma", 1.1), ("gamma", -0.1), ("lam", 2.0), ("lam", math.nan))
    others = (("kl_coef", -1.0), ("vf_coef", -1.0), ("cliprange", 0.0), ("cliprange_value", -1.0), ("noptepochs", 0))
    for name, value in rates + others:
        yield "ppo", f"ppo.{name}", value, f"found {value}"


CASES = [
    *dataset_cases("sft", "query_dataset", "sft"),
    *dataset_cases("reward", "label_dataset", "pairs"),
    *dataset_cases("reward", "query_dataset", "sft"),
    *dataset_cases("ppo", "query_dataset", "sft"),
    *checkpoint_cases("sft", "base_model", "sft"),
    *checkpoint_cases("reward", "base_model", "sft"),
    *checkpoint_cases("reward", "sft_model_path", "sft"),
    *checkpoint_cases("ppo", "base_model", "sft"),
    *checkpoint_cases("ppo", "sft_model_path", "sft"),
    *checkpoint_cases("ppo", "reward_model_path", "reward"),
    *value_cases(),
]


def listing(*folders: Path) -> list[str]:
    return sorted(str(p) for folder in folders for p in folder.rglob("*"))


@pytest.mark.parametrize(
    "stage, argument, value, words",
    CASES,
    ids=[f"{i}-{stage}-{argument}" for i, (stage, argument, _, _) in enumerate(CASES)],
)
def test_refused(stage, argument, value, words, world, bad, workdir, monkeypatch, capsys):
    module = MODULES[stage]

    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    for model in (AutoModelForCausalLM, AutoModelForSequenceClassification):  # the classes, whoever imports them
        monkeypatch.setattr(model, "from_pretrained", loaded)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    args = getattr(world, f"{stage}_args")(workdir / "model")
    if stage != "ppo":
        args = replace(args, num_train_epochs=1)
    value = value(world, bad) if callable(value) else value
    if argument.startswith("ppo."):
        args = replace(args, ppo=replace(PpoHParams(), **{argument.removeprefix("ppo."): value}))
    else:
        args = replace(args, **{argument: value})
    before = listing(workdir, world.folder)
    with pytest.raises(SystemExit) as stopped:
        module.main(args)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith(f"error: --{argument}: found ") and "; expected " in lines[0], lines
    assert words in lines[0], lines
    assert listing(workdir, world.folder) == before


def test_a_finished_or_different_run_is_not_overwritten(world, workdir, capsys):
    args = world.sft_args(workdir / "model", total_episodes=8, run_eval=False)
    sft.main(replace(args))
    metrics = (workdir / "runs/model/metrics.jsonl").read_bytes()
    for change, words in (({}, "a finished run"), ({"output_dir": str(workdir / "b"), "lr": 0.5}, "a finished run")):
        args_again = replace(args, **({"output_dir": str(workdir / "b")} | change))
        with pytest.raises(SystemExit) as stopped:
            sft.main(args_again)
        assert stopped.value.code == 2 and words in capsys.readouterr().err
    summary = workdir / "runs/model/summary.json"
    summary.write_text(summary.read_text().replace('"finished"', '"running"'))  # as a killed run leaves it
    with pytest.raises(SystemExit):
        sft.main(replace(args, output_dir=str(workdir / "b"), lr=0.5))
    error = capsys.readouterr().err
    assert "--lr (0.001 there, 0.5 now)" in error and "output_dir" not in error  # that may change
    assert (workdir / "runs/model/metrics.jsonl").read_bytes() == metrics and not (workdir / "b").exists()


def test_results_that_came_in_the_meantime_stay(world, workdir, monkeypatch, capsys):
    """Another run writes the same output folder first: it stays, and this one goes on with another folder."""
    args, save = world.sft_args(workdir / "model", total_episodes=8, run_eval=False), sft.save_model

    def late(*given):
        (workdir / "model").mkdir(exist_ok=True)
        (workdir / "model/other.txt").write_text("of another run")
        save(*given)

    monkeypatch.setattr(sft, "save_model", late)
    with pytest.raises(SystemExit, match="now holds another run's results, and they stay"):
        sft.main(replace(args))
    assert [p.name for p in (workdir / "model").iterdir()] == ["other.txt"]
    assert not [p for p in workdir.iterdir() if p.name.startswith(".")]
    monkeypatch.setattr(sft, "save_model", save)
    capsys.readouterr()
    sft.main(replace(args, output_dir=str(workdir / "elsewhere")))
    assert "going on from" in capsys.readouterr().out and (workdir / "elsewhere/model.safetensors").exists()
    assert (workdir / "model/other.txt").exists()


def test_two_processes_do_not_share_a_run(world, workdir, capsys):
    """The second is refused while the first goes on; its files are not touched."""
    import fcntl

    args = world.sft_args(workdir / "model", total_episodes=8, run_eval=False)
    sft.main(replace(args))
    shutil.rmtree(workdir / "model")
    summary = workdir / "runs/model/summary.json"
    summary.write_text(summary.read_text().replace('"finished"', '"running"'))
    with open(workdir / "runs/model/lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            sft.main(replace(args))
    assert "still goes on" in capsys.readouterr().err and summary.exists()


@pytest.mark.parametrize(
    "stage, argument", [("sft", "base_model"), ("reward", "sft_model_path"), ("ppo", "sft_model_path")]
)
def test_a_checkpoint_without_some_weights(stage, argument, world, workdir, capsys):
    """Nothing is drawn at random in their place: known when the model is read, so the run's folder is there."""
    shutil.copytree(world.sft, "partial")
    weights = load_file("partial/model.safetensors")
    del weights["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"]
    save_file(weights, "partial/model.safetensors")
    with pytest.raises(SystemExit) as stopped:
        MODULES[stage].main(getattr(world, f"{stage}_args")(workdir / "model", **{argument: "partial"}))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and not (workdir / "model").exists()
    assert error.startswith(f"error: --{argument}: found 'partial' without the weights gpt_neox.layers.0.mlp"), error


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize(
    "stage, argument",
    [("sft", "base_model"), ("reward", "sft_model_path"), ("ppo", "sft_model_path"), ("ppo", "reward_model_path")],
)
def test_a_checkpoint_with_a_weight_that_is_not_finite(stage, argument, number, world, workdir, capsys):
    """One number of a token that no row may hold is enough; known when the model is read, before training."""
    shutil.copytree(world.reward if argument == "reward_model_path" else world.sft, "broken")
    weights = load_file("broken/model.safetensors")
    weights["gpt_neox.embed_in.weight"][-1, -1] = number
    save_file(weights, "broken/model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit) as stopped:
        MODULES[stage].main(getattr(world, f"{stage}_args")(workdir / "model", **{argument: "broken"}))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and not (workdir / "model").exists()
    found = "found 'broken' with numbers that are not finite in gpt_neox.embed_in.weight; expected"
    assert error.startswith(f"error: --{argument}: {found}"), error


# what the original's command lines may hold (its Args of 2024) and these scripts do not
ORIGINAL = {
    "sft": "cuda load_from_cache_file truncate_token_id hf_repo_url label_dataset sft_model_path reward_model_path"
    " micro_batch_size local_batch_size",
    "reward": "cuda load_from_cache_file truncate_token_id hf_repo_url response_length truncate_token temperature"
    " micro_batch_size local_batch_size",
    "ppo": "cuda load_from_cache_file truncate_token_id hf_repo_url num_train_epochs ppo.nminibatches reward.kl_coef"
    " reward.use_adaptive_kl reward.adaptive_kl.target reward.adaptive_kl.horizon reward.dataset_std"
    " micro_batch_size local_mini_batch_size mini_batch_size local_batch_size",
}


@pytest.mark.parametrize("stage", MODULES)
def test_dropped_arguments_say_what_to_use(stage, capsys):
    arguments = MODULES[stage].Args
    dropped = {name: DROPPED[name] for name in DROPPED.keys() - {f.name for f in fields(arguments) if f.init}}
    assert set(ORIGINAL[stage].split()) <= set(dropped)
    for name, instead in dropped.items():
        group, _, field = name.rpartition(".")
        no = f"--{group}.no-{field}" if group else f"--no-{field}"
        for spelling in (f"--{name}", f"--{name.replace('_', '-')}=1", no):
            with pytest.raises(SystemExit) as stopped:
                refuse_dropped(["--lr", "1", spelling], arguments)
            assert stopped.value.code == 2
            assert instead in capsys.readouterr().err
    refuse_dropped(["--lr", "1", "--seed=3", "--batch_size", "8"], arguments)


@pytest.mark.parametrize(
    "command",
    [
        ["sft.py", "--cuda"],
        ["sft.py", "--base_model", "nobody/nothing"],
        ["reward.py", "--label_dataset", "no/such/folder", "--base_model", "nobody/nothing"],
        ["ppo_left_padding.py", "--ppo.lam", "3"],
    ],
)
def test_a_command_line_ends_in_one_line(command, tmp_path):
    command = [sys.executable, str(STAGES / command[0]), *command[1:]]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | OFFLINE, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: --") and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command", [["--base_model", "nobody/nothing"], ["--query_dataset", "nobody/nothing", "--base_model", "HERE"]]
)
def test_without_a_network_it_is_said_at_once(command, world, tmp_path):
    """One request and one line; the libraries' own retries would take half a minute."""
    command = [world.base if word == "HERE" else word for word in command]
    env = (
        os.environ | OFFLINE | {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    )
    command = [sys.executable, str(STAGES / "sft.py"), *command]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "no network to look for it on the hub (offline)" in done.stderr and not list(tmp_path.iterdir())


def test_deepspeed_without_zero_is_refused(world, workdir):
    done = launch("sft", world.sft_args(workdir / "model", deepspeed=True), workdir, zero=0)
    assert done.returncode != 0 and "error: --deepspeed: found zero_stage 0; expected 1, 2 or 3" in done.stderr
    assert not (workdir / "runs").exists()


def test_unknown_argument(tmp_path):
    done = subprocess.run(
        [sys.executable, str(STAGES / "sft.py"), "--no_such_thing", "1"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "no_such_thing" in done.stderr + done.stdout
