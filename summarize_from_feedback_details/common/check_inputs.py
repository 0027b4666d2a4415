"""Refuse bad input before any model is loaded: find datasets, checkpoints and tokenizers, and look at them.

Every function names the argument, what was found and what was expected (see `run_folder.refuse`). They read
configurations, headers and columns, never weights. Nothing here knows about losses or loops.
"""

import json
import math
import os
import unicodedata
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from summarize_from_feedback_details.common.arguments import reason, refuse
from summarize_from_feedback_details.common.dataset_files import EXPECTED, read_folder, refuse_unwritable_cache
from summarize_from_feedback_details.common.hub import find_on_hub

PAD_TOKEN = "[PAD]"
KINDS = {
    "policy": "a causal language model",
    "reward": "a reward model (sequence classification with one label, or the original's ScalarModel)",
}


def find_rows(argument: str, path: str, revision: str | None = None, data_dir: str = ""):
    """Read all splits of a dataset from a folder, or from the hub.

    Args:
        argument: the argument's name, for messages.
        path: folder, or hub id.
        revision: hub revision, or None.
        data_dir: folder inside the hub's dataset.

    Returns:
        datasets.DatasetDict
    """
    import datasets

    here = os.path.isdir(path)
    if os.path.isfile(path):
        refuse(argument, f"'{path}', which is a file", EXPECTED)
    if not here and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        refuse(argument, f"'{path}', which does not exist", EXPECTED)
    if not here:
        find_on_hub(argument, path, revision, "dataset", EXPECTED)
        refuse_unwritable_cache()
    shown, verbosity = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # or it says an error in lines of its own, too
    try:
        if here:
            return read_folder(argument, path)
        return datasets.load_dataset(path, data_dir=data_dir or None, revision=revision)
    except Exception as error:
        where = "that cannot be read" if here else "neither a folder here nor readable on the hub"
        refuse(argument, f"'{path}', {where}: {reason(error)}", EXPECTED)
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()


def load_rows(argument: str, path: str, revision: str | None, kind: str, columns: list[str], splits: list[str]):
    """Load a tokenised dataset from a folder or the hub and check its shape.

    Args:
        argument: the argument's name, for messages.
        path: folder, or hub id.
        revision: hub revision, or None.
        kind: "sft" or "comparisons", for a message when the other one is given.
        columns: needed columns; those of token ids are checked by `check_tokens`; those that end in `_len` must hold
            whole numbers, the others text.
        splits: splits that must exist and hold rows; `validation?` is read where it exists and holds rows.

    Returns:
        split -> datasets.Dataset; other splits are not looked at.
    """
    found = find_rows(argument, path, revision)
    other = {"sft": ("query_chosen_token", "comparisons", "SFT rows"),
             "comparisons": ("query_reference_response_token", "SFT rows", "comparisons")}[kind]  # fmt: skip
    first = next(iter(found.values()))
    missing = [c for c in columns if c not in first.column_names]
    if missing and other[0] in first.column_names:
        refuse(argument, f"'{path}', which holds {other[1]}", other[2])
    optional = [split.removesuffix("?") for split in splits if split.endswith("?")]
    splits = [split for split in splits if not split.endswith("?")]
    for split in splits:
        if split not in found:
            refuse(argument, f"'{path}' with the splits {', '.join(found)}", f"a split '{split}'")
    found = {s: found[s] for s in (*splits, *optional) if s in splits or (s in found and len(found[s]))}
    for split, rows in found.items():
        missing = [c for c in columns if c not in rows.column_names]
        if missing:
            refuse(
                argument, f"'{path}' whose split '{split}' has no column {', '.join(missing)}", "a tokenised dataset"
            )
        if len(rows) == 0:
            refuse(argument, f"'{path}' whose split '{split}' is empty", "at least one row")
        for column in columns:
            if not column.endswith(("_token", "_label")):
                expected = "whole numbers" if column.endswith("_len") else "text"
                _check_type(argument, f"column '{column}' of split '{split}'", rows.data.column(column), expected)
    return found


def _check_type(argument: str, where: str, data: Any, expected: str) -> None:
    """Refuse a column with a hole, or of something else than "whole numbers" or "text"."""
    from pyarrow import compute, types

    is_right = (
        types.is_integer if expected == "whole numbers" else lambda t: types.is_string(t) or types.is_large_string(t)
    )
    if len(data) and (data.null_count or not is_right(data.type)):
        found = f"type {data.type}"
        if is_right(data.type):
            first = compute.index(data.is_null(), True)
            found = f"{data.null_count} rows without a value, the first in row {first} (counted from 0)"
        refuse(argument, f"{where} with {found}", f"{expected} in each row")


def check_tokens(
    argument: str, rows_by_split: dict[str, Any], columns: list[str], vocab_size: int, pad_id: int
) -> dict[str, int]:
    """Refuse token columns that are not whole numbers, differ in length, or do not fit the model's vocabulary.

    Args:
        argument: the argument's name, for messages.
        rows_by_split: split -> datasets.Dataset.
        columns: columns of token ids.
        vocab_size: rows of the model's embedding; ids must be below (the pad id may be any).
        pad_id: id of the pad token in the dataset.

    Returns:
        column -> tokens in its longest row, pads not counted.
    """
    import pyarrow
    import pyarrow.compute as pc

    longest = dict.fromkeys(columns, 0)
    for split, rows in rows_by_split.items():
        for column in columns:
            where = f"column '{column}' of split '{split}'"
            data = rows.data.column(column)
            kind = data.type
            listed = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
            if not listed or not pyarrow.types.is_integer(kind.value_type):
                refuse(argument, f"{where} of type {kind}", "lists of whole numbers (token ids)")
            if len(rows) == 0:
                continue
            lengths = pc.min_max(pc.list_value_length(data)).as_py()
            if data.null_count or lengths["min"] != lengths["max"]:
                found = f"{where} with rows of {lengths['min']} to {lengths['max']} tokens"
                refuse(argument, found, "rows padded to one length")
            ids = pc.unique(pc.list_flatten(data)).to_pylist()
            bad = [i for i in ids if i is None or i < 0 or (i >= vocab_size and i != pad_id)]
            if bad:
                found = f"{where} with token id {bad[0]}"
                refuse(argument, found, f"ids below the model's vocabulary size {vocab_size}, or the pad id {pad_id}")
            for chunk in data.chunks:
                tokens = pc.list_flatten(chunk).to_numpy(zero_copy_only=False).reshape(len(chunk), lengths["max"])
                real = (tokens != pad_id).sum(1)
                if not real.all() and column != "reference_response_token":  # a reference may be empty
                    refuse(argument, f"{where} with {int((real == 0).sum())} rows of pads only", "at least one token")
                longest[column] = max(longest[column], int(real.max(initial=0)))
    return longest


def check_same_tokenizer(argument: str, row: dict, text_column: str, token_column: str, tokenizer: Any) -> None:
    """Refuse a dataset tokenised with another vocabulary: its first row must decode to its own text."""
    ids = [i for i in row[token_column] if i != tokenizer.pad_token_id]
    plain = lambda text: unicodedata.normalize("NFC", text).strip()  # as the Pythia tokenizer normalises
    if plain(tokenizer.decode(ids)) != plain(row[text_column]):
        found = f"rows whose '{token_column}' does not decode to '{text_column}'"
        refuse(argument, found, "a dataset tokenised with the tokenizer of --base_model")


def read_tokenizer(argument: str, path: str, revision: str | None = None):
    """Load a tokenizer as it is; one without an end-of-text token, or with code of its own, is refused."""
    from transformers import AutoTokenizer

    expected, revision = "a folder or hub id of a model with its tokenizer", None if os.path.isdir(path) else revision
    if not os.path.isdir(path):
        find_on_hub(argument, path, revision, "model", expected)
    try:
        # left out, `trust_remote_code` asks at the terminal
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:
        refuse(argument, f"'{path}', whose tokenizer cannot be loaded: {reason(error)}", expected)
    if tokenizer.eos_token_id is None:
        refuse(argument, f"'{path}', whose tokenizer has no end-of-text token", "a tokenizer with an eos_token")
    if tokenizer.eos_token == PAD_TOKEN:
        refuse(argument, f"'{path}', whose end-of-text token is {PAD_TOKEN}", "an eos_token that is no pad")
    return tokenizer


def find_tokenizer(argument: str, path: str, revision: str | None = None):
    """Load a tokenizer and give it a pad token of its own.

    Detail: pad token - `[PAD]` is not the end-of-text token (or the model would never learn to stop) and is not
    resized into the embedding: pads are masked, and replaced by id 0 before a model sees them.
    """
    tokenizer = read_tokenizer(argument, path, revision)
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.padding_side = "right"
    return tokenizer


def _check_weights(argument: str, folder: Path) -> set[str]:
    """Refuse a checkpoint folder whose weights are missing, torn, or only some of them; returns the tensors' names.

    Names are read from safetensors only (an empty set otherwise): a pickle would have to be loaded.
    """
    from safetensors import SafetensorError, safe_open

    files, names = {name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).exists()}, set()
    for index in folder.glob("*.index.json"):
        try:
            files |= set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            refuse(argument, f"'{folder}' with an unreadable {index.name}", "a whole checkpoint")
    absent = sorted(n for n in files if not (folder / n).exists())
    if absent:
        refuse(argument, f"'{folder}' without {', '.join(absent)}", "a whole checkpoint")
    if not files:
        others = sorted(p.name for pattern in ("*.safetensors", "*.bin") for p in folder.glob(pattern))
        found = f"'{folder}' without model.safetensors" + (f", with {', '.join(others)} alone" if others else "")
        refuse(argument, found, "a whole checkpoint")
    for file in sorted(folder / name for name in files):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as weights:  # reads the header and compares it with the size
                    names |= set(weights.keys())
            elif not zipfile.is_zipfile(file):
                raise ValueError("not a whole file")
        except (SafetensorError, OSError, ValueError) as error:
            refuse(argument, f"'{folder}' with a torn {file.name} ({reason(error)})", "a whole checkpoint")
    return names


def refuse_bad_weights(argument: str, path: str, missing: set[str], model: Any = None) -> None:
    """Refuse a checkpoint that lacks weights of its model, or holds NaN or infinity.

    Args:
        missing: names of weights that transformers would draw at random, with a warning.
        model: the loaded model, if it is.
    """
    weights = model.named_parameters() if model is not None else ()
    wrong = [name for name, weight in weights if not all(end.isfinite() for end in weight.detach().aminmax())]
    for how, names in (("without the weights", missing), ("with numbers that are not finite in", wrong)):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            refuse(argument, f"'{path}' {how} {shown}", "a whole checkpoint")


def find_model(argument: str, path: str | None, revision: str | None, kind: str):
    """Find a checkpoint, without loading its weights, and check what it is.

    Args:
        argument: the argument's name, for messages.
        path: folder or hub id.
        revision: hub revision, or None.
        kind: "policy" (causal language model) or "reward" (sequence classification, or the original's ScalarModel).

    Returns:
        The configuration as a dict; for the original's ScalarModel it has the key `base_config`.
    """
    from transformers import PretrainedConfig

    if not path:
        refuse(argument, "nothing", f"a folder or hub id of {KINDS[kind]}")
    if os.path.isfile(path):
        refuse(argument, f"'{path}', which is a file", f"a folder or hub id of {KINDS[kind]}")
    if os.path.isdir(path):
        if not any(Path(path).iterdir()):
            refuse(argument, f"'{path}', an empty folder", f"a checkpoint of {KINDS[kind]}")
        if not (Path(path) / "config.json").exists() and (Path(path) / "adapter_config.json").exists():
            refuse(
                argument,
                f"'{path}', an adapter without its model",
                f"the folder above, where it is merged: {KINDS[kind]}",
            )
        if not (Path(path) / "config.json").exists():
            refuse(argument, f"'{path}' without config.json", f"a checkpoint of {KINDS[kind]}")
    elif path.count("/") > 1 or path.startswith((".", "/", "~")):
        refuse(argument, f"'{path}', which does not exist", f"a folder or hub id of {KINDS[kind]}")
    if not os.path.isdir(path):
        find_on_hub(argument, path, revision, "model", f"a folder or hub id of {KINDS[kind]}")
    try:
        config, _ = PretrainedConfig.get_config_dict(path, revision=None if os.path.isdir(path) else revision)
    except Exception as error:
        where = "with an unreadable config.json" if os.path.isdir(path) else "neither a folder here nor on the hub"
        refuse(argument, f"'{path}', {where}: {reason(error)}", f"a folder or hub id of {KINDS[kind]}")
    architecture = (config.get("architectures") or ["?"])[0]
    is_reward = architecture.endswith("ForSequenceClassification") or "base_config" in config
    is_policy = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    if (kind == "reward" and not is_reward) or (kind == "policy" and not is_policy):
        refuse(argument, f"'{path}', a {architecture}", KINDS[kind])
    if kind == "policy" and not _samples_from_keys_and_values(architecture, config):
        refuse(
            argument,
            f"'{path}', a {architecture}, which does not sample from keys and values alone",
            "an attention model to sample from",
        )
    _check_architecture(argument, path, config.get("base_config") or config)
    names = _check_weights(argument, Path(path)) if os.path.isdir(path) else set()
    if kind == "reward" and "base_config" not in config:
        labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)  # 2 is not written
        if labels != 1:
            refuse(argument, f"'{path}', a classifier of {labels} labels", KINDS[kind])
        if names:
            refuse_bad_weights(argument, path, {"score.weight"} - names)
    return config


def find_models(args: Any, **kinds: str) -> dict[str, dict]:
    """Find the checkpoints that these arguments name, and check that each has the vocabulary of the one before.

    Args:
        kinds: argument -> "policy" or "reward", e.g. `base_model="policy"`; their revisions are the arguments
            `base_model_revision`, and `sft_model_revision` of `sft_model_path`.

    Returns:
        argument -> its configuration, see `find_model`.
    """
    found: dict[str, dict] = {}
    for argument, kind in kinds.items():
        revision = getattr(args, f"{argument.removesuffix('_path')}_revision")
        config = find_model(argument, getattr(args, argument), revision, kind)
        if found:
            partner = next(reversed(found))
            paths = getattr(args, argument), getattr(args, partner)
            check_same_vocabulary(argument, paths[0], config, partner, paths[1], found[partner])
        found[argument] = config
    return found


def load_queries(args: Any, tokenizer: Any, models: dict[str, dict]):
    """The queries and references of --query_dataset, to sample responses to: the splits train and validation.

    Args:
        models: see `find_models`; all of them but --base_model must have room for a query and its response.

    Returns:
        split -> datasets.Dataset
    """
    tokens = ["query_token", "reference_response_token"]
    columns, splits = [*tokens, "query", "reference_response"], ["train", "validation"]
    dataset = load_rows("query_dataset", args.query_dataset, args.dataset_revision, "sft", columns, splits)
    vocab_size = models["base_model"]["vocab_size"]
    longest = check_tokens("query_dataset", dataset, tokens, vocab_size, tokenizer.pad_token_id)
    longest = longest["query_token"] + max(args.response_length, longest["reference_response_token"])
    for name, config in models.items():
        if name != "base_model":
            check_context(name, getattr(args, name), config, longest, "the longest query and its response")
    check_same_tokenizer("query_dataset", dataset["train"][0], "query", "query_token", tokenizer)
    return dataset


def _check_architecture(argument: str, path: str, config: dict) -> None:
    """Refuse what transformers cannot build here, and what it has no reward model for; nothing is loaded."""
    import torch
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoModelForSequenceClassification,
    )

    kind, quantised = config.get("model_type"), config.get("quantization_config")
    if kind not in CONFIG_MAPPING:
        code = "with code of its own (auto_map), which is not run" if "auto_map" in config else f"of model type {kind}"
        refuse(argument, f"'{path}' {code}", "an architecture that transformers holds")
    if quantised:
        method = quantised.get("quant_method", quantised)
        refuse(argument, f"'{path}', quantised ({method})", "weights in full, since all of them are trained")
    try:
        settings = CONFIG_MAPPING[kind].from_dict(config)
        known = type(settings) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(settings) if known else None
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        refuse(argument, f"'{path}', which cannot be built ({why})", "a config.json that works on this machine")
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        found = f"'{path}', of model type {kind}, of which transformers has no reward model to train next"
        refuse(argument, found, "GPT-NeoX, GPT-2, OPT, Llama, Mistral, Qwen, Gemma 1 to 3, Phi, OLMo or the like")


def _samples_from_keys_and_values(architecture: str, config: dict) -> bool:
    """Whether this class of transformers reads keys and values alone; a state (Mamba) would read the pads, too."""
    import inspect

    import transformers

    model = getattr(transformers, architecture, None)
    if model is None:
        return True
    arguments = inspect.signature(model.forward).parameters
    stateful = model._is_stateful or "linear_attention" in (config.get("layer_types") or [])
    return not stateful and not {"past_key_values", "cache"}.isdisjoint(arguments)


def check_same_vocabulary(
    argument: str, path: str, config: dict, partner: str, partner_path: str, partner_config: dict
) -> None:
    """Refuse two checkpoints of different vocabularies: by size, and by tokenizer where both folders have one."""
    size, partner_size = ((c.get("base_config") or c).get("vocab_size") for c in (config, partner_config))
    if size != partner_size:
        refuse(argument, f"'{path}' with a vocabulary of {size}", f"{partner_size}, as --{partner} '{partner_path}'")
    tokens, partner_tokens = tokenizer_vocabulary(path), tokenizer_vocabulary(partner_path)
    if tokens is not None and partner_tokens is not None and tokens != partner_tokens:
        refuse(argument, f"'{path}' with another tokenizer", f"that of --{partner} '{partner_path}'")


def tokenizer_vocabulary(path: str) -> dict[str, int] | None:
    """Token -> id of a local checkpoint's tokenizer, without [PAD]; None where it has none."""
    file = Path(path) / "tokenizer.json"
    if not file.exists():
        return None
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    vocabulary.pop(PAD_TOKEN, None)
    return vocabulary


def context_of(config: dict) -> float:
    """Tokens that a model reads at most; infinite where its configuration names no limit."""
    config = config.get("base_config") or config
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    return next((config[name] for name in names if config.get(name)), math.inf)


def check_context(argument: str, path: str, config: dict, longest: int, what: str) -> None:
    """Refuse rows that are longer than a model's context."""
    context = context_of(config)
    if longest > context:
        refuse(argument, f"'{path}' with a context of {context} tokens", f"at least {longest}: {what}")


class TokenIds(NamedTuple):
    """The ids that mean something to sampling and to masks."""

    pad: int
    stop: int  # ends a response
    vocab_size: int  # ids from here on are not in the tokenizer, and never drawn


def find_ids(truncate_token: str, tokenizer: Any) -> TokenIds:
    """Ids of a tokenizer with a pad; a response ends with `truncate_token`: `eos`, or a text that is one token."""
    if truncate_token == "eos":
        return TokenIds(tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer))
    ids = tokenizer.encode(truncate_token, add_special_tokens=False)
    if len(ids) != 1:
        refuse("truncate_token", f"{truncate_token!r}, which is {len(ids)} tokens", "`eos` or the text of one token")
    if ids[0] == tokenizer.pad_token_id:
        refuse("truncate_token", f"{truncate_token!r}, which is never drawn", "`eos` or the text of another token")
    return TokenIds(tokenizer.pad_token_id, ids[0], len(tokenizer))
