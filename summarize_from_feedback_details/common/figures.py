"""Figures of matplotlib that look the same on every machine, whatever its settings are."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from summarize_from_feedback_details.common.files import write_whole


@contextlib.contextmanager
def drawing(**settings: Any) -> Iterator[None]:
    """matplotlib with its own defaults and these settings, whatever MPLBACKEND and a matplotlibrc say."""
    os.environ["MPLBACKEND"] = "agg"  # one that is not installed (a notebook's) would refuse the import
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield


def new_figure(width: float, height: float):
    """A figure of so many inches with a canvas of its own; inside `drawing`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(figsize=(width, height), layout="constrained")).figure


def save_figure(figure: Any, path: str | Path, dpi: int) -> None:
    """Write a PNG, whole or not at all."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=dpi)
    write_whole(path, image.getvalue())
