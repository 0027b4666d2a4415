"""What a response is like as a text, beside its post and its reference: length, copying, repetition.

A policy that is pushed against a reward model may learn to please it in these ways instead of summarising better.
"""

import re
from typing import Any

import numpy as np

NGRAM = 4  # words
QUERY = re.compile(r"(?s)\bTITLE: (?P<title>.*?)\n\nPOST: (?P<post>.*)\n\nTL;DR:\s*\Z")


def ngrams(text: str) -> list[tuple[str, ...]]:
    """Runs of NGRAM words, lower case, in order.

    >>> ngrams("My boss, he sold it.")
    [('my', 'boss', 'he', 'sold'), ('boss', 'he', 'sold', 'it')]
    """
    words = re.findall(r"\w+", text.lower())
    return list(zip(*(words[i:] for i in range(NGRAM))))


def share_in(found: list[tuple[str, ...]], text: str) -> float:
    """Share of n-grams that also stand in a text; 0 where there are none."""
    there = set(ngrams(text))
    return sum(gram in there for gram in found) / max(1, len(found))


def describe_text(query: str, response: str) -> dict[str, float]:
    """One response: number of words, and shares of its n-grams.

    Args:
        query: as `tldr_dataset.py` makes it. In a query of another form all of it counts as the post.

    Returns:
        words; copied_post, copied_title: share of the n-grams that stand in the post, in the title; repetition: share
        of the n-grams that are there a second time.
    """
    parts, found = QUERY.search(query), ngrams(response)
    return {
        "words": float(len(response.split())),
        "copied_post": share_in(found, parts["post"] if parts else query),
        "copied_title": share_in(found, parts["title"] if parts else ""),
        "repetition": (len(found) - len(set(found))) / max(1, len(found)),
    }


def text_metrics(rows: Any, tokens: Any, tokenizer: Any) -> dict[str, float]:
    """Metrics `text/...` of a batch of responses: means, and the length as a multiple of the references'.

    Args:
        rows: of the dataset, with the columns `query` and `reference_response`, in the order of the responses.
        tokens: tensor [B, R] of the ids of the responses, pads after them.
    """
    responses = tokenizer.batch_decode(tokens.tolist(), skip_special_tokens=True)
    found = [describe_text(query, response) for query, response in zip(rows["query"], responses)]
    means = {name: float(np.mean([row[name] for row in found])) for name in found[0]}
    references = [len(text.replace(tokenizer.eos_token, "").split()) for text in rows["reference_response"]]
    return {"text/length_ratio": means.pop("words") / max(1.0, float(np.mean(references)))} | {
        f"text/{name}": value for name, value in means.items()
    }
