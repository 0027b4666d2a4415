"""What SFT, the reward model and PPO reached on real posts, with intervals: the table of `make real`.

Reads   runs/<chain>_{sft,reward,ppo}, the reward model's runs of other seeds (`<chain>_reward_seed2`, ...), and what
        two reward models have judged: the one that PPO was trained with, and one of another seed
Writes  <output_dir>/<name>.{md,csv}, and the table into the documents that show it

Intervals are of 95 %, over posts: whole posts are resampled. A difference is of the same posts.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas
from algorithms import write_table
from intervals import mean_interval, show

from summarize_from_feedback_details.common.arguments import command_line, refuse
from summarize_from_feedback_details.common.files import refuse_uncreatable
from summarize_from_feedback_details.common.run_files import read_lines, read_run
from summarize_from_feedback_details.common.text_metrics import describe_text
from summarize_from_feedback_details.sft import rouge_scores

RUNS = Path("runs")


@dataclass
class Args:
    chains: tuple[str, ...]
    """chains to report, one a column"""
    output_dir: str = "docs/images"
    """folder of the table"""
    name: str = "real"
    """its name"""
    documents: tuple[str, ...] = ("README.md", "docs/results.md")
    """documents that show the table, between `<!-- TABLE -->` and `<!-- /TABLE -->`, where TABLE is its path"""


def over_posts(values: pandas.Series | np.ndarray, posts: pandas.Series, shares: bool = False) -> str:
    """Mean and interval, as text."""
    return show(mean_interval(np.asarray(values, float), posts.to_numpy(), 2000, 1, shares))


def rouge_l(table: pandas.DataFrame) -> np.ndarray:
    """ROUGE-L of each response against its reference."""
    return np.array(rouge_scores(list(table["response"]), list(table["reference"]))["rougeL"])


def read_sft(chain: str) -> dict[str, str]:
    """ROUGE-L of the base model and of SFT on all posts of validation and test."""
    tables = {
        prefix: pandas.concat(
            pandas.read_parquet(RUNS / f"{chain}_sft/tables/{prefix}{split}.parquet")
            for split in ("validation", "test")
        )
        for prefix in ("base_", "")
    }
    base, sft = tables["base_"], tables[""]
    if list(base["query"]) != list(sft["query"]):
        raise ValueError("the base model and SFT answered other posts")
    posts, before, after = sft["query"], rouge_l(base), rouge_l(sft)
    return {
        "posts of validation and test": str(len(posts)),
        "ROUGE-L: base model": over_posts(before, posts),
        "ROUGE-L: SFT": over_posts(after, posts),
        "ROUGE-L: gain of SFT": over_posts(after - before, posts),
    }


def other_seeds(chain: str) -> list[Path]:
    """The reward model's runs of other seeds; the first one's model judges as well."""
    found = (run for run in RUNS.glob(f"{chain}_reward_seed*") if re.fullmatch(r".*_seed\d+", run.name))
    return sorted(found, key=lambda run: int(run.name.rpartition("_seed")[2]))


def read_reward(chain: str) -> dict[str, str]:
    """Accuracy on the validation comparisons: of each seed, and of the mean of all seeds."""
    rows, right = {}, []
    for run in (RUNS / f"{chain}_reward", *other_seeds(chain)):
        pairs = pandas.read_parquet(run / "tables/validation.parquet")
        right.append((pairs["chosen_reward"] > pairs["rejected_reward"]).to_numpy(float))
        rows[f"reward model: accuracy, seed {read_run(run)[1]['seed']}"] = over_posts(right[-1], pairs["query"], True)
    rows[f"reward model: accuracy, mean of {len(right)} seeds"] = over_posts(np.mean(right, 0), pairs["query"])
    return {"validation comparisons": str(len(pairs))} | rows


def read_ppo(chain: str) -> dict[str, str]:
    """PPO against SFT on the validation posts, by two reward models and by what the texts are like."""
    rows, names = {}, {"reward": "the reward model it was trained with"}
    names |= {run.name.removeprefix(f"{chain}_"): "one that it never saw" for run in other_seeds(chain)[:1]}
    for judge, name in names.items():
        sft, ppo = (
            pandas.read_parquet(RUNS / f"{chain}_{stage}/judge/{judge}/verdicts.parquet") for stage in ("sft", "ppo")
        )
        sft, ppo = (table.assign(copy=table.groupby("query").cumcount()) for table in (sft, ppo))
        both = sft.merge(ppo, on=["query", "copy"], suffixes=("_sft", "_ppo"))
        rows[f"PPO minus SFT: score of {name}"] = over_posts(both["score_ppo"] - both["score_sft"], both["query"])
        rows[f"PPO: wins against references, by {name}"] = over_posts(ppo["outcome"], ppo["query"], True)
    tables = {
        stage: pandas.read_parquet(RUNS / f"{chain}_{stage}/tables/validation.parquet") for stage in ("sft", "ppo")
    }
    for stage, table in tables.items():
        texts = pandas.DataFrame([describe_text(q, text) for q, text in zip(table["query"], table["response"])])
        posts, upper = table["query"], stage.upper()
        rows[f"{upper}: ROUGE-L"] = over_posts(rouge_l(table), posts)
        rows[f"{upper}: words"] = over_posts(texts["words"], posts)
        rows[f"{upper}: share of 4-grams copied from the post"] = over_posts(texts["copied_post"], posts)
        rows[f"{upper}: responses that end"] = over_posts(table["has_eos"].astype(float), posts, True)
    lines = [line for line in read_lines(RUNS / f"{chain}_ppo/metrics.jsonl") if "objective/kl" in line]
    last = lines[-1]
    rows["PPO: KL to SFT, nats, last update"] = (
        f"{last['objective/kl']:.2f} (s.e. {last['objective/kl_standard_error']:.2f})"
    )
    return rows | {"PPO: updates": str(len(lines))}


def main(args: Args) -> pandas.DataFrame:
    """Write the table; returns it, a column a chain."""
    refuse_uncreatable("output_dir", args.output_dir, f"{args.name}.csv")
    columns = {}
    for chain in args.chains:
        try:
            columns[chain] = read_sft(chain) | read_reward(chain) | read_ppo(chain)
            for stage in ("sft", "reward", "ppo"):
                minutes = read_run(RUNS / f"{chain}_{stage}")[0]["wall_clock_seconds"] / 60
                columns[chain][f"minutes, {stage}"] = f"{minutes:.0f}"
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            expected = "a chain of eval/real.sh that has run and was judged"
            refuse("chains", f"'{chain}', which cannot be read ({type(error).__name__}: {error})", expected)
    table = pandas.DataFrame(columns)
    write_table(table.fillna("-"), Path(args.output_dir, args.name), args.documents)
    return table


if __name__ == "__main__":
    command_line(main, Args)
