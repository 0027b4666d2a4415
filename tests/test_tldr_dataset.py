"""tldr_dataset.py: OpenAI's query preprocessing, the columns, the files, and what is refused."""

import gzip
import json
import os
import random
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from summarize_from_feedback_details import tldr_dataset
from summarize_from_feedback_details.tldr_dataset import (
    Args,
    TaskQueryHParams,
    TldrHParams,
    candidate_cuts,
    cnndm_defaults,
    encode,
    main,
    process_query,
    tokenise_comparisons,
    tokenise_sft,
)

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared with golden numbers and real rows")
TEXT = "A post about my cousin and the lawnmower.\n\nIt is naïve, isn't it? We moved to the town 🙂.\n TL;DR: r/tifu\n"


@pytest.fixture(scope="session")
def toy_tokenizer(tmp_path_factory) -> str:
    """A byte-level BPE of 400 tokens with an end-of-text token, as a folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def tokenizer(toy_tokenizer):
    """The real tokenizer where it is, else the toy one; with the pad token that the stages add."""
    real = SHARED / "tokenizer"
    encoder = AutoTokenizer.from_pretrained(real if real.is_dir() else toy_tokenizer)
    encoder.add_special_tokens({"pad_token": "[PAD]"})
    return encoder


# ------------------------------------------------------------------------------------------- OpenAI's preprocessing
def sequential(info: dict, encoder, hparams: TaskQueryHParams) -> list[int]:
    """The rule as it is stated, one cut after the other: quadratic, and obviously right."""
    info = dict(info)
    while len(tokens := encode(encoder, [hparams.format_str.format(**info)])[0]) > hparams.length:
        text = info[hparams.truncate_field]
        if not text:
            raise ValueError("Could not truncate enough!")
        found = text.rfind(hparams.truncate_text) if hparams.truncate_text else -1
        info[hparams.truncate_field] = text[:found] if found >= 0 else text[:-1]
    return tokens


@needs_shared
def test_golden_queries(tokenizer):
    golden = json.loads((SHARED / "golden/process_query.json").read_text())
    assert tokenizer.pad_token_id == golden["pad_token_id"]
    for case in golden["cases"]:
        hparams = TaskQueryHParams(**golden[case["task"]])
        if "error" in case:
            with pytest.raises(ValueError) as error:
                process_query(case["input"], encoder=tokenizer, hparams=hparams)
            assert f"ValueError: {error.value}" == case["error"]
        else:
            found = process_query(case["input"], encoder=tokenizer, hparams=hparams)
            assert found["query_token"] == [tokenizer.pad_token_id] * case["n_pad"] + case["tokens"]
            assert found["query_token_len"] == len(case["tokens"])


PIECES = [
    "word",
    " word",
    "cousin ",
    "internationalization",
    "a",
    "/",
    "=",
    "-_",
    ".",
    "1",
    "\n",
    "\n\n",
    " \n",
    "  ",
    "\t",
] + [
    "🙂",
    "👩‍👧",
    "é",
    "e\u0301",
    "\u0302\u0323",
    "\u1112\u1161\u11ab",
    "漢字",
    "\u200b",
    "{post}",
    "<|endoftext|>",
    "'s",
]


def random_post(rng: random.Random, pieces: list[str]) -> str:
    repeats = [1, 1, 1, 1, 2, 5, 40]
    return "".join(rng.choice(pieces) * rng.choice(repeats) for _ in range(rng.randrange(1, 45)))


@pytest.mark.parametrize("seed", range(4))
def test_truncation_equals_the_sequential_rule(tokenizer, seed):
    """Newlines and none, emoji, combining characters, runs: the very tokens of the stated rule, or its error."""
    rng = random.Random(seed)
    truncated = 0
    for _ in range(30):
        pieces = rng.sample(PIECES, rng.randrange(1, 8))
        if rng.random() < 0.5:
            pieces = [piece for piece in pieces if "\n" not in piece] or ["x"]
        info = {"subreddit": "tifu", "title": random_post(rng, ["a", " b"])[:30], "post": random_post(rng, pieces)}
        truncate_text = rng.choice(["\n", "\n", "\n\n", "", " "])
        hparams = TaskQueryHParams(length=rng.randrange(20, 90), truncate_text=truncate_text)
        try:
            expected = sequential(info, tokenizer, hparams)
        except ValueError:
            with pytest.raises(ValueError, match="Could not truncate enough!"):
                process_query(info, encoder=tokenizer, hparams=hparams)
            continue
        found = process_query(info, encoder=tokenizer, hparams=hparams)
        n_pad = hparams.length - len(expected)
        assert found["query_token"] == [tokenizer.pad_token_id] * n_pad + expected, info
        truncated += len(expected) < len(encode(tokenizer, [hparams.format_str.format(**info)])[0])
    assert truncated > 5


def test_candidate_cuts_are_those_of_the_rule():
    for text, cut_at in (("ab\ncd\ne", "\n"), ("\n\n\nx\n\n", "\n\n"), ("abc", "\n"), ("abc\n", ""), ("", "\n")):
        expected, rest = [len(text)], text
        while rest:
            found = rest.rfind(cut_at) if cut_at else -1
            rest = rest[:found] if found >= 0 else rest[:-1]
            expected.append(len(rest))
        assert list(candidate_cuts(text, cut_at)) == expected


@pytest.mark.parametrize("unit", ["word ", "a", "some words, then a line\n", "🙂"])
def test_tokenised_characters_do_not_grow_with_the_square_of_the_post(tokenizer, monkeypatch, unit):
    counted = 0
    original = tldr_dataset.encode

    def counting(encoder, texts):
        nonlocal counted
        counted += sum(map(len, texts))
        return original(encoder, texts)

    monkeypatch.setattr(tldr_dataset, "encode", counting)
    costs = []
    for size in (20_000, 1_000_000):
        counted = 0
        info = {"subreddit": "a", "title": "b", "post": unit * (size // len(unit))}
        process_query(info, encoder=tokenizer, hparams=TaskQueryHParams())
        costs.append(counted)
    assert costs[1] < costs[0] * 1.5 + 20_000  # fifty times the post, (nearly) the same work
    assert costs[1] < 1_000_000


def test_padding_sides_and_spaces(tokenizer):
    info, base = {"subreddit": "a", "title": "b", "post": "c"}, TaskQueryHParams(length=64)
    tokens = encode(tokenizer, [base.format_str.format(**info)])[0]
    space = encode(tokenizer, [" "])[0]
    n_pad = 64 - len(tokens)
    for changes, expected in (
        ({}, [tokenizer.pad_token_id] * n_pad + tokens),
        ({"pad_side": "right"}, tokens + [tokenizer.pad_token_id] * n_pad),
        ({"padding": "empty_space"}, space * n_pad + tokens),
    ):
        assert process_query(info, encoder=tokenizer, hparams=replace(base, **changes))["query_token"] == expected


# --------------------------------------------------------------------------------------------------------- columns
def sft_row(**changes) -> dict:
    return {"id": "t3_1", "subreddit": "tifu", "title": "Hi", "post": "A post.", "summary": "short"} | changes


def comparison(**changes) -> dict:
    info = {"id": "t3_1", "post": "A post.", "title": "Hi", "subreddit": "tifu"}
    summaries = [{"text": f" summary {name}", "policy": name, "note": ""} for name in ("sup1", "ref")]
    row = {"info": info, "summaries": summaries, "choice": 1, "worker": "w", "batch": "batch3", "split": "train"}
    return row | {"extra": {"confidence": 7}} | changes


def cnndm(**changes) -> dict:
    return comparison(info={"id": "c1", "article": "News.\nMore news."}, batch="cnndm0", extra={}, **changes)


def columns(*rows: dict) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_sft_columns_by_hand(tokenizer):
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    hparams = TldrHParams(length=64, max_sft_response_length=12, max_sft_query_response_length=70)
    out = tokenise_sft(columns(sft_row()), tokenizer, pad, hparams)
    query = "SUBREDDIT: r/tifu\n\nTITLE: Hi\n\nPOST: A post.\n\nTL;DR:"
    q, r = encode(tokenizer, [query])[0], encode(tokenizer, [" short"])[0] + [eos]
    assert out["query"] == [query]
    assert out["reference_response"] == [" short<|endoftext|>"]
    assert out["reference_response_token"].tolist() == [r + [pad] * (12 - len(r))]
    assert out["reference_response_token_len"] == [len(r)]
    assert out["query_reference_response"] == [query + " short<|endoftext|>"]
    fill = [pad] * (70 - len(q) - len(r))
    assert out["query_reference_response_token"].tolist() == [q + r + fill]
    assert out["query_reference_response_token_response_label"].tolist() == [[pad] * len(q) + r + fill]
    assert out["query_reference_response_token_len"] == [len(q) + len(r)]


def test_too_long_reference_keeps_its_true_length(tokenizer):
    hparams = TldrHParams(length=64, max_sft_response_length=2, max_sft_query_response_length=66)
    rows = columns(sft_row(summary="one two three four five six seven"))
    out = tokenise_sft(rows, tokenizer, tokenizer.pad_token_id, hparams)
    assert out["reference_response_token"].shape == (1, 2)
    assert tokenizer.eos_token_id not in out["reference_response_token"]
    assert out["reference_response_token_len"][0] > 2


@pytest.mark.parametrize("text", [" plain", "glued", ")):", "\n new line", "   spaces", "...", "", "\u0301x", " [PAD]"])
@pytest.mark.parametrize("row, hparams", [(comparison, TldrHParams()), (cnndm, cnndm_defaults())])
def test_labels_are_the_response(tokenizer, row, hparams, text):
    """Fault 6: also for CNN/DM, whose queries end in a newline that is stripped; also where texts merge."""
    row = row(choice=0)
    row["summaries"][0]["text"] = text
    pad = tokenizer.pad_token_id
    out = tokenise_comparisons(columns(row), tokenizer, pad, hparams)
    n = out["query_chosen_token_len"][0]
    joined = out["query_chosen_token"][0].tolist()
    label = out["query_chosen_token_response_label"][0].tolist()
    query = out["query"][0].strip()
    assert joined[:n] == encode(tokenizer, [query + text + tokenizer.eos_token])[0]
    assert joined[n:] == label[n:] == [pad] * (len(joined) - n)
    start = len(os.path.commonprefix([joined, encode(tokenizer, [query])[0]]))
    assert label[:n] == [pad] * start + joined[start:n]
    response = encode(tokenizer, [text + tokenizer.eos_token])[0]
    assert out["chosen_token"][0].tolist()[: len(response)] == response
    if text.startswith(" "):
        assert label[start:n] == response


def test_comparison_columns_follow_the_choice(tokenizer):
    for choice, chosen, rejected in ((0, "sup1", "ref"), (1, "ref", "sup1")):
        out = tokenise_comparisons(columns(comparison(choice=choice)), tokenizer, tokenizer.pad_token_id, TldrHParams())
        assert out["chosen"] == [f" summary {chosen}<|endoftext|>"]
        assert out["query_rejected"][0].endswith(f"TL;DR: summary {rejected}<|endoftext|>")
        assert (out["chosen_policy"], out["rejected_policy"]) == ([chosen], [rejected])
        assert out["policies"] == ["ref--sup1"]


# ---------------------------------------------------------------------------------------------------------- whole runs
def write(folder: Path, **splits: list[dict]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (folder / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines))
    return str(folder)


@pytest.fixture
def args(tmp_path, toy_tokenizer) -> Args:
    """A tiny world: TL;DR and CNN/DM rows mixed in one file."""
    posts = write(tmp_path / "raw/posts", train=[sft_row(), sft_row(post="x\n" * 500)], validation=[sft_row()])
    pairs = write(
        tmp_path / "raw/pairs",
        train=[comparison(choice=i % 2, extra={}) for i in range(3)],
        validation=[comparison(), cnndm(), cnndm(choice=0), comparison(batch="batch9")],
    )
    return Args(
        base_model=toy_tokenizer,
        sft_dataset=posts,
        preference_dataset=pairs,
        check_length_correctness=False,
        output_dir=str(tmp_path / "out/tldr"),
        visuals_dir=str(tmp_path / "out/visuals"),
    )


def response_names(name: str) -> list[str]:
    joined = [f"query_{name}", f"query_{name}_token", f"query_{name}_token_len"]
    return [name, f"{name}_token", f"{name}_token_len", *joined, f"query_{name}_token_response_label"]


SFT_NAMES = ["id", "subreddit", "title", "post", "summary", "query", "query_token"]
SFT_NAMES += response_names("reference_response")
COMPARISON_NAMES = ["info", "summaries", "choice", "worker", "batch", "split", "extra"]
COMPARISON_NAMES += ["query", "query_token", "query_token_len", "chosen_policy", "rejected_policy", "policies"]
COMPARISON_NAMES += response_names("chosen") + response_names("rejected")


def test_tiny_world_end_to_end(args, capsys):
    result = main(args)
    sft = datasets.load_dataset(f"{args.output_dir}/sft")
    pairs = datasets.load_dataset(f"{args.output_dir}/comparisons")
    assert {name: len(rows) for name, rows in sft.items()} == {"train": 2, "validation": 1}
    assert {name: len(rows) for name, rows in pairs.items()} == {"train": 3, "validation": 2, "validation_cnndm": 2}
    assert sorted(sft["train"].column_names) == sorted(SFT_NAMES)
    assert sorted(pairs["train"].column_names) == sorted(COMPARISON_NAMES)
    assert set(pairs["validation_cnndm"]["batch"]) == {"cnndm0"}
    assert pairs["validation"]["batch"][:] == ["batch3", "batch9"]
    assert pairs["validation_cnndm"][0]["info"]["post"] is None
    assert pairs["validation_cnndm"][0]["query"] == "Article:\nNews.\nMore news.\n\nTL;DR:\n"
    assert pairs["train"][0]["extra"] == {"confidence": None}
    assert (len(pairs["validation"][0]["query_token"]), len(pairs["validation_cnndm"][0]["query_token"])) == (512, 1919)
    assert result["sft"]["train"]["truncated_queries"] == 1
    assert json.loads(Path(args.output_dir, "summary.json").read_text())["comparisons"]["train"]["rows"] == 3
    assert all(os.path.exists(path) for path in result["paths"])
    shown = capsys.readouterr().out
    assert "rows/s" in shown and "validation_cnndm" in shown and result["paths"][0] in shown
    assert sorted(os.listdir(Path(args.output_dir).parent)) == ["tldr", "visuals"]  # no leftovers


def test_without_cnndm_there_is_no_such_split(args, tmp_path):
    pairs = write(tmp_path / "raw/tldr_only", train=[comparison()], validation=[comparison()])
    main(replace(args, preference_dataset=pairs))
    assert set(datasets.load_dataset(f"{args.output_dir}/comparisons")) == {"train", "validation"}


def test_parquet_folders_give_the_same(args, tmp_path):
    main(args)
    for name in ("sft_dataset", "preference_dataset"):
        raw = datasets.load_dataset(f"{args.output_dir}/{'sft' if name == 'sft_dataset' else 'comparisons'}")
        keep = tldr_dataset.SFT_COLUMNS if name == "sft_dataset" else tldr_dataset.COMPARISON_COLUMNS
        for split, rows in raw.items():
            (tmp_path / name / "data").mkdir(parents=True, exist_ok=True)
            rows.select_columns(list(keep)).to_parquet(tmp_path / name / f"data/{split}-00000-of-00001.parquet")
    folders = {name: str(tmp_path / name) for name in ("sft_dataset", "preference_dataset")}
    again = replace(args, output_dir=str(tmp_path / "again"), **folders)
    main(again)
    for name in ("sft", "comparisons"):
        one, two = (datasets.load_dataset(f"{folder}/{name}") for folder in (args.output_dir, again.output_dir))
        assert {split: rows.to_list() for split, rows in one.items()} == {s: rows.to_list() for s, rows in two.items()}


def test_existing_results_are_kept_unless_overwritten(args, capsys):
    main(args)
    with pytest.raises(SystemExit):
        main(args)
    error = capsys.readouterr().err
    assert "--output_dir" in error and "--overwrite" in error
    main(replace(args, overwrite=True, debug=True))
    assert json.loads(Path(args.output_dir, "summary.json").read_text())["args"]["debug"] is True


def test_overwrite_leaves_foreign_folders_alone(args, tmp_path):
    with pytest.raises(SystemExit):
        main(replace(args, output_dir=str(tmp_path / "raw"), overwrite=True))
    assert (tmp_path / "raw/posts/train.jsonl").exists()


def test_overwrite_leaves_a_run_alone(args, tmp_path):
    """Folders of other scripts hold a `summary.json`, too."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/summary.json").write_text('{"state": "finished", "metrics": {}}')
    with pytest.raises(SystemExit):
        main(replace(args, output_dir=str(tmp_path / "run"), overwrite=True))
    assert os.listdir(tmp_path / "run") == ["summary.json"]


def test_compressed_lines_and_a_folder_named_as_a_format(args, tmp_path, monkeypatch, capfd):
    """`json` is a folder here, not the builder of that name in `datasets`; a bad line is named in .jsonl.gz, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json").mkdir()
    with gzip.open(tmp_path / "json/train.jsonl.gz", "wt") as file:
        file.write(json.dumps(sft_row()) + "\n")
    found = main(replace(args, sft_dataset="json"))
    assert found["sft"]["train"]["rows"] == 1
    with gzip.open(tmp_path / "json/train.jsonl.gz", "wt") as file:
        file.write(json.dumps(sft_row()) + "\n{")
    with pytest.raises(SystemExit):
        main(replace(args, sft_dataset="json", output_dir="again"))
    assert "train.jsonl.gz line 2" in capfd.readouterr().err


def test_text_of_the_pad_token_is_only_text(args, tmp_path):
    posts = write(tmp_path / "raw/pad", train=[sft_row(post="it says [PAD] here")])
    pad = main(replace(args, sft_dataset=posts))["pad_token_id"]
    row = datasets.load_dataset(f"{args.output_dir}/sft")["train"][0]
    assert pad not in row["query_reference_response_token"][: row["query_reference_response_token_len"]]


def test_what_is_doubtful_is_counted(args, tmp_path, capsys, monkeypatch):
    """Texts without a word, pairs without a difference, and posts of the training split in another one."""
    same = [{"text": text, "policy": "sup1", "note": ""} for text in (" the same", "the  same\n")]
    blank = [{"text": text, "policy": "sup1", "note": ""} for text in (" ", "")]
    posts = write(
        tmp_path / "raw/doubtful",
        train=[sft_row(), sft_row(post=""), sft_row(post=" \n "), sft_row(summary=" "), sft_row(post="Two  words")],
        validation=[sft_row(), sft_row(post="two words"), sft_row(post="\nTwo\nwords "), sft_row(post="")],
        test=[sft_row(post="other")],
    )
    pairs = write(
        tmp_path / "raw/doubtful_pairs",
        train=[comparison(summaries=same), comparison(), comparison(summaries=blank), cnndm(summaries=same)],
        validation=[comparison(), comparison(info=comparison()["info"] | {"post": "other"})],
    )
    args = replace(args, sft_dataset=posts, preference_dataset=pairs, allow_empty=True)
    found = main(args)
    expected = {
        "sft": {
            "train": {"empty_posts": 2, "empty_summaries": 1},
            "validation": {"empty_posts": 1, "empty_summaries": 0, "posts_of_train": 2},
            "test": {"empty_posts": 0, "empty_summaries": 0, "posts_of_train": 0},
        },
        "comparisons": {
            "train": {"empty_posts": 0, "empty_summaries": 2, "equal_summaries": 2},
            "validation": {"empty_posts": 0, "empty_summaries": 0, "equal_summaries": 0, "posts_of_train": 1},
            "validation_cnndm": {"empty_posts": 0, "empty_summaries": 0, "equal_summaries": 1, "posts_of_train": 0},
        },
    }
    saved = json.loads(Path(args.output_dir, "summary.json").read_text())
    shown = [line.replace(",", "").split() for line in capsys.readouterr().out.replace("│", " ").splitlines()]
    for kind, splits in expected.items():
        assert set(splits) == set(found[kind])
        for split, counts in splits.items():
            assert counts.items() <= found[kind][split].items() and counts.items() <= saved[kind][split].items()
            names = ("empty_posts", "empty_summaries", "equal_summaries", "posts_of_train")
            row = [kind, split, str(found[kind][split]["rows"]), *(str(counts.get(name, "-")) for name in names)]
            assert row in shown, row
    monkeypatch.setattr(tldr_dataset, "DEBUG_ROWS", 2)  # which counts what it takes
    assert main(replace(args, debug=True, overwrite=True))["sft"]["train"]["empty_posts"] == 1


FAILING = {  # folder of ../shared/failing: (the other argument's rows, what the line must say; None: it is read)
    "null_in_one_split": ("preference_dataset", None),
    "silent_comparisons": ("preference_dataset", None),
    "choice_in_row_5": ("preference_dataset", "choice 0.5 in row 4"),
    "run[1]": ("sft_dataset", None),
    "editor_leftovers": ("sft_dataset", None),
    "torn_gz": ("sft_dataset", "train.jsonl.gz, which cannot be read"),
    "lone_surrogate": ("sft_dataset", "`post` of"),
    "silent_posts": ("sft_dataset", "blank `summary` in row 2"),
}


@needs_shared
@pytest.mark.parametrize("name", FAILING)
def test_files_that_fail_elsewhere(args, capfd, name):
    argument, said = FAILING[name]
    args = replace(args, **{argument: str(SHARED / "failing" / name)})
    if said is None:
        main(args)
        return
    with pytest.raises(SystemExit) as stop:
        main(args)
    error = capfd.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: --{argument}: found ") and said in error
    assert error.count("\n") == 1
    if name == "silent_posts":
        found = main(replace(args, allow_empty=True))["sft"]
        assert (found["train"]["empty_posts"], found["train"]["empty_summaries"]) == (1, 1)
        assert found["validation"]["posts_of_train"] == 1


@needs_shared
def test_real_rows_at_the_real_lengths(tmp_path, tokenizer, capsys):
    args = Args(
        base_model=str(SHARED / "tokenizer"),
        sft_dataset=str(SHARED / "tldr/posts"),
        preference_dataset=str(SHARED / "tldr/comparisons"),
        output_dir=str(tmp_path / "tldr"),
        visuals_dir=str(tmp_path / "visuals"),
    )
    with pytest.raises(SystemExit) as stop:  # the sample does not reach the maxima of the full data
        main(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and os.listdir(tmp_path) == []
    for name, found in (("sft_response", 50), ("sft_query_response", 558), ("rm_response", 49)):
        assert f"--tldr_params.max_{name}_length: {'found ' if name == 'sft_response' else ''}{found}" in error

    result = main(replace(args, check_length_correctness=False))
    sft = datasets.load_dataset(f"{args.output_dir}/sft")
    pairs = datasets.load_dataset(f"{args.output_dir}/comparisons")
    assert {name: len(rows) for name, rows in sft.items()} == {"train": 696, "validation": 90, "test": 68}
    assert {name: len(rows) for name, rows in pairs.items()} == {"train": 681, "validation": 171}
    assert (result["pad_token_id"], result["vocab_size"]) == (tokenizer.pad_token_id, 50277)
    assert result["sft"]["train"]["response_overlong"] == 0
    raw = datasets.load_dataset(args.sft_dataset)
    for split, rows in sft.items():
        assert rows["post"][:] == raw[split]["post"][:]
    for rows, name, lengths in (
        (sft["train"], "reference_response", (53, 562)),
        (pairs["train"], "chosen", (169, 638)),
        (pairs["validation"], "rejected", (169, 638)),
    ):
        rows = rows.with_format("numpy")
        token = {key: np.stack(rows[f"{key}_token"][:]) for key in ("query", name, f"query_{name}")}
        label = np.stack(rows[f"query_{name}_token_response_label"][:])
        assert [token[key].shape[1] for key in ("query", name, f"query_{name}")] == [512, *lengths]
        assert label.shape == token[f"query_{name}"].shape
        real = [ids[ids != tokenizer.pad_token_id].tolist() for ids in token[f"query_{name}"]]
        assert real == encode(tokenizer, list(rows[f"query_{name}"][:]))  # as if tokenised together
        for ids, response in zip(label, token[name]):
            kept = ids[ids != tokenizer.pad_token_id]
            assert kept[-1] == tokenizer.eos_token_id
            assert (kept == response[: len(kept)]).all() and (response[len(kept) :] == tokenizer.pad_token_id).all()
    for name in ("sft", "comparisons"):
        with Image.open(tmp_path / f"visuals/{name}_token_lengths.png") as image:
            assert min(image.size) >= 300
            assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_declared_lengths_that_are_right_pass(args):
    found = main(args)
    sft, news = found["sft"].values(), found["comparisons"].pop("validation_cnndm")
    tldr, cnn = {}, {}
    for n in ("response", "query_response"):
        tldr[f"max_sft_{n}_length"] = max(split[f"{n}_max"] for split in sft)
        tldr[f"max_rm_{n}_length"] = max(split[f"{n}_max"] for split in found["comparisons"].values())
        cnn[f"max_rm_{n}_length"] = news[f"{n}_max"]
    right = replace(
        args,
        check_length_correctness=True,
        overwrite=True,
        tldr_params=replace(args.tldr_params, **tldr),
        cnndm_params=replace(args.cnndm_params, **cnn),
    )
    main(right)
    wrong = replace(right.cnndm_params, max_rm_response_length=cnn["max_rm_response_length"] + 1)
    with pytest.raises(SystemExit):
        main(replace(right, cnndm_params=wrong))


# ------------------------------------------------------------------------------------------------------- bad input
def tldr(**changes) -> dict:
    return {"tldr_params": TldrHParams(**changes)}


POSTS, PAIRS = "--sft_dataset", "--preference_dataset"
BAD = {  # name: (changed arguments, raw posts, raw pairs, what the line must say)
    "no such folder": ({"sft_dataset": "no/such"}, None, None, [POSTS, "no/such", "offline"]),
    "no such path": ({"preference_dataset": "/no/such/folder"}, None, None, [PAIRS, "/no/such/folder"]),
    "a file": ({"sft_dataset": __file__}, None, None, [POSTS, "a file"]),
    "no such model": ({"base_model": "no/model"}, None, None, ["--base_model", "no/model", "offline"]),
    "no tokenizer": ({"base_model": str(ROOT / "tests")}, None, None, ["--base_model", "cannot be loaded"]),
    "no column": ({}, [{"id": "1", "post": "x"}], None, [POSTS, "summary", "subreddit"]),
    "swapped": ({}, [comparison()], None, [POSTS, "other dataset"]),
    "swapped back": ({}, None, [sft_row()], [PAIRS, "other dataset"]),
    "empty split": ({}, [], None, [POSTS]),
    "malformed": ({}, [sft_row(), '{"id": 3,'], None, [POSTS, "train.jsonl line 2"]),
    "not an object": ({}, None, [comparison(), "[1]"], [PAIRS, "train.jsonl line 2"]),
    "mixed types": ({}, [sft_row(), sft_row(post=[1])], None, [POSTS, "`post`", "train.jsonl in row 1"]),
    "empty summary": ({}, [sft_row(), sft_row(summary="")], None, [POSTS, "`summary` in row 1", "--allow_empty"]),
    "blank summary": ({}, [sft_row(summary=" \n\u00a0")], None, [POSTS, "`summary` in row 0", "--allow_empty"]),
    "no post": ({}, [sft_row(), {k: v for k, v in sft_row().items() if k != "post"}], None, [POSTS, "`post`", "row 1"]),
    "null post": ({}, [sft_row(post=None), sft_row()], None, [POSTS, "`post`", "row 0"]),
    "null summary": ({}, [sft_row(summary=None), sft_row()], None, [POSTS, "`summary`"]),
    "number": ({}, [sft_row(post=3)], None, [POSTS, "`post`"]),
    "pair without post": ({}, None, [comparison(info={"id": "1", "title": "", "subreddit": ""})], [PAIRS, "`post`"]),
    "no article": ({}, None, [cnndm(), comparison(batch="cnndm2")], [PAIRS, "`article`", "row 1"]),
    "choice": ({}, None, [comparison(), comparison(choice=2)], [PAIRS, "choice 2", "row 1"]),
    "fractional choice": ({}, None, [comparison(choice=1.0)], [PAIRS, "choice 1.0"]),
    "half a choice": ({}, None, [comparison(), comparison(choice=0.5)], [PAIRS, "choice 0.5", "row 1"]),
    "yes and no": ({}, None, [comparison(choice=True)], [PAIRS, "choice True"]),
    "null choice": ({}, None, [comparison(), comparison(choice=None)], [PAIRS, "choice None"]),
    "confidence": ({}, None, [comparison(extra={"confidence": 10})], [PAIRS, "confidence 10"]),
    "confidence 0": ({}, None, [comparison(extra={"confidence": 0})], [PAIRS, "confidence 0"]),
    "info is text": ({}, None, [comparison(info="a post")], [PAIRS, "`info`", "row 0"]),
    "info is a list": ({}, None, [comparison(info=["a post"])], [PAIRS, "`info`", "row 0"]),
    "extra is text": ({}, None, [comparison(extra="sure")], [PAIRS, "`extra`", "row 0"]),
    "summaries are texts": ({}, None, [comparison(summaries=["a", "b"])], [PAIRS, "`summaries`", "row 0"]),
    "summaries are one": ({}, None, [comparison(summaries={"text": "a", "policy": "b"})], [PAIRS, "`summaries`"]),
    "worker is an object": ({}, None, [comparison(worker={"name": "w"})], [PAIRS, "other types"]),
    "split is a list": ({}, None, [comparison(split=["train"])], [PAIRS, "other types"]),
    "half a character": (
        {},
        ['{"id": "1", "subreddit": "a", "title": "b", "post": "\\ud800", "summary": "c"}'],
        None,
        [POSTS, "`post`", "train.jsonl in row 0", "surrogates"],
    ),
    "a huge number": ({}, None, [comparison(choice=10**30)], [PAIRS, "`choice`", "train.jsonl in row 0"]),
    "half a confidence": ({}, None, [comparison(), comparison(extra={"confidence": 6.5})], [PAIRS, "6.5", "row 1"]),
    "one summary": ({}, None, [comparison(summaries=comparison()["summaries"][:1])], [PAIRS, "1 summaries"]),
    "zero length": (tldr(length=0), None, None, ["--tldr_params.length", "0"]),
    "negative length": (tldr(max_sft_response_length=-1), None, None, ["--tldr_params.max_sft_response_length", "-1"]),
    "format": (tldr(format_str="{post"), None, None, ["--tldr_params.format_str"]),
    "no field": (tldr(truncate_field="text"), None, None, ["--tldr_params.truncate_field", "text"]),
    "title too long": (tldr(length=30), [sft_row(title="word " * 90)], None, ["--tldr_params.length", "t3_1"]),
    "declared lengths": ({"check_length_correctness": True}, None, None, ["--tldr_params.max_sft_response_length"]),
    "output is a file": ({"output_dir": __file__}, None, None, ["--output_dir"]),
    "output below a file": ({"output_dir": __file__ + "/x"}, None, None, ["--output_dir"]),
    "output in use": ({"output_dir": str(ROOT / "tests"), "overwrite": True}, None, None, ["--output_dir"]),
    "visuals is a file": ({"visuals_dir": __file__}, None, None, ["--visuals_dir"]),
    "no login": ({"push_to_hub": True}, None, None, ["--push_to_hub", "login"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_nothing_written(args, tmp_path, capfd, monkeypatch, name):
    changes, posts, pairs, said = BAD[name]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    if posts is not None:
        args = replace(args, sft_dataset=write(tmp_path / "raw/bad", train=posts))
    if pairs is not None:
        args = replace(args, preference_dataset=write(tmp_path / "raw/bad", train=pairs))
    with pytest.raises(SystemExit) as stop:
        main(replace(args, **changes))
    error = capfd.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: --") and error.count("\n") == 1, error
    for words in said:
        assert words in error
    assert os.listdir(tmp_path) == ["raw"]


def test_without_network_the_hub_is_asked_once(args, capfd, monkeypatch):
    def no_network(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", no_network)
    with pytest.raises(SystemExit):
        main(replace(args, preference_dataset="openai/summarize_from_feedback"))
    assert "no network" in capfd.readouterr().err


def test_layout_of_the_hubs_parquet_conversion(tmp_path):
    """`--preference_config` is a folder of the conversion, beside the dataset's other configurations."""
    for config in ("axis", "comparisons"):
        for split in ("train", "validation"):
            (tmp_path / f"{config}/{split}").mkdir(parents=True)
            datasets.Dataset.from_list([{config: split}]).to_parquet(tmp_path / f"{config}/{split}/0000.parquet")
    found = datasets.load_dataset(str(tmp_path), data_dir="comparisons")
    assert {split: rows[0] for split, rows in found.items()} == {s: {"comparisons": s} for s in ("train", "validation")}


# ------------------------------------------------------------------------------------------------------ command line
PAPER = """
    --base_model EleutherAI/pythia-1b-deduped --tldr_params.max_sft_response_length=53
    --tldr_params.max_sft_query_response_length=562 --tldr_params.max_rm_response_length=169
    --tldr_params.max_rm_query_response_length=638 --cnndm_params.max_rm_response_length=155
    --cnndm_params.max_rm_query_response_length=2021 --tldr_params.padding=pad_token --cnndm_params.padding=pad_token
    --push_to_hub
"""


def test_command_of_the_paper_is_the_default():
    import tyro

    assert tyro.cli(Args, args=PAPER.split()) == Args(push_to_hub=True)
    more = "--hf_entity me --no-check-length-correctness --debug --tldr_params.length 9 --tldr_params.format_str {post}"
    more += " --tldr_params.truncate_field post --tldr_params.truncate_text x --tldr_params.pad_side right"
    found = tyro.cli(Args, args=[*PAPER.split(), *more.split(), "--tldr_params.padding", "empty_space"])
    assert found.tldr_params == TldrHParams(9, "{post}", "post", "x", "empty_space", "right")
    assert (found.hf_entity, found.check_length_correctness, found.debug) == ("me", False, True)
