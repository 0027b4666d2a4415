"""Rows of other schemas through `tldr_dataset.py`: with --columns they give what the same rows in OpenAI's give."""

import json
import random
from pathlib import Path

import datasets
import pytest

from summarize_from_feedback_details import toy_tldr
from summarize_from_feedback_details.tldr_dataset import Args, TldrHParams, main


@pytest.fixture(scope="module")
def raw() -> dict[str, dict[str, list[dict]]]:
    """Raw rows of the toy world: dataset -> split -> rows."""
    rng, batches = random.Random(0), [*toy_tldr.TRAIN_BATCHES, "cnndm0"]
    splits = {"train": 30, "validation": 20}
    return {
        "sft": {split: toy_tldr.draw_sft_rows(rng, n, split) for split, n in splits.items()},
        "comparisons": {split: toy_tldr.draw_comparisons(rng, n, split, batches) for split, n in splits.items()},
    }


def write(folder: Path, splits: dict[str, list[dict]]) -> str:
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def build(world, tmp_path, sft: str, comparisons: str, **more) -> dict[str, datasets.DatasetDict]:
    folders = {"output_dir": str(tmp_path / "out"), "visuals_dir": str(tmp_path / "visuals"), "overwrite": True}
    more |= {"sft_dataset": sft, "preference_dataset": comparisons, "check_length_correctness": False}
    args = Args(base_model=world.base, **folders, **more)
    main(args)
    return {name: datasets.load_dataset(f"{args.output_dir}/{name}") for name in ("sft", "comparisons")}


def tldr(rows: list[dict]) -> list[dict]:
    """Comparisons of posts."""
    return [row for row in rows if row["batch"] not in toy_tldr.CNNDM_BATCHES]


def chosen(row: dict, other: int = 0) -> str:
    return row["summaries"][row["choice"] ^ other]["text"]


def test_prompts_with_completions_and_with_chosen_and_rejected(world, raw, tmp_path):
    """The schemas of TRL's TL;DR datasets: the whole query is one text."""
    form, splits = TldrHParams().format_str, raw["comparisons"]
    query = lambda post: form.format(**post)
    sft = {s: [{"prompt": query(row), "completion": " " + row["summary"]} for row in rows] for s, rows in raw["sft"].items()}  # noqa: E501  # fmt: skip
    pairs = {
        s: [{"prompt": query(row["info"]), "chosen": chosen(row), "rejected": chosen(row, 1)} for row in tldr(rows)]
        for s, rows in splits.items()
    }
    found = build(world, tmp_path, write(tmp_path / "posts", sft), write(tmp_path / "pairs", pairs),
                  columns=("query=prompt", "summary=completion", "chosen=chosen", "rejected=rejected"))  # fmt: skip
    expected = build(world, tmp_path / "as_is", write(tmp_path / "raw_posts", raw["sft"]),
                     write(tmp_path / "raw_pairs", {s: tldr(rows) for s, rows in splits.items()}))  # fmt: skip
    for kind, names in (("sft", ("query_token", "query_reference_response_token")),
                        ("comparisons", ("query_token", "query_chosen_token", "query_rejected_token"))):  # fmt: skip
        for split in expected[kind]:
            for name in names:
                assert found[kind][split][name][:] == expected[kind][split][name][:], (kind, split, name)
    assert found["sft"]["train"]["id"][:2] == ["train-0", "train-1"]


def test_posts_and_summaries_under_other_names_and_nothing_else(world, raw, tmp_path):
    """My posts and summaries in a jsonl: fields that the query does not need may be missing; --max_rows."""
    sft = {s: [{"text": row["post"], "tldr": row["summary"]} for row in rows] for s, rows in raw["sft"].items()}
    pairs = {s: [{"text": row["info"]["post"], "better": chosen(row), "worse": chosen(row, 1)} for row in tldr(rows)]
             for s, rows in raw["comparisons"].items()}  # fmt: skip
    found = build(
        world, tmp_path, write(tmp_path / "posts", sft), write(tmp_path / "pairs", pairs), max_rows=7,
        columns=("post=text", "summary=tldr", "chosen=better", "rejected=worse"),
        tldr_params=TldrHParams(format_str="{post}\n\nTL;DR:"),
    )  # fmt: skip
    assert len(found["sft"]["train"]) == len(found["comparisons"]["train"]) == 7
    row, pair = found["sft"]["train"][3], found["comparisons"]["validation"][2]
    assert row["query"] == f"{sft['train'][3]['text']}\n\nTL;DR:"
    assert row["reference_response"] == f" {sft['train'][3]['tldr']}<|endoftext|>"
    assert pair["chosen"] == f" {pairs['validation'][2]['better'].strip()}<|endoftext|>"
    assert pair["policies"] == "unknown--unknown"


@pytest.mark.parametrize(
    "columns, message",
    [
        (("post",), "--columns: found 'post'; expected OURS=THEIRS, with OURS one of id, subreddit"),
        (("text=post",), "--columns: found 'text=post'; expected OURS=THEIRS"),
        (("post=nowhere",), "--columns: found 'post=nowhere', and no such column in either dataset"),
        (("post=text",), "--sft_dataset: found no column summary in the split 'train' (it has text, tldr)"),
        (("summary=tldr",), "--sft_dataset: found nothing for post, subreddit, title of the query"),
        (("post=text", "summary=tldr"), "--sft_dataset: found nothing for subreddit, title of the query"),
        (("post=text", "post=tldr"), "--columns: found 'post=text' and 'post=tldr'; expected one name"),
        (("chosen=text", "rejected=text"), "--columns: found 'text' for both chosen and rejected; expected two"),
        (("query=text", "title=text"), "--columns: found query and title; expected query, which holds the others"),
        (("query=text", "summary=tldr"), "--sft_dataset: found another form in `text` of row 0 (counted from 0)"),
    ],
)
def test_bad_input(world, raw, tmp_path, capsys, columns, message):
    sft = write(tmp_path / "posts", {"train": [{"text": "a post", "tldr": "short"}]})
    pairs = write(tmp_path / "pairs", {s: rows[:5] for s, rows in raw["comparisons"].items()})
    with pytest.raises(SystemExit) as stopped:
        build(world, tmp_path, sft, pairs, columns=columns)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith(f"error: {message}") and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()


def test_no_text_in_a_row(world, raw, tmp_path, capsys):
    sft = write(tmp_path / "posts", {"train": [{"text": "a", "tldr": "b"}, {"text": "a", "tldr": None}]})
    pairs = write(tmp_path / "pairs", {"train": [{"text": "a", "good": "b", "bad": "c"}]})
    with pytest.raises(SystemExit):
        build(world, tmp_path, sft, pairs, columns=("post=text", "summary=tldr", "chosen=good", "rejected=bad"),
              tldr_params=TldrHParams(format_str="{post}\n\nTL;DR:"))  # fmt: skip
    assert "no text in `tldr` of row 1 (counted from 0) of the split 'train'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        build(world, tmp_path, sft, pairs, max_rows=0)
    assert "--max_rows: found 0; expected a number above 0" in capsys.readouterr().err
