"""The toy world: schemas, conventions, determinism, the annotator by hand, what a perfect or a blind judge reaches."""

import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch
from conftest import SHARED
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from summarize_from_feedback_details import toy_tldr
from summarize_from_feedback_details.toy_tldr import Args, gold_score

ROOT = Path(toy_tldr.__file__).parents[1]
TINY = {"n_sft": 400, "n_sft_validation": 100, "n_comparisons": 1200, "n_comparisons_validation": 400, "n_cnndm": 60}
POST = "a lamp costs less. so my boss sold my bike. this was at the gym. i still have a tent. should i quit?"


def tiny_args(folder: Path, **changes) -> Args:
    return replace(Args(data_dir=folder / "data", models_dir=folder / "models", sizes=("small",), **TINY), **changes)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    result = toy_tldr.main(tiny_args(folder))
    return folder, result


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hard")
    result = toy_tldr.main(tiny_args(folder, world="hard"))
    return folder, result


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------------- annotator, by hand
@pytest.mark.parametrize(
    "summary, parts, score",
    [
        # all five facts, 13 words and marks: 4 - 13 * 0.04
        ("my boss sold my bike at the gym, should i quit?", (1.0, 0, 0, 0, 13), 3.48),
        # two of five facts, and the lamp of a sentence that is no fact: 1.6 - 1 - 6 * 0.04
        ("my boss sold my lamp.", (0.4, 1, 0, 0, 6), 0.36),
        # a value that the post does not even have costs the same
        ("my boss sold my drum.", (0.4, 1, 0, 0, 6), 0.36),
        # the gym twice, and "gym at" is no English of this world: 3.2 - 0.4 - 0.3 - 12 * 0.04
        ("my boss sold my bike at the gym at the gym.", (0.8, 0, 1, 1, 12), 2.02),
        # a word salad: nothing starts or ends with a plan: 0.8 - 2 * 0.3 - 0.04
        ("quit", (0.2, 0, 0, 2, 1), 0.16),
        # 18 words and marks, two over 16: 4 - 18 * 0.04 - 2 * 0.1
        ("ok so my boss sold my bike at the gym, should i quit? any tips?", (1.0, 0, 0, 0, 18), 3.08),
        ("", (0.0, 0, 0, 1, 0), -0.3),
    ],
)
def test_gold_components(summary, parts, score):
    found = gold_score(POST, summary)
    assert tuple(found[k] for k in ("coverage", "wrong", "repeats", "bad_bigrams", "words")) == pytest.approx(parts)
    assert found["score"] == pytest.approx(score)


def test_gold_reads_texts_only():
    plain = gold_score(POST, "my boss sold my bike.")
    assert gold_score(POST, " my boss sold my bike.<|endoftext|>") == plain
    article = f"a reader sent us this. {POST} no one else spoke."
    assert gold_score(article, "my boss sold my bike.") == plain
    assert gold_score("this post has no facts", "it is bad.")["coverage"] == 0


@pytest.mark.parametrize("world", toy_tldr.WORLDS.values(), ids=toy_tldr.WORLDS)
def test_facts_are_read_as_drawn(world):
    rng = random.Random(5)
    for _ in range(1000):
        row, facts, _ = toy_tldr.write_post(rng, world)
        assert toy_tldr.read_facts(row["post"]) == facts, row["post"]
        article, facts, _ = toy_tldr.write_article(rng, world)
        assert toy_tldr.read_facts(article) == facts, article


@pytest.mark.parametrize("world", toy_tldr.WORLDS.values(), ids=toy_tldr.WORLDS)
def test_no_value_stands_elsewhere_in_the_grammar(world):
    values = [value for words in toy_tldr.VALUES.values() for value in words]
    assert len(values) == len(set(values))
    texts = [*world.core, *world.place, *world.plan, *world.near_misses, *sum(world.decoys.values(), [])]
    texts += toy_tldr.TITLES + toy_tldr.NEUTRAL + toy_tldr.NEWS + toy_tldr.OPENERS + toy_tldr.CLOSERS
    assert not set(values) & {word for text in texts for word in toy_tldr.split_words(text)}


@pytest.mark.parametrize(
    "post, facts",
    [
        ("i dreamt my vet sold my lamp. so my boss lost my bike. i will not lie. should i quit?",
         {"who": "boss", "deed": "lost", "thing": "bike", "plan": "quit"}),
        ("so my vet, no, my boss lost my bike. this was at the gym. no, make that the zoo.",
         {"who": "boss", "deed": "lost", "thing": "bike", "place": "zoo"}),
        ("my bike? my boss lost it. should i lie? no, should i quit? my vet never sold my lamp. the gym was shut.",
         {"who": "boss", "deed": "lost", "thing": "bike", "plan": "quit"}),
        ("my boss, not my vet, lost my bike. not at the gym, at the zoo. i would like to quit, not lie.",
         {"who": "boss", "deed": "lost", "thing": "bike", "place": "zoo", "plan": "quit"}),
    ],
)  # fmt: skip
def test_facts_of_the_hard_world(post, facts):
    assert toy_tldr.read_facts(post) == facts


def test_preference_probability():
    assert toy_tldr.preference_probability(1.0, 1.0, 0.3) == 0.5
    assert toy_tldr.preference_probability(0.0, 0.5 * math.log(3), 0.5) == pytest.approx(0.75)
    assert toy_tldr.preference_probability(1e6, -1e6, 0.1) == pytest.approx(0.0)
    assert toy_tldr.preference_probability(-1e6, 1e6, 0.1) == pytest.approx(1.0)


def test_choices_follow_preference_probability():
    rows = toy_tldr.draw_comparisons(random.Random(0), 4000, "train", toy_tldr.TRAIN_BATCHES)
    expected, agree = [], []
    for row in rows:
        first, second = (gold_score(row["info"]["post"], s["text"])["score"] for s in row["summaries"])
        expected.append(toy_tldr.preference_probability(first, second, toy_tldr.WORKERS[row["worker"]]))
        agree.append(row["choice"])
    error = math.sqrt(sum(p * (1 - p) for p in expected)) / len(rows)
    assert abs(mean(agree) - mean(expected)) < 4 * error
    brier = mean((a - p) ** 2 for a, p in zip(agree, expected))
    assert brier == pytest.approx(mean(p * (1 - p) for p in expected), abs=0.01)


# ------------------------------------------------------------------------------------------------------ rows on disk
def test_sft_schema(world):
    folder, result = world
    seen = set()
    for split, n in {"train": 400, "validation": 100, "test": 100}.items():
        rows = read(folder / "data" / "sft" / f"{split}.jsonl")
        assert len(rows) == n == result[f"rows/sft/{split}"]
        for row in rows:
            assert list(row) == ["id", "subreddit", "title", "post", "summary"]
            assert row["summary"] == row["summary"].strip() != ""
            assert row["subreddit"] in toy_tldr.SUBREDDITS
        seen |= {row["id"] for row in rows}
    assert len(seen) == 600


def test_comparison_schema_and_conventions(world):
    folder, _ = world
    real = read(SHARED / "tldr/comparisons/train.jsonl")[0] if SHARED.is_dir() else None
    train, validation = (read(folder / "data" / "comparisons" / f"{s}.jsonl") for s in ("train", "validation"))
    for row in train + validation:
        assert list(row) == ["info", "summaries", "choice", "worker", "batch", "split", "extra"]
        assert set(row["info"]) == {"id", "post", "title", "subreddit", "article", "site"}
        if real:
            assert set(row) == set(real) and set(row["info"]) >= set(real["info"])
            assert set(row["summaries"][0]) == set(real["summaries"][0]) and set(row["extra"]) == set(real["extra"])
        cnndm = row["batch"] in ("batch0_cnndm", "cnndm0", "cnndm2")
        assert (row["info"]["article"] is not None) == cnndm
        assert all((row["info"][k] is None) == cnndm for k in ("post", "title", "subreddit"))
        assert len(row["summaries"]) == 2 and row["summaries"][0]["text"] != row["summaries"][1]["text"]
        for summary in row["summaries"]:
            assert summary["text"][0] == " " and summary["text"][1] != " " and summary["policy"]
        assert row["extra"]["confidence"] in ((1, 2, 3, 4) if row["choice"] == 0 else (6, 7, 8, 9))
    assert {row["split"] for row in train} == {"train"} and {row["split"] for row in validation} == {"valid1", "valid2"}
    assert {row["batch"] for row in train} == set(toy_tldr.TRAIN_BATCHES)
    assert {row["batch"] for row in validation} == set(toy_tldr.VALIDATION_BATCHES + toy_tldr.CNNDM_BATCHES)
    assert len({row["worker"] for row in train}) == len(toy_tldr.WORKERS)
    assert {s["policy"] for row in train for s in row["summaries"]} == {*toy_tldr.WRITERS, *toy_tldr.EDITED}
    assert len({row["info"]["id"] for row in train + validation}) == len(train + validation)
    assert 0.4 < mean(row["choice"] for row in train) < 0.6


def test_confidence_is_informative(world):
    rows = read(world[0] / "data" / "comparisons" / "train.jsonl")
    by_strength: dict[int, list[float]] = {1: [], 2: [], 3: [], 4: []}
    for row in rows:
        chosen, rejected = toy_tldr.pair_gold(row)
        by_strength[abs(row["extra"]["confidence"] - 5)].append(chosen - rejected)
    differences = [mean(by_strength[k]) for k in (1, 2, 3, 4)]
    assert differences == sorted(differences) and differences[3] > differences[0] + 1
    agreement = [mean(d > 0 for d in by_strength[k]) for k in (1, 4)]
    assert agreement[0] + 0.1 < agreement[1]


def test_the_hard_world_is_another_one(world, hard):
    """Its rows have stories that did not happen, and lengths, a tokenizer and a version of its own."""
    easy_rows, rows = (read(folder / "data" / "sft" / "train.jsonl") for folder, _ in (world, hard))
    asserted = lambda row: sum(word in toy_tldr.SLOT_OF for word in toy_tldr.split_words(row["post"]))
    assert mean(map(asserted, easy_rows)) < 6 and mean(map(asserted, rows)) > 9
    missed = [any(text.split("{")[0] in row["post"] for text in toy_tldr.HARD.near_misses[:3]) for row in rows]
    assert 0.3 < mean(missed) < 0.8
    tokenizer = AutoTokenizer.from_pretrained(hard[0] / "models" / "small")
    assert all(len(tokenizer(f" {value}")["input_ids"]) == 1 for value in toy_tldr.SLOT_OF)
    made = [json.loads((folder / "data" / toy_tldr.MANIFEST).read_text())["made_with"] for folder, _ in (world, hard)]
    assert made[0].keys() == made[1].keys() and made[0] | {"world": "hard 1"} == made[1]
    assert 0.45 < hard[1]["rm/blind"] < 0.65 and hard[1]["rm/ceiling"] > 0.9


def test_worlds_are_not_mixed(world, capsys):
    with pytest.raises(SystemExit) as stop:
        toy_tldr.main(tiny_args(world[0], world="hard"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "--data_dir:" in error and "world 2" in error


def test_seed_decides_everything(world, tmp_path):
    folder, result = world
    assert toy_tldr.main(tiny_args(tmp_path / "again")) == result
    assert all_bytes(tmp_path / "again") == all_bytes(folder)
    toy_tldr.main(tiny_args(tmp_path / "other", seed=2))
    other, same = all_bytes(tmp_path / "other"), all_bytes(folder)
    differing = {name for name in same if other[name] != same[name]}
    assert {name.rsplit("/", 1)[1] for name in differing} == {
        *("train.jsonl", "validation.jsonl", "test.jsonl", "model.safetensors", toy_tldr.MANIFEST)
    }


def test_more_rows_leave_other_files_alone(world):
    more = toy_tldr.draw_rows(tiny_args(world[0], n_comparisons=1300))
    for name in ("sft/train", "sft/test", "comparisons/validation"):
        assert read(world[0] / "data" / f"{name}.jsonl") == more[name]
    assert read(world[0] / "data" / "comparisons" / "train.jsonl") == more["comparisons/train"][:1200]


def test_load_dataset(world):
    sft = load_dataset(str(world[0] / "data" / "sft"))
    comparisons = load_dataset(str(world[0] / "data" / "comparisons"))
    assert {k: len(v) for k, v in sft.items()} == {"train": 400, "validation": 100, "test": 100}
    assert {k: len(v) for k, v in comparisons.items()} == {"train": 1200, "validation": 460}
    assert comparisons["validation"][-1]["info"]["article"] and comparisons["train"][0]["info"]["article"] is None
    assert comparisons["train"][0] == read(world[0] / "data" / "comparisons" / "train.jsonl")[0]


# ---------------------------------------------------------------------------------------------- tokenizer and models
def test_tokenizer_and_model_load(world):
    path = world[0] / "models" / "small"
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.unk_token_id == 0
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.pad_token is None
    assert json.loads((path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert model.dtype == torch.float32 and model.config.model_type == "gpt_neox"
    assert model.config.vocab_size % 64 == 0 and model.config.vocab_size >= len(tokenizer) + 2
    n = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == n
    for text in ("Zürich, 5 o'clock 🙂\n", POST, toy_tldr.make_query({"article": POST})):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert all(len(tokenizer(f" {value}")["input_ids"]) == 1 for value in toy_tldr.SLOT_OF)
    # The query's tokens do not change when the response is tokenised with it.
    query, response = toy_tldr.make_query({"subreddit": "jobs", "title": "what now", "post": POST}), " my boss."
    assert tokenizer(query + response)["input_ids"] == tokenizer(query)["input_ids"] + tokenizer(response)["input_ids"]
    ids = torch.tensor([tokenizer(query + response)["input_ids"]])
    assert model(ids).logits.shape == (1, ids.shape[1], model.config.vocab_size)


def test_sizes_grow():
    tokenizer = toy_tldr.train_tokenizer()
    sizes = [sum(p.numel() for p in toy_tldr.init_model(s, tokenizer, 1).parameters()) for s in toy_tldr.SIZES]
    assert sizes == sorted(sizes) and sizes[list(toy_tldr.SIZES).index("medium")] > 30 * sizes[0]


@pytest.mark.parametrize("name", toy_tldr.WORLDS)
def test_lengths_fit(name, world, hard):
    _, result = {"easy": world, "hard": hard}[name]
    limits = toy_tldr.WORLDS[name].lengths
    lengths = {name.removeprefix("tokens/"): n for name, n in result.items() if name.startswith("tokens/")}
    assert lengths.keys() == limits.keys()
    for what, longest in lengths.items():
        assert 0.5 * limits[what] < longest <= limits[what]
    assert limits["cnndm_rm_query_response"] <= toy_tldr.MAX_POSITIONS
    assert limits["query"] + limits["sft_response"] <= limits["sft_query_response"]


# ------------------------------------------------------------------------------------------------- what can be reached
def test_references_are_good_but_not_the_best(world):
    rows = read(world[0] / "data" / "sft" / "train.jsonl")
    reference = [gold_score(row["post"], row["summary"])["score"] for row in rows]
    shuffled = [gold_score(a["post"], b["summary"])["score"] for a, b in zip(rows, rows[1:])]
    best = [gold_score(row["post"], toy_tldr.best_summary(row["post"]))["score"] for row in rows]
    assert mean(reference) > mean(shuffled) + 3
    assert mean(best) > mean(reference) + 0.8
    assert mean((b > r) + 0.5 * (b == r) for b, r in zip(best, reference)) > 0.8
    assert all(b >= r - 0.3 for b, r in zip(best, reference))  # at most a passive or a full stop cheaper
    assert all(gold_score(row["post"], toy_tldr.best_summary(row["post"]))["coverage"] == 1 for row in rows)


def test_blind_is_far_below_the_ceiling(world, capsys):
    folder, result = world
    assert 0.45 < result["rm/blind"] < 0.65 and 0.9 < result["rm/ceiling"] < 1 and 0.9 < result["rm/ceiling_cnndm"] < 1
    toy_tldr.main(tiny_args(folder))
    printed = capsys.readouterr().out
    assert "rm/ceiling" in printed and "rm/blind" in printed and "is there already" in printed


def test_blind_accuracy_sees_what_summaries_reveal():
    def row(choice: int, chosen: str, rejected: str) -> dict:
        texts = [rejected, chosen] if choice else [chosen, rejected]
        return {"choice": choice, "summaries": [{"text": text} for text in texts]}

    short_wins = [row(i % 2, " it was sold.", " ok so it was sold.") for i in range(200)]
    assert toy_tldr.blind_accuracy(short_wins, short_wins) == 1.0
    coin = [row(i % 2, *random.Random(i).sample([" it was lost.", " it was sold."], 2)) for i in range(2000)]
    assert toy_tldr.blind_accuracy(coin[:1000], coin[1000:]) == pytest.approx(0.5, abs=0.06)


def test_ceiling_counts_ties_half():
    def row(choice: int, *texts: str) -> dict:
        return {"info": {"post": POST, "article": None}, "choice": choice, "summaries": [{"text": t} for t in texts]}

    rows = [row(0, " my boss sold my bike.", " my vet sold my bike."), row(1, " my boss sold my bike.", " it is bad.")]
    assert toy_tldr.annotator_ceiling(rows) == 0.5
    assert toy_tldr.annotator_ceiling(rows[:1]) == 1.0
    assert toy_tldr.annotator_ceiling([row(0, " my vet sold my bike.", " my ex sold my bike.")]) == 0.5


# ---------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "changes, argument",
    [
        ({"n_sft": 0}, "n_sft"),
        ({"n_sft_validation": -1}, "n_sft_validation"),
        ({"n_comparisons": 0}, "n_comparisons"),
        ({"n_comparisons_validation": 10**7}, "n_comparisons_validation"),
        ({"n_cnndm": 0}, "n_cnndm"),
        ({"seed": -1}, "seed"),
        ({"sizes": ("huge",)}, "sizes"),
        ({"sizes": ()}, "sizes"),
        ({"models_dir": Path("same"), "data_dir": Path("same")}, "models_dir"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, capsys, changes, argument):
    with pytest.raises(SystemExit) as stop:
        toy_tldr.main(tiny_args(tmp_path, **changes))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and f"--{argument}:" in error
    assert not list(tmp_path.iterdir())


def test_existing_output(world, capsys):
    folder, result = world
    before = all_bytes(folder)
    for changes, argument in [({"seed": 2}, "data_dir"), ({"n_sft": 401}, "data_dir")]:
        with pytest.raises(SystemExit) as stop:
            toy_tldr.main(tiny_args(folder, **changes))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and f"--{argument}:" in error and "--overwrite" in error
    with pytest.raises(SystemExit):
        toy_tldr.main(tiny_args(folder, seed=2, data_dir=folder / "new"))
    assert "--models_dir:" in capsys.readouterr().err
    assert toy_tldr.main(tiny_args(folder)) == result
    assert all_bytes(folder) == before


def test_overwrite_replaces_only_its_own(tmp_path, capsys):
    first = toy_tldr.main(tiny_args(tmp_path, seed=3))
    second = toy_tldr.main(tiny_args(tmp_path, seed=4, overwrite=True))
    assert first != second and json.loads((tmp_path / "data" / toy_tldr.MANIFEST).read_text())["made_with"]["seed"] == 4
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit) as stop:
        toy_tldr.main(tiny_args(tmp_path, data_dir=mine, overwrite=True))
    assert stop.value.code == 2 and "--data_dir:" in capsys.readouterr().err
    assert (mine / "thesis.tex").read_text() == "years of work"
    with pytest.raises(SystemExit):
        toy_tldr.main(tiny_args(tmp_path, data_dir=mine / "thesis.tex"))
    assert {p.name for p in tmp_path.iterdir()} == {"data", "models", "mine"}  # no partial folder is left


def test_all_policies_and_workers_matter():
    rows = toy_tldr.draw_comparisons(random.Random(1), 3000, "train", toy_tldr.TRAIN_BATCHES)
    counts = Counter(s["policy"] for row in rows for s in row["summaries"])
    assert min(counts.values()) > 50
    agreement = {w: toy_tldr.annotator_ceiling([r for r in rows if r["worker"] == w]) for w in toy_tldr.WORKERS}
    assert agreement["w_00"] > agreement["w_07"] + 0.05
