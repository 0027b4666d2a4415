"""A laptop-sized stand-in for Reddit TL;DR: raw rows, a tokenizer, base models, and an annotator that knows.

    data/toy/sft/{train,validation,test}.jsonl           posts with reference summaries, in the schema of the real rows
    data/toy/comparisons/{train,validation}.jsonl        human-like choices between two summaries, in OpenAI's schema
    models/toy/<size>/                                   byte-level BPE tokenizer and a GPT-NeoX base model

A post states up to five facts (who did what to which thing, where, and what the writer plans) between sentences that do
not matter and decoys: values of the same kind that are no facts. A summary repeats facts, so it cannot be judged, or
written, without reading the post. The grammar below is fixed; `--seed` draws the rows and the initial weights.

    python summarize_from_feedback_details/toy_tldr.py --seed 1
    python summarize_from_feedback_details/toy_tldr.py --seed 2 --data_dir data/toy2 --models_dir models/toy2

The schemas are those of Stiennon et al. (2020); everything after this script is the real pipeline with other arguments.
"""

import contextlib
import json
import math
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers  # whose parts are imported where they are used: the judge reads gold scores, and needs none
from rich.console import Console
from rich.table import Table
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch.nn import functional as F

from summarize_from_feedback_details.common.arguments import command_line, refuse
from summarize_from_feedback_details.common.files import atomic_folder, refuse_unwritable

MAX_POSITIONS = 256
EOS = "<|endoftext|>"
MANIFEST = "toy_tldr.json"  # in each folder written: the arguments it was made with

# ----------------------------------------------------------------------------------------------------------- grammar
SUBREDDITS = {
    "jobs": ["boss", "clerk", "chef"],
    "family": ["aunt", "niece", "twin"],
    "dating": ["ex", "crush", "bride"],
    "legal": ["judge", "cop", "agent"],
    "college": ["dean", "tutor", "coach"],
    "pets": ["vet", "sitter", "farmer"],
}
# Slot -> values. No word stands in two slots or anywhere else in the grammar, so a word alone tells what it claims.
VALUES = {
    "who": " ".join(who for people in SUBREDDITS.values() for who in people),
    "deed": "sold lost cut bent burnt dyed mailed kicked buried washed rented painted swapped fixed melted cracked",
    "thing": "bike phone ring tent lamp coat boat desk drum vase rug sofa kite watch piano mug",
    "place": "gym park beach hotel mall farm garage zoo lake pool barn attic",
    "plan": "quit sue wait leave cry argue pay lie beg hide nap move",
}
VALUES = {slot: values.split() for slot, values in VALUES.items()}
SLOT_OF = {value: slot for slot, values in VALUES.items() for value in values}

TITLES = ["what now", "need some help", "my {who} again", "about my {thing}", "a {mood} {time}"]
CORE = ["so my {who} {deed} my {thing}.", "today my {who} {deed} my {thing}."]
CORE += ["my {thing} is done for, my {who} {deed} it."]
PLACE = ["this was at the {place}.", "we were all at the {place}."]
PLAN = ["should i {plan}?", "is it ok to {plan}?", "part of me wants to {plan}."]
DECOYS = {
    "who": ["even my {who} is mad.", "a {who} told me so."],
    "deed": ["some guy once {deed} his."],
    "thing": ["i still have a {thing}.", "a {thing} costs less."],
    "place": ["there is a {place} near us."],
    "plan": ["they say never {plan}."],
}
NEUTRAL = ["it has been a {mood} {time}.", "sorry, this is {mood}.", "i feel {mood}."]
NEWS = ["a reader sent us this.", "the {time} was {mood}.", "our staff looked into it.", "no one else spoke."]
FILLERS = {"mood": "long rough dull messy tense loud bad slow", "time": "day week month year night"}
FILLERS = {kind: words.split() for kind, words in FILLERS.items()}
OPENERS = ["ok so", "long story,"]
CLOSERS = ["any tips?", "thanks all."]

PLACE_SHARE = 0.85  # of posts that say where it happened
DECOY_SLOTS = ("who", "deed", "thing", "place", "plan")


@dataclass(frozen=True)
class World:
    """What posts are made of: sentences, in lists from which each is drawn equally often, and how long rows get."""

    version: int | str  # to be changed with grammar, writers or annotator: rows of another version are not reused
    core: list[str]
    place: list[str]
    plan: list[str]
    decoys: dict[str, list[str]]
    decoy_counts: tuple[int, ...]  # a post has so many decoys, each equally often
    decoy_share: float  # of the wrong facts of summaries: the decoy, which the post may mention; others it never has
    lengths: dict[str, int]  # tokens, EOS included, of which `tldr_dataset.py` and the stages are told; every row fits
    near_misses: tuple[str, ...] = ()  # stories that did not happen: up to two in a post
    core_anywhere: bool = False  # what happened is told anywhere, not in the first two sentences


EASY = World(
    version=2,
    core=CORE, place=PLACE, plan=PLAN, decoys=DECOYS, decoy_counts=(0, 1), decoy_share=0.2,
    lengths={
        "query": 56,  # TL;DR queries (mean 33)
        "sft_response": 24,  # reference summaries, and what a policy may generate (mean 10)
        "sft_query_response": 80,
        "rm_response": 32,  # either summary of a comparison
        "rm_query_response": 80,
        "cnndm_query": 128,
        "cnndm_rm_response": 32,
        "cnndm_rm_query_response": 160,
    },
)  # fmt: skip
# Where the size of a model matters: facts stand among stories that did not happen and corrections, some in words
# that are rare. {not_who} is a value that the sentence denies.
HARD = World(
    version="hard 1",
    core=[
        *CORE * 3, "guess what, my {who} {deed} my {thing}.", "it turns out my {who} {deed} my {thing}.",
        "my {thing}? my {who} {deed} it.", "my {who}, not my {not_who}, {deed} my {thing}.",
        "my {who} {deed} my {thing}, not my {not_thing}.", "so my {not_who}, no, my {who} {deed} my {thing}.",
    ],
    place=[
        *PLACE * 3, "it happened at the {place}.", "not at the {not_place}, at the {place}.",
        "this was at the {not_place}. no, make that the {place}.",
    ],
    plan=[
        *PLAN * 3, "should i {not_plan}? no, should i {plan}?", "i would like to {plan}, not {not_plan}.",
        "so do i {plan}?",
    ],
    decoys={
        "who": [*DECOYS["who"], "my {who} was asleep."],
        "deed": [*DECOYS["deed"], "it was not {deed}."],
        "thing": [*DECOYS["thing"], "my {thing} is fine."],
        "place": [*DECOYS["place"], "we were never at the {place}.", "the {place} was shut."],
        "plan": [*DECOYS["plan"], "i will not {plan}.", "my pal would {plan}."],
    },
    decoy_counts=(2, 3, 4), decoy_share=0.6, core_anywhere=True,
    near_misses=(
        "i dreamt my {who} {deed} my {thing}.", "in a film my {who} {deed} my {thing}.",
        "what if my {who} {deed} my {thing}?", "my {who} never {deed} my {thing}.",
        "my pal said his {who} {deed} his {thing}.",
    ),
    lengths=EASY.lengths | {
        "query": 104, "sft_query_response": 128, "rm_query_response": 128, "cnndm_query": 160,
        "cnndm_rm_query_response": 192,
    },
)  # fmt: skip
WORLDS = {"easy": EASY, "hard": HARD}


@dataclass(frozen=True)
class Writer:
    """How a scripted source writes. Every number is a probability."""

    core: float = 0.95  # each of who, deed, thing is mentioned
    place: float = 0.9  # the place is mentioned, if not terse
    plan: float = 0.9  # the plan is mentioned, if not terse
    terse: float = 0.3  # place and plan are both left out
    wrong: float = 0.04  # a fact is replaced by a wrong one
    decoy: float = EASY.decoy_share  # what is wrong is the decoy
    wordy: float = 0.08  # there is an opener; there is a closer
    repeat: float = 0.0  # the last fact is said twice
    scramble: float = 0.0  # the words are out of order


REFERENCE = Writer(core=0.92, place=0.88, plan=0.9, terse=0.5, wrong=0.05)
WRITERS = {
    "ref": REFERENCE,
    "sup1": Writer(core=0.8, place=0.6, plan=0.6, terse=0.4, wrong=0.12, wordy=0.15),
    "sup2": Writer(core=0.9, place=0.8, plan=0.8, terse=0.4, wrong=0.08, wordy=0.1),
    "sup3": Writer(terse=0.2, wrong=0.15, wordy=0.1, repeat=0.1),
    "sup4": Writer(core=0.97, place=0.95, plan=0.95, terse=0.1, wrong=0.06),
    "lead": Writer(core=0.7, terse=0.9, wordy=0.2),
    "sup4_rl": Writer(wrong=0.1, wordy=0.6, repeat=0.4, terse=0.1),
    "sup1_t1": Writer(wrong=0.3, repeat=0.15, scramble=0.15, wordy=0.15),
}
EDITED = ("sup4_t0.3", "sup4_t1")  # two samples in the same words, the second with facts wrong or left out
EDIT_SHARE = 0.75  # of comparisons between those two: mostly, only the post tells them apart
EDIT_WRITERS = [
    Writer(core=core, place=0.97, plan=0.97, terse=0.0, wordy=0.1, repeat=0.1, wrong=wrong)
    for core, wrong in ((0.98, 0.0), (0.94, 0.4))
]


def fill(text: str, rng: random.Random, facts: dict[str, str]) -> str:
    """Put facts, and random moods and times, into the braces of a template."""
    return re.sub(r"{(\w+)}", lambda m: rng.choice(FILLERS[m[1]]) if m[1] in FILLERS else facts[m[1]], text)


def other_values(rng: random.Random, facts: dict[str, str]) -> dict[str, str]:
    """Draw a value for each slot that is not the fact."""
    return {slot: rng.choice([v for v in values if v != facts[slot]]) for slot, values in VALUES.items()}


def write_post(rng: random.Random, world: World = EASY) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Draw a post. Returns its row (subreddit, title, post), its facts and its decoys (slot -> value)."""
    subreddit = rng.choice(list(SUBREDDITS))
    facts = {slot: rng.choice(values) for slot, values in VALUES.items()}
    facts["who"] = rng.choice(SUBREDDITS[subreddit])
    decoys = other_values(rng, facts)
    title = fill(rng.choice(TITLES), rng, facts)
    denying = facts | {f"not_{slot}": value for slot, value in decoys.items()}
    core, plan = fill(rng.choice(world.core), rng, denying), fill(rng.choice(world.plan), rng, denying)
    slots = rng.sample(DECOY_SLOTS, rng.choice(world.decoy_counts))
    rest = [fill(rng.choice(world.decoys[slot]), rng, decoys) for slot in slots]
    if world.near_misses:
        missed = rng.sample(world.near_misses, rng.choice((0, 1, 2)))
        rest += [fill(text, rng, other_values(rng, facts)) for text in missed]
    if rng.random() < PLACE_SHARE:
        rest.append(fill(rng.choice(world.place), rng, denying))
    else:
        del facts["place"]
    if rng.random() < 0.5:
        rest.append(fill(rng.choice(NEUTRAL), rng, facts))
    rng.shuffle(rest)
    rest.insert(rng.choice([len(rest), rng.randrange(len(rest) + 1)]), plan)
    rest.insert(rng.choice(range(len(rest) + 1) if world.core_anywhere else [0, 0, 1]), core)
    return {"subreddit": subreddit, "title": title, "post": " ".join(rest)}, facts, decoys


def write_article(rng: random.Random, world: World = EASY) -> tuple[str, dict[str, str], dict[str, str]]:
    """Draw a CNN/DM-like article: a post in the middle of news. Returns its text, facts and decoys."""
    row, facts, decoys = write_post(rng, world)
    before, after = ([fill(rng.choice(NEWS), rng, facts) for _ in range(rng.randint(2, 5))] for _ in range(2))
    return " ".join([*before, row["post"], *after]), facts, decoys


def write_summary(
    rng: random.Random,
    facts: dict[str, str],
    decoys: dict[str, str],
    writer: Writer,
    wrong_rng: random.Random | None = None,
) -> str:
    """Draw a summary (no leading space). `wrong_rng` draws what is wrong, so that two calls can share their words."""
    wrong_rng = wrong_rng or rng
    claims = dict(facts)
    for slot, fact in facts.items():
        if wrong_rng.random() < writer.wrong:
            absent = [v for v in VALUES[slot] if v not in (fact, decoys[slot])]
            claims[slot] = decoys[slot] if wrong_rng.random() < writer.decoy else wrong_rng.choice(absent)
    who, deed, thing = (claims[slot] if rng.random() < writer.core else None for slot in ("who", "deed", "thing"))
    terse, with_place, with_plan = (rng.random() < p for p in (writer.terse, writer.place, writer.plan))
    passive = rng.random() < 0.15
    if who and deed and thing:
        text = f"my {thing} was {deed} by my {who}" if passive else f"my {who} {deed} my {thing}"
    elif who and deed:
        text = f"my {who} {deed} it"
    elif deed and thing:
        text = f"my {thing} was {deed}"
    elif who and thing:
        text = f"my {who} and my {thing}"
    else:
        text = f"about my {who or thing}" if who or thing else f"it was {deed}" if deed else "it is bad"
    parts = []
    if "place" in claims and with_place and not terse:
        parts.append(f" at the {claims['place']}")
    if with_plan and not terse:
        parts.append(f", should i {claims['plan']}")
    if parts and rng.random() < writer.repeat:
        parts.append(parts[-1])
    text += "".join(parts) + ("?" if parts and "should" in parts[-1] else ".")
    if rng.random() < writer.wordy:
        text = f"{rng.choice(OPENERS)} {text}"
    if rng.random() < writer.wordy:
        text = f"{text} {rng.choice(CLOSERS)}"
    if rng.random() < writer.scramble:
        words = text.split()
        rng.shuffle(words)
        text = " ".join(words)
    return text


def make_query(row: dict[str, Any]) -> str:
    """The query that `tldr_dataset.py` builds from these columns."""
    if row.get("article") is not None:
        return f"Article:\n{row['article']}\n\nTL;DR:\n"
    return f"SUBREDDIT: r/{row['subreddit']}\n\nTITLE: {row['title']}\n\nPOST: {row['post']}\n\nTL;DR:"


# --------------------------------------------------------------------------------------------------------- annotator
def split_words(text: str) -> list[str]:
    """Words and punctuation marks, lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


@lru_cache(maxsize=100_000)
def read_facts(post: str) -> dict[str, str]:
    """The facts of a post or article, found in its text (slot -> value): the sentences that state them say so."""
    facts: dict[str, str] = {}
    for pattern in _fact_patterns():
        for match in pattern.finditer(post):
            facts |= {slot: value for slot, value in match.groupdict().items() if SLOT_OF.get(value) == slot}
    return facts


@cache
def _fact_patterns() -> list[re.Pattern]:
    facts = [*HARD.core, *HARD.place, *HARD.plan]  # the easy world's are among them; what corrects comes last
    named = [re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\w+)", re.escape(text)) for text in dict.fromkeys(facts)]
    return [re.compile(rf"(?:^|(?<=[.?!] )){text}") for text in named]


@cache
def _known_bigrams() -> frozenset[tuple[str, str]]:
    """Neighbouring words of well-formed summaries, slot values replaced by their slots."""
    rng, bigrams, writer = random.Random(0), set(), Writer(core=0.7, place=0.7, plan=0.7, wordy=0.4)
    for _ in range(6000):
        _, facts, decoys = write_post(rng)
        bigrams.update(_bigrams(write_summary(rng, facts, decoys, writer)))
    return frozenset(bigrams)


def _bigrams(summary: str) -> list[tuple[str, str]]:
    words = [f"<{SLOT_OF[word]}>" if word in SLOT_OF else word for word in split_words(summary)]
    return list(zip(["<start>", *words], [*words, "<end>"]))


def gold_score(post: str, summary: str) -> dict[str, float]:
    """The annotator's true opinion of a summary, from the two texts alone.

    Args:
        post: text of a post (or of a CNN/DM-like article), without subreddit and title.
        summary: text of a summary; a leading space or an end-of-text token does not matter.

    Returns:
        score: 4 coverage - wrong - 0.4 repeats - 0.3 bad_bigrams - 0.04 words - 0.1 (words over 16), in gold units.
        coverage: share of the post's facts that the summary states, 0..1. wrong: distinct claims that are no facts.
        repeats: claims made again. bad_bigrams: neighbours that no well-formed summary has. words: words and marks.
    """
    summary = summary.replace(EOS, "")
    facts, words = read_facts(post), split_words(summary)
    claims = [word for word in words if word in SLOT_OF]
    stated = set(claims)
    right = sum(fact in stated for fact in facts.values())
    parts = {
        "coverage": right / max(1, len(facts)),
        "wrong": len(stated) - right,
        "repeats": len(claims) - len(stated),
        "bad_bigrams": sum(bigram not in _known_bigrams() for bigram in _bigrams(summary)),
        "words": len(words),
    }
    score = 4 * parts["coverage"] - parts["wrong"] - 0.4 * parts["repeats"] - 0.3 * parts["bad_bigrams"]
    return {"score": score - 0.04 * len(words) - 0.1 * max(0, len(words) - 16), **parts}


def best_summary(post: str) -> str:
    """The best summary that the grammar has: all facts of the post, nothing else."""
    facts = read_facts(post)
    return write_summary(_Never(), facts, facts, Writer(core=2, place=2, plan=2, terse=0, wrong=0, wordy=0))


class _Never(random.Random):
    """A generator whose chances below one never come true."""

    def random(self) -> float:
        return 1.0


def preference_probability(first: float, second: float, noise: float = 0.5) -> float:
    """Probability that an annotator prefers the second summary.

    Args:
        first, second: gold scores. noise: of the annotator, in gold units: smaller is more reliable.
    """
    return 1 / (1 + math.exp(min(500.0, max(-500.0, (first - second) / noise))))


# -------------------------------------------------------------------------------------------------------------- rows
TRAIN_BATCHES = [f"batch{i}" for i in range(3, 11)]
VALIDATION_BATCHES = [f"batch{i}" for i in range(6, 15)]
CNNDM_BATCHES = ["batch0_cnndm", "cnndm0", "cnndm2"]
INFO_FIELDS = ("id", "post", "title", "subreddit", "article", "site")  # every row has all, null where it has none
WORKERS = {f"w_{i:02d}": noise for i, noise in enumerate([0.2, 0.25, 0.3, 0.3, 0.4, 0.5, 0.6, 0.9])}
"""Worker -> noise of the perceived difference, gold units."""


def draw_sft_rows(rng: random.Random, n: int, prefix: str, world: World = EASY) -> list[dict[str, str]]:
    """Draw n SFT rows: posts with reference summaries."""
    rows, writer = [], replace(REFERENCE, decoy=world.decoy_share)
    for i in range(n):
        row, facts, decoys = write_post(rng, world)
        rows.append({"id": f"{prefix}{i:06d}", **row, "summary": write_summary(rng, facts, decoys, writer)})
    return rows


def draw_comparisons(
    rng: random.Random, n: int, prefix: str, batches: list[str], world: World = EASY
) -> list[dict[str, Any]]:
    """Draw n comparisons of two summaries of one post (of one article where the batch is a CNN/DM one)."""
    return [draw_comparison(rng, f"{prefix}{i:06d}", rng.choice(batches), world) for i in range(n)]


def draw_comparison(rng: random.Random, id: str, batch: str, world: World = EASY) -> dict[str, Any]:
    """Draw a post, two differing summaries of it, and a worker who chooses the seemingly better one."""
    info: dict[str, str | None] = dict.fromkeys(INFO_FIELDS) | {"id": id}
    if batch in CNNDM_BATCHES:
        info["article"], facts, decoys = write_article(rng, world)
    else:
        row, facts, decoys = write_post(rng, world)
        info |= row
    texts, policies = ["", ""], ["", ""]
    write = lambda rng, writer, wrong_rng=None: write_summary(
        rng, facts, decoys, replace(writer, decoy=world.decoy_share), wrong_rng
    )
    while texts[0] == texts[1]:
        if rng.random() < EDIT_SHARE:
            policies, words = list(EDITED), rng.random()
            texts = [write(random.Random(words), writer, rng) for writer in EDIT_WRITERS]
        else:
            policies = rng.sample(list(WRITERS), 2)
            texts = [write(rng, WRITERS[policy]) for policy in policies]
    if rng.random() < 0.5:
        texts, policies = texts[::-1], policies[::-1]
    worker = rng.choice(list(WORKERS))
    first, second = (gold_score(info["post"] or info["article"], text)["score"] for text in texts)
    # The worker sees the difference through logistic noise: P(second) is then exactly `preference_probability`.
    u = min(1 - 1e-9, max(1e-9, rng.random()))
    perceived = second - first + WORKERS[worker] * math.log(u / (1 - u))
    strength = 1 + sum(abs(perceived) > edge for edge in (0.5, 1.0, 2.0))
    return {
        "info": info,
        "summaries": [{"text": f" {text}", "policy": policy, "note": ""} for text, policy in zip(texts, policies)],
        "choice": int(perceived > 0),
        "worker": worker,
        "batch": batch,
        "split": "train" if id.startswith("train") else rng.choice(["valid1", "valid2"]),
        "extra": {"confidence": 5 + strength if perceived > 0 else 5 - strength},
    }


# `load_dataset` takes the types of all files from the first one, where no row has an article: so they are written down.
COMPARISONS_CARD = """---
dataset_info:
  features:
  - name: info
    struct: [{FIELDS}]
  - name: summaries
    list: [{name: text, dtype: string}, {name: policy, dtype: string}, {name: note, dtype: string}]
  - {name: choice, dtype: int32}
  - {name: worker, dtype: string}
  - {name: batch, dtype: string}
  - {name: split, dtype: string}
  - name: extra
    struct: [{name: confidence, dtype: int32}]
---
Comparisons of the toy world of `toy_tldr.py`, in the schema of `openai/summarize_from_feedback`.
""".replace("{FIELDS}", ", ".join(f"{{name: {field}, dtype: string}}" for field in INFO_FIELDS))


def pair_gold(row: dict[str, Any]) -> tuple[float, float]:
    """Gold scores of the chosen and of the rejected summary of a comparison."""
    post, texts = row["info"]["post"] or row["info"]["article"], [s["text"] for s in row["summaries"]]
    return gold_score(post, texts[row["choice"]])["score"], gold_score(post, texts[1 - row["choice"]])["score"]


def annotator_ceiling(rows: list[dict[str, Any]]) -> float:
    """Share of comparisons whose choice has the higher gold score (ties: half): a perfect reward model's accuracy."""
    pairs = [pair_gold(row) for row in rows]
    return sum((chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in pairs) / len(pairs)


def blind_accuracy(
    train_rows: list[dict[str, Any]], validation_rows: list[dict[str, Any]], min_count: int = 20
) -> float:
    """Accuracy, on held-out comparisons, of a model that sees the two summaries but not the post.

    A logistic regression on differences of word, bigram (slot values named by their slots, too) and length counts.
    """

    def features(text: str) -> Counter:
        words = split_words(text)
        return Counter([*words, *_bigrams(text), f"{min(20, len(words))} words"])

    def differences(rows: list[dict[str, Any]]) -> list[Counter]:
        out = [features(row["summaries"][row["choice"]]["text"]) for row in rows]
        for counts, row in zip(out, rows):
            counts.subtract(features(row["summaries"][1 - row["choice"]]["text"]))
        return out

    train, held_out = differences(train_rows), differences(validation_rows)
    seen = Counter(feature for counts in train for feature in counts)
    columns = {feature: i for i, feature in enumerate(sorted((f for f in seen if seen[f] >= min_count), key=str))}

    def matrix(rows: list[Counter]) -> torch.Tensor:  # [rows, features]
        out = np.zeros((len(rows), len(columns)), dtype=np.float32)
        for row, counts in zip(out, rows):
            for feature in counts.keys() & columns.keys():
                row[columns[feature]] = counts[feature]
        return torch.from_numpy(out)

    x, weights = matrix(train), torch.zeros(len(columns), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = -F.logsigmoid(x @ weights).mean() + 1e-3 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    margins = matrix(held_out) @ weights.detach()
    return float(((margins > 0).float() + 0.5 * (margins == 0).float()).mean())


# ---------------------------------------------------------------------------------------------- tokenizer and models
SIZES = {"nano": (16, 2, 2), "tiny": (48, 2, 2), "small": (96, 3, 4), "medium": (144, 4, 4), "large": (192, 6, 6)}
"""Size -> hidden size, layers, heads."""


def train_tokenizer(world: World = EASY) -> "transformers.PreTrainedTokenizerFast":
    """Byte-level BPE of the grammar, in the class and with the special token (id 0) of the real tokenizer.

    Like there, no [PAD] is in it: the stages add it, as the next id. Any text can be encoded;
    words of the grammar are one token.
    """
    rng = random.Random(0)
    tokenizer = Tokenizer(BPE())
    headings = r"SUBREDDIT: r/|\n\nTITLE:|\n\nPOST:|\n\nTL;DR:|^Article:"
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(f"{headings}|{gpt2}"), "isolated")  # headings in one piece: shorter queries
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    texts = [f"{make_query(row)} {row['summary']}" for row in draw_sft_rows(rng, 3000, "", world)]
    texts += [make_query({"article": write_article(rng, world)[0]}) for _ in range(200)]
    templates = [*world.core, *world.place, *world.plan, *world.near_misses, *sum(world.decoys.values(), [])]
    templates = " ".join([*templates, *NEUTRAL, *NEWS, *OPENERS, *CLOSERS]).replace("{not_", "{")
    words = sorted({*SLOT_OF, *sum(FILLERS.values(), []), *re.findall(r"\w+", templates)})
    texts += [f" {word}" for word in words] * 30
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {"vocab_size": 4000, "min_frequency": 20, "show_progress": False}
    trainer = trainers.BpeTrainer(special_tokens=[EOS], initial_alphabet=alphabet, **options)
    tokenizer.train_from_iterator(texts, trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOS)
    options = {"add_prefix_space": False, "clean_up_tokenization_spaces": False, "model_max_length": MAX_POSITIONS}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **options)


def init_model(
    size: str, tokenizer: "transformers.PreTrainedTokenizerFast", seed: int
) -> "transformers.GPTNeoXForCausalLM":
    """A GPT-NeoX with random weights drawn from the seed, float32."""
    hidden, layers, heads = SIZES[size]
    config = transformers.GPTNeoXConfig(
        vocab_size=64 * math.ceil((len(tokenizer) + 2) / 64),  # room for the [PAD] that the stages add
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.set_seed(seed)
    model = transformers.GPTNeoXForCausalLM(config)
    # Words start out as similar to themselves in the head as in the embedding: copying is learned sooner.
    model.get_output_embeddings().weight.data.copy_(model.get_input_embeddings().weight.data)
    return model


# -------------------------------------------------------------------------------------------------------------- main
@dataclass
class Args:
    seed: int = 1
    """draws the rows and the initial weights"""
    world: Literal["easy", "hard"] = "easy"
    """easy: one decoy at most; hard: facts among decoys, corrections and stories that did not happen"""
    data_dir: Path = Path("data/toy")
    """folder for sft/ and comparisons/"""
    models_dir: Path = Path("models/toy")
    """folder for one model folder per size"""
    sizes: tuple[str, ...] = ("small", "medium", "large")
    """sizes of base models to write"""
    n_sft: int = 16000
    """SFT training rows"""
    n_sft_validation: int = 512
    """SFT validation rows, and as many test rows"""
    n_comparisons: int = 16000
    """training comparisons"""
    n_comparisons_validation: int = 1500
    """TL;DR comparisons in validation"""
    n_cnndm: int = 300
    """CNN/DM-like comparisons in validation"""
    overwrite: bool = False
    """replace what another call of this script has written"""


def check(args: Args) -> None:
    """Refuse what cannot work, before anything is written."""
    for name in ("n_sft", "n_sft_validation", "n_comparisons", "n_comparisons_validation", "n_cnndm"):
        if not 1 <= getattr(args, name) <= 1_000_000:
            refuse(name, str(getattr(args, name)), "a number of rows from 1 to 1000000")
    if not 0 <= args.seed < 2**32:
        refuse("seed", str(args.seed), "0 to 4294967295")
    if not args.sizes or not set(args.sizes) <= set(SIZES):
        refuse("sizes", repr(" ".join(args.sizes)), f"one or more of {' '.join(SIZES)}")
    if args.data_dir.resolve() == args.models_dir.resolve():
        refuse("models_dir", f"'{args.models_dir}', which is data_dir", "another folder")


def is_there(folder: Path, argument: str, made_with: dict[str, Any], overwrite: bool) -> bool:
    """Whether a folder holds just what would be written. Refuses a folder that holds anything else."""
    if not os.path.isdir(folder) or not any(folder.iterdir()):
        refuse_unwritable(argument, str(folder))
        return False
    try:
        found = json.loads((folder / MANIFEST).read_text())["made_with"]
        changed = ", ".join(f"{k} {found.get(k)}" for k in made_with if found.get(k) != made_with[k])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # never delete what is not ours
        refuse(argument, f"'{folder}' with files that are not from toy_tldr.py", "an empty or a new folder")
    if changed and not overwrite:
        refuse(argument, f"'{folder}' made with {changed}", "the same arguments, another folder, or --overwrite")
    return not changed


@contextlib.contextmanager
def replaced_folder(folder: Path, manifest: dict[str, Any]) -> Iterator[Path]:
    """Write a folder as a whole, manifest included; the one that `is_there` let us overwrite goes last."""
    with atomic_folder(str(folder)) as partial:
        yield partial
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)


def draw_rows(args: Args) -> dict[str, list[dict[str, Any]]]:
    """All rows of a seed: file (without .jsonl, under the data folder) -> rows."""

    world = WORLDS[args.world]

    def rng(name: str) -> random.Random:  # one generator for each file: more rows in one change nothing in another
        return random.Random(f"{args.seed} {name}")

    def sft(split: str, n: int, prefix: str) -> list[dict[str, Any]]:
        return draw_sft_rows(rng(f"sft/{split}"), n, prefix, world)

    def comparisons(name: str, n: int, prefix: str, batches: list[str]) -> list[dict[str, Any]]:
        return draw_comparisons(rng(name), n, prefix, batches, world)

    validation = comparisons("validation", args.n_comparisons_validation, "valid", VALIDATION_BATCHES)
    return {
        "sft/train": sft("train", args.n_sft, "train"),
        "sft/validation": sft("validation", args.n_sft_validation, "valid"),
        "sft/test": sft("test", args.n_sft_validation, "test"),
        "comparisons/train": comparisons("comparisons/train", args.n_comparisons, "train", TRAIN_BATCHES),
        "comparisons/validation": validation + comparisons("cnndm", args.n_cnndm, "cnndm", CNNDM_BATCHES),
    }


def measure(
    rows: dict[str, list[dict[str, Any]]], tokenizer: "transformers.PreTrainedTokenizerFast"
) -> dict[str, float]:
    """What the rows are like: token lengths (EOS included), gold scores of references, ceiling and blind accuracy."""

    def longest(texts: list[str]) -> int:
        return max(map(len, tokenizer(texts)["input_ids"]))

    sft = [row for name in rows if name.startswith("sft/") for row in rows[name]]
    comparisons = rows["comparisons/train"] + rows["comparisons/validation"]
    cnndm = [row for row in comparisons if row["batch"] in CNNDM_BATCHES]
    tldr = [row for row in comparisons if row["batch"] not in CNNDM_BATCHES]
    held_out = [row for row in rows["comparisons/validation"] if row["batch"] not in CNNDM_BATCHES]
    lengths = {
        "query": longest([make_query(row) for row in sft] + [make_query(row["info"]) for row in tldr]),
        "sft_response": longest([f" {row['summary']}{EOS}" for row in sft]),
        "sft_query_response": longest([f"{make_query(row)} {row['summary']}{EOS}" for row in sft]),
    }
    for name, group in {"rm": tldr, "cnndm_rm": cnndm}.items():
        pairs = [(make_query(row["info"]), summary["text"] + EOS) for row in group for summary in row["summaries"]]
        if name == "cnndm_rm":
            lengths["cnndm_query"] = longest([query for query, _ in pairs])
        lengths[f"{name}_response"] = longest([text for _, text in pairs])
        lengths[f"{name}_query_response"] = longest([query + text for query, text in pairs])
    validation = rows["sft/validation"]
    shuffled = validation[1:] + validation[:1]
    gold = {
        "reference": [gold_score(row["post"], row["summary"])["score"] for row in validation],
        "shuffled_reference": [gold_score(a["post"], b["summary"])["score"] for a, b in zip(validation, shuffled)],
        "best_summary": [gold_score(row["post"], best_summary(row["post"]))["score"] for row in validation],
    }
    return {
        **{f"tokens/{name}": length for name, length in lengths.items()},
        **{f"gold/{name}": round(sum(scores) / len(scores), 4) for name, scores in gold.items()},
        "rm/ceiling": round(annotator_ceiling(held_out), 4),
        "rm/ceiling_cnndm": round(annotator_ceiling(cnndm), 4),
        "rm/blind": round(blind_accuracy(rows["comparisons/train"], held_out), 4),
    }


def main(args: Args) -> dict[str, Any]:
    """Write what is not there yet. Returns the numbers of the closing table."""
    check(args)
    # ------------------------------------------------------------------------------------------- what is there already
    own, world = ("world", "data_dir", "models_dir", "sizes", "overwrite"), WORLDS[args.world]
    data_made_with = {"world": world.version, **{k: v for k, v in asdict(args).items() if k not in own}}
    have_data = is_there(args.data_dir, "data_dir", data_made_with, args.overwrite)
    models = {size: {"world": world.version, "seed": args.seed, "size": size} for size in args.sizes}
    have = {s: is_there(args.models_dir / s, "models_dir", made, args.overwrite) for s, made in models.items()}
    # -------------------------------------------------------------------------------------------------- rows and models
    tokenizer = None if have_data and all(have.values()) else train_tokenizer(world)
    if not have_data:
        rows = draw_rows(args)
        measured = measure(rows, tokenizer)
        for name, limit in world.lengths.items():
            assert measured[f"tokens/{name}"] <= limit, f"{name}: {measured[f'tokens/{name}']} tokens > {limit}"
        measured = {f"rows/{name}": len(file_rows) for name, file_rows in rows.items()} | measured
        with replaced_folder(args.data_dir, {"made_with": data_made_with, "measured": measured}) as folder:
            for name, file_rows in rows.items():
                path = folder / f"{name}.jsonl"
                path.parent.mkdir(exist_ok=True)
                path.write_text("".join(json.dumps(row) + "\n" for row in file_rows))
            (folder / "comparisons" / "README.md").write_text(COMPARISONS_CARD)
    for size in (size for size in args.sizes if not have[size]):
        model = init_model(size, tokenizer, args.seed)
        parameters = sum(p.numel() for p in model.parameters())
        with replaced_folder(args.models_dir / size, {"made_with": models[size], "parameters": parameters}) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            # transformers 5 writes its own new name of the class: keep the one that every reader knows.
            config = json.loads((folder / "tokenizer_config.json").read_text())
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    # ---------------------------------------------------------------------------------------------------- closing table
    result = json.loads((args.data_dir / MANIFEST).read_text())["measured"]
    table = Table("", "value", "limit", title=f"toy TL;DR, {args.world}, seed {args.seed}")
    for name, value in result.items():
        table.add_row(name, f"{value:,}", str(world.lengths.get(name.removeprefix("tokens/"), "")))
    for size in args.sizes:
        parameters = json.loads((args.models_dir / size / MANIFEST).read_text())["parameters"]
        result[f"parameters/{size}"] = parameters
        table.add_row(f"parameters/{size}", f"{parameters:,}", "")
    console = Console()
    console.print(table)
    for folder, there in [(args.data_dir, have_data), *((args.models_dir / s, there) for s, there in have.items())]:
        console.print(f"{folder}{' is there already, made with the same arguments' if there else ' written'}")
    return result


if __name__ == "__main__":
    command_line(main, Args)
