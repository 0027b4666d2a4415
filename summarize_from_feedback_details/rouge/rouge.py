"""ROUGE as an `evaluate` metric that loads without the hub: `evaluate.load("<this folder>")`."""

import datasets
import evaluate
from rouge_score import rouge_scorer

TYPES = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
CITATION = "Lin, C.-Y. (2004). ROUGE: A package for automatic evaluation of summaries."


class Rouge(evaluate.Metric):
    """F-measures of ROUGE-1/2/L/Lsum, without stemming (as `evaluate`'s own metric by default).

    `compute(predictions, references)` returns a list of one number in [0, 1] per row for each type; the mean over the
    whole split is the caller's (a mean of per-batch means would weigh rows of a short batch more).
    """

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(
            description=self.__doc__, citation=CITATION, inputs_description="texts", features=features
        )

    def _compute(self, predictions, references):
        scorer = rouge_scorer.RougeScorer(TYPES)
        scores = [scorer.score(target=r, prediction=p) for p, r in zip(predictions, references)]
        return {name: [score[name].fmeasure for score in scores] for name in TYPES}
