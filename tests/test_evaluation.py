"""common/evaluation.py by hand: which rows come together, what a stop does, which rows are the first ones."""

import pytest
from datasets import Dataset

from summarize_from_feedback_details.common import run_folder
from summarize_from_feedback_details.common.evaluation import first_rows, for_each_row, gather_rows, print_samples


def test_each_row_once_and_the_longest_first():
    assert list(for_each_row([3, 9, 5, 9, 1], 2, "rows")) == [[1, 3], [2, 0], [4]]
    assert gather_rows([(2, "c"), (0, "a"), (1, "b")]) == [(0, "a"), (1, "b"), (2, "c")]


def test_a_stop_ends_an_evaluation_after_the_rows_at_hand(monkeypatch):
    seen = []
    with pytest.raises(SystemExit) as stopped:
        for rows in for_each_row([1, 2, 3], 1, "rows"):
            seen += rows
            monkeypatch.setitem(run_folder._stop, "wanted", True)
        gather_rows([])
    assert seen == [2] and stopped.value.code == run_folder.REQUEUE_ME


def test_first_rows():
    rows = Dataset.from_dict({"a": [1, 2, 3]})
    assert [len(first_rows(rows, number)) for number in (None, 2, 9)] == [3, 2, 3]


def test_samples_are_shown_with_their_scores(capsys):
    found = {"query": ["q"], "response": ["r"], "reference": ["s"]}
    print_samples(found)
    print_samples(found | {"score": [1.5]})
    assert capsys.readouterr().out == ("q\n  policy:    r\n  reference: s\nq\n  policy (+1.50): r\n  reference: s\n")
