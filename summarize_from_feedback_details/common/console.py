"""What a person sees of a run: progress, tables, and nothing of the libraries' own notices."""

import sys
import time
from typing import Any

SECONDS_BETWEEN_LINES = 10.0  # progress in a log file: at most one line in this time


class Progress:
    """Progress of long work on rank 0: a bar on a terminal, a plain line every ten seconds in a file.

    Args:
        what: what is counted, e.g. `sft updates`.
        total: how many there will be.
        is_main: whether this process is rank 0.
        done: how many were done before.
    """

    def __init__(self, what: str, total: int, is_main: bool = True, done: int = 0):
        self.what, self.total, self.is_main, self.done, self.done_before = what, total, is_main, done, done
        self.start, self.last, self.bar = time.monotonic(), -SECONDS_BETWEEN_LINES, None
        if is_main and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=what, initial=done)

    def step(self, n: int = 1, note: str = "") -> None:
        """Count `n` more as done; `note` (e.g. the loss) stands at the end of the line."""
        self.done += n
        if self.bar is not None:
            self.bar.set_postfix_str(note)
            self.bar.update(n)
            if self.done >= self.total:
                self.bar.close()
        elif self.is_main and (time.monotonic() - self.last > SECONDS_BETWEEN_LINES or self.done >= self.total):
            spent, self.last = time.monotonic() - self.start, time.monotonic()
            left = spent / (self.done - self.done_before) * (self.total - self.done)
            print(f"{self.what}: {self.done}/{self.total}  {spent:.0f} s, {left:.0f} s left  {note}", flush=True)


def print_table(table: Any) -> None:
    """Print a `rich.table.Table`; in a log file as wide as its words need, so that none is cut."""
    from rich.console import Console

    if sys.stdout.isatty():
        Console().print(table)
        return
    for column in table.columns:
        texts = list(map(str, [column.header, *column.cells]))
        column.min_width = max(map(len, texts if column.no_wrap else " ".join(texts).split()), default=0)
    Console(width=120).print(table, crop=False)


def print_metrics(title: str, metrics: dict[str, float], names: tuple[str, ...]) -> None:
    """The closing table of a run: the named metrics, and those of its last evaluation."""
    from rich.table import Table

    table = Table(title, "last value")
    for name in (*names, *(name for name in metrics if name.startswith("eval/"))):
        table.add_row(name, f"{metrics[name]:.4f}")
    print_table(table)


def quiet_libraries() -> None:
    """Keep the libraries' own notices, and their progress bars where there is no terminal, out of the output."""
    import logging

    import datasets
    import transformers

    # DeepSpeed sets its own level when it is imported: a filter stays
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
