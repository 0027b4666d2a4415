"""Win rate of policies against the reference summaries, or of one policy against another.

Reads   the table of responses of a run (`runs/<run>/tables/validation.parquet`), or any parquet, csv or jsonl file with
        the columns `query, response, reference`; for two policies, two of them joined on the query
Writes  report.json, report.md and verdicts.parquet (one row a post) in runs/<run>/judge/<judge>

Gold    python eval/judge.py --run toy_small_seed1_sft toy_small_seed1_ppo
Server  OPENAI_API_KEY=... python eval/judge.py --judge openai --model gpt-4o-mini --max_requests 2000 --run my_ppo
Local   python eval/judge.py --judge openai --base_url http://localhost:8000/v1 --model Qwen/Qwen3-8B --run my_ppo
Reward  python eval/judge.py --judge reward --reward_model models/reward --run my_ppo
Two     python eval/judge.py --run my_ppo --against my_sft --paired_difference
Trust   python eval/judge.py --run my_ppo --calibrate data/comparisons

The server is asked about every pair in both orders. A pair is won, or lost, when both answers say so, and a tie when
they disagree. An answer that cannot be read is asked for again, then counted apart, never guessed. A question that the
server refuses, or fails at, is counted apart as well, if it answers others; where it answers none, the set-up is at
fault, and everything stops. Every answer is in the cache on disk before the next one is asked for: start a stopped
command again and it goes on. Failures are not kept.

Deviates: the original asked each pair once, in a random order, and turned an unreadable answer into a coin flip.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas
from ask_server import THOUGHTS, ask_server, check_server, one_line, server_address
from calibration import agreements, calibration_rows, position_bias, read_pairs, summarise_calibration
from intervals import (
    corrected_win_rate,
    length_controlled_win_rate,
    mean_and_variance,
    mean_interval,
    show,
)
from rich.table import Table
from scipy.special import expit

from summarize_from_feedback_details.common.arguments import command_line, refuse
from summarize_from_feedback_details.common.console import Progress, print_table, quiet_libraries
from summarize_from_feedback_details.common.files import atomic_folder, refuse_uncreatable, write_json
from summarize_from_feedback_details.common.machine import on_gpu
from summarize_from_feedback_details.common.text_metrics import describe_text

HERE = Path(__file__).resolve().parent
LENGTH_RATIOS = (0.0, 0.5, 0.75, 0.9, 1.1, 1.33, 2.0, math.inf)  # words of the response over words of the reference
CALIBRATION_BINS = 10
NEAR_EQUAL = 0.1  # lengths that differ by this share of the reference, or less, are nearly equal
PREFERRED = re.compile(r"""(?ix)
    (?: \A | (?<=\w) (?= [^\w\n]*+ \n | [^\w.!?;:]*+ [.!?;:] [^\w\s]*+ \s))  # first on a line, or behind a sentence
    \W*+ preferred \W++ (?:summary \W++)? ([ab]) \b
    (?= [^\w\n]*+ (?:\n | \Z) | \W++ preferred)  # last on a line, or said once more
""")  # possessive (*+, ++): long rows of dots, as models repeat them, are read once
TEXTS = ("query", "response", "reference")  # columns of a table of responses
COPYING = ("copied_post", "copied_title", "repetition")  # of a text, see `describe_text`
# a policy is flagged where the whole 95 % interval is beyond these
LONGER = 1.5  # times the words of the other side
COPIES = 0.2  # share of 4-grams from the post or the title, more than the other side has
REPEATS = 0.05  # share of 4-grams said again, more than the other side has
ENDS = 0.9  # share of responses that end with EOS, fewer than this


@dataclass
class Args:
    run: tuple[str, ...] = ()
    """policies to judge: names of runs, or files (parquet, csv, jsonl) with query, response, reference"""
    against: str | None = None
    """judge against this policy (a run or a file), instead of against the reference summaries"""
    paired_difference: bool = False
    """with --against: also judge both against the references; the difference of their win rates is paired by post"""
    split: str = "validation"
    """which table of a run: validation or test"""
    updates: bool = False
    """also judge the tables that a PPO run with --eval_freq wrote on its way"""
    num_rows: int | None = None
    """first rows of each table, and of --calibrate, only (default: all)"""
    calibrate: str | None = None
    """raw comparisons (folder or hub id): how often the judge agrees with the people who chose; win rates of --run are
    then also given corrected for its errors"""
    calibrate_split: str = "validation"
    """split of --calibrate: validation, or validation_cnndm for the comparisons of articles"""
    truth: Literal["choice", "gold"] = "choice"
    """with --calibrate: who is right, the people who chose, or the toy world's annotator without its noise"""
    judge: Literal["gold", "reward", "openai"] = "gold"
    """gold: the toy world's annotator; reward: a reward model; openai: a server that speaks OpenAI's protocol"""
    name: str | None = None
    """name of the report (default: gold, or the last part of the model's name)"""
    runs_dir: str = str(HERE.parent / "runs")
    """folder of the runs"""
    output_dir: str | None = None
    """folder of the reports (default: `judge` in the run's folder, or beside the file)"""

    # statistics
    bootstrap: int = 2000
    """resamples of the posts, for the intervals"""
    seed: int = 1
    """seed of the resampling"""

    # a reward model as judge
    reward_model: str | None = None
    """reward model or any sequence-classification model with one label: folder or hub id"""
    reward_model_revision: str | None = None
    """its hub revision"""
    reward_tokenizer: str | None = None
    """its tokenizer, where the checkpoint has none: folder or hub id"""
    batch_size: int = 32
    """rows of one forward pass of the reward model"""

    # a server as judge; the key is read from OPENAI_API_KEY
    base_url: str | None = None
    """address of the server, e.g. http://localhost:8000/v1 (default: that in OPENAI_BASE_URL, else OpenAI's)"""
    model: str = "gpt-3.5-turbo-0125"
    """model to ask (default: the paper's judge)"""
    prompt: str = str(HERE / "judge_prompt.txt")
    """file of the question, with {post}, {summary_a} and {summary_b}"""
    temperature: float = 0.0
    """sampling temperature of the first answer; one that cannot be read is asked for again at 1.0"""
    max_tokens: int = 200
    """tokens of an answer at most"""
    concurrency: int = 16
    """questions asked at the same time"""
    timeout: float = 60.0
    """seconds of silence until an answer is given up"""
    max_attempts: int = 8
    """attempts at one question; at the start each is at another question, and where all fail, everything stops"""
    first_wait: float = 1.0
    """seconds before the second attempt; doubled each time, unless the server says how long to wait"""
    max_asks: int = 3
    """how often to ask until an answer can be read"""
    max_failures: float = 0.5
    """share of the questions that the server may refuse, or fail at, before everything stops"""
    max_requests: int | None = None
    """budget: requests sent at most by this command, those that fail included"""
    price_in: float | None = None
    """US dollars per million tokens read, for the estimate"""
    price_out: float | None = None
    """US dollars per million tokens written, for the estimate"""
    cache: str = str(HERE / "judge_cache.sqlite")
    """file of all answers; several processes may share it"""


# ----------------------------------------------------------------------------------------------------------------------
# tables of responses


def find_table(argument: str, policy: str, args: Args, split: str) -> Path:
    """File of a policy's responses: that of a run, or the file itself."""
    if Path(policy).suffix in (".parquet", ".csv", ".jsonl"):
        if not Path(policy).is_file():
            refuse(argument, f"'{policy}', which is not there", "a run, or a parquet, csv or jsonl file")
        return Path(policy)
    folder = Path(args.runs_dir) / policy
    if "/" in policy or not folder.is_dir():
        refuse(argument, f"'{policy}', and no such run in {args.runs_dir}", "a run, or a parquet, csv or jsonl file")
    table = folder / "tables" / f"{split}.parquet"
    if not table.is_file():
        there = ", ".join(sorted(p.stem for p in (folder / "tables").glob("*.parquet"))) or "none"
        refuse(argument, f"run '{policy}' without a table '{split}' (its tables: {there})", "a run that was evaluated")
    return table


def read_jsonl(path: Path) -> pandas.DataFrame:
    """Rows as they are: pandas' own reader makes numbers of texts, and nothing of half a character.

    Raises:
        ValueError: a line that cannot be read; its number is named.
    """
    rows = []
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                rows.append(dict(json.loads(line)))
                json.dumps(rows[-1], ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ValueError(f"line {number} holds half a character") from None
            except (ValueError, TypeError) as error:
                raise ValueError(f"line {number}: {error}") from None
    return pandas.DataFrame(rows)


def read_table(argument: str, path: Path) -> pandas.DataFrame:
    """Rows with `query, response, reference`, and a column `copy` that counts rows of the same query."""
    read = {
        ".parquet": pandas.read_parquet,
        ".csv": lambda p: pandas.read_csv(
            p, keep_default_na=False, dtype=dict.fromkeys(TEXTS, str), encoding="utf-8-sig"
        ),
        ".jsonl": read_jsonl,
    }[path.suffix]
    try:
        table = read(path)
    except (ValueError, OSError) as error:
        found = f"'{path}', which cannot be read: {one_line(error, 120)}"
        refuse(argument, found, "a table of responses")
    missing = [c for c in TEXTS if c not in table]
    if missing:
        found = f"'{path}' without a column {', '.join(missing)}"
        refuse(argument, found, "a table of responses: query, response, reference")
    if len(table) == 0:
        refuse(argument, f"'{path}' without rows", "a table of responses")
    for column in TEXTS:
        bad = table.index[~table[column].map(lambda v: isinstance(v, str))]
        if len(bad):
            refuse(argument, f"'{path}' whose row {bad[0]} has no text in '{column}'", "a text in each row")
    for column in {"score", "reference_score"} & set(table):
        table[column] = pandas.to_numeric(table[column], errors="coerce")
    return table.assign(copy=table.groupby("query").cumcount())


def join_policies(table: pandas.DataFrame, other: pandas.DataFrame, argument: str, other_name: str, cut: bool):
    """Pairs of two policies on the same posts: the other's response takes the reference's place.

    Args:
        cut: whether the first table is only the beginning of its file: what else the other one has is then not missing.

    Returns:
        (pairs with `query, response, reference` and the scores of both, number of posts that only one of them has).
    """
    known = [c for c in ("score", "has_eos") if c in table and c in other]
    left = table[["query", "copy", "response", *known]]
    right = other[["query", "copy", "response", *known]].rename(
        columns={"response": "reference", "score": "reference_score", "has_eos": "reference_has_eos"}
    )
    both = left.merge(right, on=["query", "copy"])
    if len(both) == 0:
        refuse(argument, f"'{other_name}', which has no query in common", "responses to the same posts")
    return both, len(left) + (0 if cut else len(right)) - (1 if cut else 2) * len(both)


# ----------------------------------------------------------------------------------------------------------------------
# judges: pairs -> outcome (1 the response wins, 0.5 tie, 0 it loses, NaN unreadable), and scores where a judge has them


def outcome_of_scores(scores: np.ndarray, reference_scores: np.ndarray) -> np.ndarray:
    """1, 0.5 (equal up to 1e-9) or 0 for each pair: [N], [N] -> [N]."""
    return 0.5 + 0.5 * np.sign(np.where(np.abs(scores - reference_scores) <= 1e-9, 0.0, scores - reference_scores))


def judge_by_gold(pairs: pandas.DataFrame) -> pandas.DataFrame:
    """The toy world's annotator, without its noise. The post is read from the query."""
    from summarize_from_feedback_details.toy_tldr import gold_score, read_facts

    texts = [query.partition("\n\nPOST: ")[2] or query.removeprefix("Article:\n") for query in pairs["query"]]
    posts = [text.rpartition("\n\nTL;DR:")[0] for text in texts]
    for query, post in zip(pairs["query"], posts):
        if not read_facts(post):
            refuse("judge", f"gold, and a post that is not of the toy world: {query[:40]!r}", "reward or openai")
    columns = {}
    for name, column in (("", "response"), ("reference_", "reference")):
        opinions = [gold_score(post, text) for post, text in zip(posts, pairs[column])]
        columns[f"{name}score"] = np.array([o["score"] for o in opinions])
        columns[f"{name}invented"] = np.array([float(o["wrong"] > 0) for o in opinions])
    return pandas.DataFrame({"outcome": outcome_of_scores(columns["score"], columns["reference_score"]), **columns})


def tokenise(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of texts as `tldr_dataset.py` makes them, and PPO and the viewer read: nothing is added.

    A text that says `[PAD]` says just that, though the tokenizer of a checkpoint knows it as the pad token.
    """
    from summarize_from_feedback_details.common.check_inputs import PAD_TOKEN
    from summarize_from_feedback_details.tldr_dataset import encode

    split = lambda text: tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [split(text) if PAD_TOKEN in text else ids for text, ids in zip(texts, encode(tokenizer, texts))]


def judge_by_reward(pairs: pandas.DataFrame, model, tokenizer, batch_size: int) -> pandas.DataFrame:
    """A reward model: the reward at the last token of query and response, an end-of-text token behind it."""
    import torch

    from summarize_from_feedback_details.common.reward_models import read_rewards

    # a response that was cut off has no end-of-text token, neither here nor when it was sampled
    ended = [str(e) != "False" for side in ("", "reference_") for e in pairs.get(f"{side}has_eos", [True] * len(pairs))]
    queries = tokenise(tokenizer, list(pairs["query"]))
    responses = tokenise(tokenizer, [f" {text.strip()}" for text in [*pairs["response"], *pairs["reference"]]])
    end = [tokenizer.eos_token_id]
    tokens = [query + response + end * has_end for query, response, has_end in zip(2 * queries, responses, ended)]
    scores, progress = np.zeros(len(tokens)), Progress("rewards", len(tokens))
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        with torch.no_grad():
            scores[part] = read_rewards(model, [tokens[i] for i in part]).tolist()
        progress.step(len(part))
    scores, reference_scores = np.split(scores, 2)
    outcome = outcome_of_scores(scores, reference_scores)
    return pandas.DataFrame({"outcome": outcome, "score": scores, "reference_score": reference_scores})


def judge_by_server(pairs: pandas.DataFrame, args: Args, sent: list[int]) -> pandas.DataFrame:
    """A language model behind a server, asked about each pair in both orders."""
    template = Path(args.prompt).read_text("utf-8")
    same = [a.strip() == b.strip() for a, b in zip(pairs["response"], pairs["reference"])]
    rows = list(zip(pairs["query"], pairs["response"], pairs["reference"]))
    asked = [i for i in range(len(rows)) if not same[i]]  # equal texts are a tie: nothing to ask
    # one order of all posts, then the other: the first questions are about different posts
    questions = {(i, 0): fill_prompt(template, *rows[i]) for i in asked}
    questions |= {(i, 1): fill_prompt(template, rows[i][0], *rows[i][:0:-1]) for i in asked}
    answers, failures = ask_server(questions, args, sent, read_answer)
    first = [answers.get((i, 0)) for i in range(len(pairs))]
    second = [answers.get((i, 1)) for i in range(len(pairs))]
    outcome = [0.5 if s else outcome_of_answers(a, b) for s, a, b in zip(same, first, second)]
    failed = [failures.get((i, 0), failures.get((i, 1))) for i in range(len(pairs))]
    return pandas.DataFrame({"outcome": outcome, "first_answer": first, "second_answer": second, "failure": failed})


def fill_prompt(template: str, query: str, summary_a: str, summary_b: str) -> str:
    """The question; texts are put in as they are, braces included."""
    texts = {"post": query.removesuffix("TL;DR:").strip(), "summary_a": summary_a.strip(), "summary_b": summary_b.strip()}  # noqa: E501  # fmt: skip
    return re.sub(r"{(post|summary_a|summary_b)}", lambda field: texts[field[1]], template)


def read_answer(text: str | None) -> str | None:
    """`A` or `B`, or None where the answer names neither, or both, in its closing sentence.

    >>> read_answer("The first invents a boss.\\nPreferred: B"), read_answer("Preferred: both")
    ('B', None)
    """
    text = THOUGHTS.sub("", text or "").rstrip()
    text = re.sub(r"(?<!\s)(\s*+<([/|｜]\S{1,30}|\w\w{1,30})>)+$", "", text)  # a token such as </s>, written out
    text = re.match(r"(?s)(.*\w)?", text)[0]  # a rule below the answer is none of it
    if re.fullmatch(r"\W*[AB]", text):
        return text[-1]
    found = list(PREFERRED.finditer(text))  # the last one must be at the very end
    named = {match[1].upper() for match in found}
    return named.pop() if len(named) == 1 and found[-1].end() == len(text) else None


def outcome_of_answers(first: str | None, second: str | None) -> float:
    """Both orders together; in the first one the response is A, in the second one it is B."""
    if first is None or second is None:
        return math.nan
    return 0.5 * (first == "A") + 0.5 * (second == "B")


# ----------------------------------------------------------------------------------------------------------------------
# statistics


def agreement(verdicts: pandas.DataFrame, interval: Callable) -> dict[str, Any]:
    """How far the reward model's scores of the table agree with the judge, and whether their sizes mean what they say.

    A reward model claims P(win) = sigmoid(score - reference score). Ties of the judge are left out.
    """
    decided = verdicts[verdicts["outcome"].isin([0.0, 1.0])].dropna(subset=["rm_score", "rm_reference_score"])
    if len(decided) == 0:
        return {"posts": 0}
    claimed = expit(decided["rm_score"] - decided["rm_reference_score"]).to_numpy()
    won, posts = decided["outcome"].to_numpy(), decided["query"].to_numpy()
    right = np.where(claimed == 0.5, 0.5, (claimed > 0.5) == (won == 1.0))
    bins = []
    for part in np.array_split(np.argsort(claimed, kind="stable"), min(CALIBRATION_BINS, len(decided))):
        observed = interval(won[part], posts[part])
        bins.append({"posts": len(part), "claimed": float(claimed[part].mean()), "win_rate": observed})
    error = sum(b["posts"] * abs(b["claimed"] - b["win_rate"]["mean"]) for b in bins) / len(decided)
    return {
        "posts": len(decided),
        "share": interval(right, posts),
        "expected_calibration_error": error,
        "calibration": bins,
    }


def describe_texts(verdicts: pandas.DataFrame, interval: Callable) -> dict[str, Any]:
    """Copying and repetition of both sides, and `flags`: in what a policy differs far from the other side."""
    posts, found, flags = verdicts["query"].to_numpy(), {}, []
    words = verdicts["response_words"] - LONGER * verdicts["reference_words"]
    if (interval(words, posts, shares=False)["low"] or 0) > 0:
        flags.append("long")
    for name, most in zip(COPYING, (COPIES, COPIES, REPEATS)):
        sides = {side: verdicts[f"{side}_{name}"] for side in ("response", "reference")}
        found[name] = {side: interval(values, posts, shares=False) for side, values in sides.items()}
        if (interval(sides["response"] - sides["reference"], posts, shares=False)["low"] or 0) > most:
            flags.append(name)
    if "has_eos" in verdicts:
        found["eos_rate"] = interval(verdicts["has_eos"], posts)
        if (found["eos_rate"]["high"] or 1) < ENDS:
            flags.append("no_end")
    return found | {"flags": flags}


def summarise(verdicts: pandas.DataFrame, args: Args) -> dict[str, Any]:
    """All numbers of a report from one row a post; see docs/judge.md for what each is."""
    posts, outcomes = verdicts["query"].to_numpy(), verdicts["outcome"].to_numpy(float)
    interval = lambda values, where, shares=True: mean_interval(values, where, args.bootstrap, args.seed, shares)
    read = ~np.isnan(outcomes)
    words, reference_words = verdicts["response_words"].to_numpy(), verdicts["reference_words"].to_numpy()
    near = np.abs(words - reference_words) <= NEAR_EQUAL * np.maximum(1, reference_words)
    report = {
        "posts": len(verdicts),
        "unreadable": int((~read).sum()),
        "wins": int((outcomes == 1).sum()),
        "ties": int((outcomes == 0.5).sum()),
        "losses": int((outcomes == 0).sum()),
        "win_rate": interval(outcomes, posts),
        "length_controlled_win_rate": length_controlled_win_rate(outcomes, words - reference_words, posts),
        "near_equal_length": {**interval(outcomes[near], posts[near]), "posts": int((read & near).sum())},
        "response_words": interval(words, posts, shares=False),
        "reference_words": interval(reference_words, posts, shares=False),
        "by_length_ratio": [],
    }
    ratio = words / np.maximum(1, reference_words)
    for low, high in zip(LENGTH_RATIOS, LENGTH_RATIOS[1:]):
        part = read & (ratio >= low) & (ratio < high)
        if part.any():
            found = interval(outcomes[part], posts[part])
            upper = high if math.isfinite(high) else None
            report["by_length_ratio"].append({"from": low, "to": upper, "posts": int(part.sum()), "win_rate": found})
    if "score" in verdicts:
        report["mean_score"] = interval(verdicts["score"], posts, shares=False)
        report["reference_mean_score"] = interval(verdicts["reference_score"], posts, shares=False)
        report["score_difference"] = interval(verdicts["score"] - verdicts["reference_score"], posts, shares=False)
    if "invented" in verdicts:
        report["invented"] = interval(verdicts["invented"], posts)
        report["reference_invented"] = interval(verdicts["reference_invented"], posts)
    report["text"] = describe_texts(verdicts, interval)
    if "first_answer" in verdicts:
        report |= position_bias(verdicts, interval)
    if "failure" in verdicts:
        report["failed"] = int(verdicts["failure"].notna().sum())
        report["failures"] = verdicts["failure"].value_counts().head(5).to_dict()  # the most frequent reasons
    if "rm_score" in verdicts:
        report["agreement"] = agreement(verdicts, interval)
    return report


# ----------------------------------------------------------------------------------------------------------------------
# reports


def report_rows(report: dict[str, Any]) -> dict[str, str]:
    """What is shown of a report: label -> text."""
    rows = {"win rate": show(report["win_rate"]), "length-controlled": show(report["length_controlled_win_rate"])}
    near = report["near_equal_length"]
    rows["seen at nearly equal length"] = f"{show(near)} ({near['posts']} posts)"
    rows["wins / ties / losses"] = f"{report['wins']} / {report['ties']} / {report['losses']}"
    rows["unreadable pairs"] = str(report["unreadable"])
    if report.get("failed"):
        reason = next(iter(report["failures"])).replace("|", "/")
        rows["of these, failed at the server"] = f"{report['failed']}, e.g. {reason}"
    rows["words"] = show(report["response_words"])
    rows["words of the other side"] = show(report["reference_words"])
    names = {"mean_score": "score", "reference_mean_score": "score of the other side", "invented": "invents something"}
    names |= {"reference_invented": "other side invents something", "first_position_preferred": "first one preferred"}
    rows |= {label: show(report[key]) for key, label in names.items() if key in report}
    if report.get("agreement", {}).get("posts"):
        rows["reward model agrees"] = show(report["agreement"]["share"])
        rows["its calibration error"] = f"{report['agreement']['expected_calibration_error']:.3f}"
    if "win_rate_difference" in report:
        rows["win rate, difference"] = show(report["win_rate_difference"])
    if "corrected_win_rate" in report:
        rows["win rate, corrected for the judge"] = show(report["corrected_win_rate"])
    for name in COPYING:
        both = report["text"][name]
        rows[name.replace("_", " from the ")] = f"{show(both['response'])} (other side {show(both['reference'])})"
    rows["flagged"] = ", ".join(report["text"]["flags"]) or "nothing"
    return rows


def write_report(folder: Path, report: dict[str, Any], verdicts: pandas.DataFrame, rows: dict[str, str]) -> None:
    """Write a report's folder as a whole; one that is there and says something else is set aside."""
    if (folder / "report.json").is_file():
        if json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report)):
            return
        n = 1
        while (aside := folder.with_name(f"{folder.name}.old-{n}")).exists():
            n += 1
        folder.rename(aside)
        print(f"another report was there: now {aside}", flush=True)
    with atomic_folder(str(folder)) as partial:
        write_json(partial / "report.json", report)
        verdicts.to_parquet(partial / "verdicts.parquet")
        lines = [f"| {label} | {text} |" for label, text in rows.items()]
        lines = [f"| {report['policy']} | 95 % interval |", "|---|---|", *lines]
        (partial / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def check_args(args: Args) -> None:
    """Refuse what cannot work."""
    if not args.run and not args.calibrate:
        refuse("run", "nothing", "names of runs, or files with query, response, reference; or --calibrate")
    if args.truth == "gold" and not args.calibrate:
        refuse("truth", "gold without --calibrate", "comparisons of the toy world")
    for name in ("num_rows", "bootstrap", "batch_size", "max_tokens", "concurrency", "timeout", "max_attempts",
                 "max_asks", "max_requests", "first_wait"):  # fmt: skip
        value = getattr(args, name)
        if value is not None and not value > 0:
            refuse(name, str(value), "a number above 0")
    if args.paired_difference and not args.against:
        refuse("paired_difference", "no --against", "two policies")
    if args.seed < 0:
        refuse("seed", str(args.seed), "a number of at least 0")
    if not 0 <= args.max_failures <= 1:
        refuse("max_failures", str(args.max_failures), "a share from 0 to 1")
    if args.temperature < 0:
        refuse("temperature", str(args.temperature), "a number of at least 0")
    if args.judge == "reward" and not args.reward_model:
        refuse("reward_model", "nothing", "the reward model that judges: a folder or hub id")
    if args.judge == "openai":
        fields = ("{post}", "{summary_a}", "{summary_b}")
        try:
            text = Path(args.prompt).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            found = f"'{args.prompt}', which cannot be read ({one_line(error)})"
            refuse("prompt", found, f"a file with {', '.join(fields)}")
        if missing := [field for field in fields if field not in text]:
            refuse("prompt", f"'{args.prompt}' without {', '.join(missing)}", "all three of post and summaries")
        check_server(args)


def make_judge(args: Args) -> tuple[str, Callable[[pandas.DataFrame], pandas.DataFrame]]:
    """The judge's name and its function from pairs to verdicts; refuses a reward model that cannot be loaded."""
    if args.judge == "gold":
        return args.name or "gold", judge_by_gold
    if args.judge == "openai":
        name = args.name or args.model.rstrip("/").split("/")[-1]
        sent = [0]  # requests of all tables together: the budget is the command's
        return name, lambda pairs: judge_by_server(pairs, args, sent)
    from summarize_from_feedback_details.common.check_inputs import find_model, find_tokenizer
    from summarize_from_feedback_details.common.reward_models import load_reward_model

    find_model("reward_model", args.reward_model, args.reward_model_revision, "reward")
    if args.reward_tokenizer:
        tokenizer = find_tokenizer("reward_tokenizer", args.reward_tokenizer)
    else:
        tokenizer = find_tokenizer("reward_model", args.reward_model, args.reward_model_revision)
    loaded = []

    def judge(pairs: pandas.DataFrame) -> pandas.DataFrame:
        if not loaded:
            model = load_reward_model(args.reward_model, args.reward_model_revision, "reward_model")
            loaded.append(model.eval().to("cuda" if on_gpu() else "cpu"))
        return judge_by_reward(pairs, loaded[0], tokenizer, args.batch_size)

    return args.name or Path(args.reward_model).name, judge


def judge_table(pairs: pandas.DataFrame, judge: Callable) -> pandas.DataFrame:
    """Verdicts on pairs, with what the table knew: lengths in words, scores of the reward model."""
    pairs = pairs.reset_index(drop=True)
    texts = pairs[["query", "response", "reference"]]
    known = {}
    for side in ("response", "reference"):
        found = pandas.DataFrame([describe_text(query, text) for query, text in zip(texts["query"], texts[side])])
        known |= {f"{side}_{name}": found[name] for name in found}
    if "has_eos" in pairs:
        known["has_eos"] = [float(str(ended) != "False") for ended in pairs["has_eos"]]
    if {"score", "reference_score"} <= set(pairs):
        known |= {"rm_score": pairs["score"], "rm_reference_score": pairs["reference_score"]}
    same = [a.strip() == b.strip() for a, b in zip(texts["response"], texts["reference"])]
    return pandas.concat([texts, pandas.DataFrame({**known, "same": same}), judge(pairs)], axis=1)


def short_name(policy: str) -> str:
    """A run's name, or a file's without its suffix; a dot in a run's name (`kl0.05`) is part of it."""
    path = Path(policy)
    return path.stem if path.suffix in (".parquet", ".csv", ".jsonl") else path.name


def report_folder(policy: str, name: str, args: Args) -> Path:
    """Where a policy's report goes."""
    if args.output_dir:
        return Path(args.output_dir) / short_name(policy) / name
    if Path(policy).suffix in (".parquet", ".csv", ".jsonl"):
        return Path(policy).with_suffix("") / "judge" / name
    return Path(args.runs_dir) / policy / "judge" / name


def calibrate(comparisons: pandas.DataFrame, judge: Callable, name: str, folder: Path, args: Args) -> dict[str, Any]:
    """Judge comparisons whose better side is known; writes and returns the report."""
    verdicts = judge_table(comparisons, judge).assign(strength=comparisons["strength"])
    truth = comparisons["truth"]
    if args.truth == "gold":
        truth = judge_by_gold(comparisons)["outcome"].replace(0.5, math.nan)  # equally good: nobody is right
    verdicts["agreement"] = agreements(verdicts["outcome"], truth)
    label = f"{args.calibrate}, {args.calibrate_split}, against the {args.truth}"
    report = {"judge": name, "policy": label, "made_with": asdict(args)}
    report |= summarise_calibration(verdicts, args.bootstrap, args.seed)
    rows = calibration_rows(report)
    write_report(folder, report, verdicts, rows)
    shown = Table("", label, title=f"calibration of {name}")
    for row in rows.items():
        shown.add_row(*row)
    print_table(shown)
    print(f"calibration: {folder}/report.json, report.md, verdicts.parquet")
    return report


def main(args: Args) -> dict[str, dict[str, Any]]:
    """Judge every policy; returns policy (and update) -> report, and `calibration` -> its report."""
    quiet_libraries()
    check_args(args)
    comparisons = args.calibrate and read_pairs(args.calibrate, args.calibrate_split, args.num_rows, args.seed)
    tables = {p: read_table("run", find_table("run", p, args, args.split)) for p in args.run}
    other = read_table("against", find_table("against", args.against, args, args.split)) if args.against else None
    name, judge = make_judge(args)
    judge_name = name
    if args.against:
        name += f"_against_{short_name(args.against)}"
    jobs = {}  # folder of the report -> (label, rows, pairs, posts of one policy only)

    def add(label: str, folder: Path, table: pandas.DataFrame) -> None:
        table = table.head(args.num_rows or len(table))
        joined = other is not None and join_policies(table, other, "against", args.against, bool(args.num_rows))
        if folder in jobs:
            found = f"'{label}' and '{jobs[folder][0]}', whose reports would both be {folder}"
            refuse("run", found, "one command for each")
        refuse_uncreatable("output_dir", folder)
        jobs[folder] = (label, table, *(joined or (table, 0)))

    # a table that does not fit is refused before the first one is judged
    for policy, table in tables.items():
        folder = report_folder(policy, name, args)
        add(policy, folder, table)
        if args.updates:
            found = (Path(args.runs_dir) / policy / "tables").glob(f"{args.split}_*.parquet")
            for update, path in sorted((int(p.stem.split("_")[-1]), p) for p in found):
                add(f"{policy}, update {update}", folder / f"update_{update}", read_table("run", path))
    reports, calibration = {}, None
    if args.calibrate:
        folder = Path(args.output_dir or HERE / "reports") / f"calibration_{judge_name}"
        refuse_uncreatable("output_dir", folder)
        calibration = reports["calibration"] = calibrate(comparisons, judge, judge_name, folder, args)
    for folder, (label, table, pairs, left_out) in jobs.items():
        verdicts = judge_table(pairs, judge)
        report = {"judge": name, "policy": label, "against": args.against or "references", "made_with": asdict(args)}
        if args.judge == "openai":
            report["server"] = server_address(args)
        report |= summarise(verdicts, args)
        if calibration:
            observed = mean_and_variance(verdicts["outcome"], verdicts["query"])
            trusted = calibration["agreement"]["mean"], calibration["agreement_variance"]
            report["corrected_win_rate"] = corrected_win_rate(observed, trusted)
        if args.against:
            report["posts_of_one_policy_only"] = left_out
        if args.paired_difference:
            posts = pairs[["query", "copy"]]  # that both have
            mine, others = (judge_table(posts.merge(t), judge)["outcome"] for t in (table, other))
            difference = (mine - others).to_numpy()
            report["win_rate_difference"] = mean_interval(difference, posts["query"], args.bootstrap, args.seed)
        write_report(folder, report, verdicts, report_rows(report))
        reports[label] = report
    columns = {label: report_rows(report) for label, report in reports.items() if label != "calibration"}
    shown = Table("", *columns, title=f"judged by {name}")
    for row in dict.fromkeys(row for column in columns.values() for row in column):
        shown.add_row(row, *(column.get(row, "-") for column in columns.values()))
    if columns:
        print_table(shown)
    for folder, (label, *_) in jobs.items():
        print(f"{label}: {folder}/report.json, report.md, verdicts.parquet")
    return reports


if __name__ == "__main__":
    command_line(main, Args)
