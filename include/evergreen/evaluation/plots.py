"""Figures of an evaluation as PNG files: the same predictions give the same bytes.

matplotlib by its objects only: no pyplot, no state shared with anybody, no display.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evergreen.errors import visible
from evergreen.evaluation.metrics import BINS, Array, Rows, calibration_bins, curve, value
from evergreen.run import Importance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0f766e", "#c2410c", "#6d28d9", "#64748b")
"""Challenger first; of equal lightness, and told apart by the colour-blind."""
INK = "#1f2937"
FAINT = "#94a3b8"
POINTS = 400
"""A curve of 13 000 thresholds is drawn by as many points as its figure can show."""
LABEL = 32
"""Most characters of a name beside an axis."""
LABELLED = 20
"""Most classes whose names and counts still fit into a confusion matrix, and columns into a figure."""


def draw(models: Mapping[str, Rows], folder: Path) -> list[Path]:
    """Draw the figures of a kind of target into `folder` (made if need be); the files, in order of the list below.

    binary: `roc.png`, `precision_recall.png`, `calibration.png`; multiclass: `confusion.png`; regression:
    `predicted_and_true.png`. `models`: name for the legend → the same rows as each model predicts them, challenger
    first. Raises EvaluationError where a metric is undefined on them.
    """
    task = next(iter(models.values())).task
    if task == "binary":
        figures = {
            "roc": _roc(models),
            "precision_recall": _precision_recall(models),
            "calibration": _calibration(models),
        }
    elif task == "multiclass":
        figures = {"confusion": _confusion(models)}
    else:
        figures = {"predicted_and_true": _predicted_and_true(models)}
    folder.mkdir(parents=True, exist_ok=True)
    return [_save(figure, folder / f"{name}.png") for name, figure in figures.items()]


def draw_importance(importance: Sequence[Importance], metric: str, folder: Path) -> Path:
    """`importance.png` in `folder`: each column's loss with its interval; of many columns the furthest from nought."""
    told = {each.column for each in sorted(importance, key=lambda each: -abs(each.loss.value))[:LABELLED]}
    shown = [each for each in importance if each.column in told]
    figure, (axes,) = _panels(1, width=5.2)
    for place, each in enumerate(shown):
        colour = COLOURS[0] if each.loss.value > 0 else COLOURS[1]
        axes.barh(place, each.loss.value, height=0.62, color=colour, linewidth=0)
        if each.loss.low is not None and each.loss.high is not None:
            axes.plot([each.loss.low, each.loss.high], [place, place], color=INK, linewidth=1)
    axes.axvline(0, color=FAINT, linewidth=1)
    axes.set_yticks(range(len(shown)), [_label(each.column) for each in shown], fontsize=9, parse_math=False)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    rest = f", {len(shown)} of {len(importance)} columns" if len(importance) > len(shown) else ""
    _words(axes, f"What it leans on{rest}", f"loss of {metric} when the column is shuffled, with its interval", "")
    return _save(figure, folder / "importance.png")


def _roc(models: Mapping[str, Rows]) -> Figure:
    figure, axes = _panel("ROC", "share of negatives called positive", "share of positives found")
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=(0, (4, 3)), label="chance  0.500")
    for colour, (name, rows) in zip(_colours(models), models.items(), strict=True):
        area = value(rows, "roc_auc")  # refuses rows of one class before they are divided by
        tp, fp = (np.concatenate(([0.0], counts)) for counts in curve(rows, np.ones(rows.partitions)))
        x, y = _thinned(fp / fp[-1], tp / tp[-1])
        axes.plot(x, y, color=colour, linewidth=1.8, label=f"{name}  {area:.3f}")
    _square(axes, 1.0)
    _legend(axes, "lower right", "area under the curve")
    return figure


def _precision_recall(models: Mapping[str, Rows]) -> Figure:
    figure, axes = _panel(
        "Precision and recall", "recall: share of positives found", "precision: share right of those called"
    )
    share = float(next(iter(models.values())).truth.mean())
    axes.axhline(share, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), label=f"chance  {share:.3f}")
    for colour, (name, rows) in zip(_colours(models), models.items(), strict=True):
        tp, fp = curve(rows, np.ones(rows.partitions))
        # The first few rows alone make the line jump between 0 and 1; a hundredth of the positives says something.
        told = tp >= 0.01 * tp[-1]
        x, y = _thinned((tp / tp[-1])[told], (tp / (tp + fp))[told])
        axes.plot(x, y, color=colour, linewidth=1.8, label=f"{name}  {value(rows, 'average_precision'):.3f}")
    _square(axes, 1.0)
    _legend(axes, "upper right", "average precision")
    return figure


def _calibration(models: Mapping[str, Rows]) -> Figure:
    figure, axes = _panel(
        "Calibration",
        f"predicted probability, mean of each of {BINS} bins of equal size",
        "share of positives in the bin",
    )
    top = 0.0
    lines = []
    for name, rows in models.items():
        bins = calibration_bins(rows)
        sizes = np.bincount(bins, minlength=BINS)
        there = sizes > 0
        x = np.bincount(bins, weights=rows.predicted, minlength=BINS)[there] / sizes[there]
        y = np.bincount(bins, weights=rows.truth, minlength=BINS)[there] / sizes[there]
        top = max(top, float(x.max()), float(y.max()))
        lines.append((f"{name}  {value(rows, 'calibration_error'):.3f}", x, y))
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=(0, (4, 3)), label="perfect  0.000")
    for colour, (label, x, y) in zip(_colours(models), lines, strict=True):
        axes.plot(x, y, color=colour, linewidth=1.4, marker="o", markersize=4.5, markeredgewidth=0, label=label)
    _square(axes, min(1.0, np.ceil(top * 10 + 0.3) / 10))
    _legend(axes, "upper left", "calibration error")
    return figure


def confusion(models: Mapping[str, Rows]) -> dict[str, Array]:
    """Of each model, (k, k) rows by true and by predicted class, in the order of `_together`."""
    classes = _together(models)
    k = len(classes)
    cells = {}
    for name, rows in models.items():
        place = np.array([classes.index(each) for each in rows.classes])
        true, chosen = place[rows.truth], place[rows.predicted.argmax(axis=1)]
        cells[name] = np.bincount(true * k + chosen, minlength=k * k).reshape(k, k)
    return cells


def _together(models: Mapping[str, Rows]) -> list[Any]:
    """The classes that any of the models knows, or the rows have; sorted where they have an order."""
    classes = list(dict.fromkeys(each for rows in models.values() for each in rows.classes))
    try:
        return sorted(classes)
    except TypeError:  # of a target that was numbers, and is text now
        return classes


def _confusion(models: Mapping[str, Rows]) -> Figure:
    from matplotlib.colors import LinearSegmentedColormap

    classes, cells_of = _together(models), confusion(models)
    k = len(classes)
    shades = LinearSegmentedColormap.from_list("shares", ["#ffffff", COLOURS[0]])
    figure, panels = _panels(len(models), width=max(4.6, 0.42 * min(k, LABELLED) + 1.6))
    for axes, (name, rows) in zip(panels, models.items(), strict=True):
        cells = cells_of[name]
        shares = cells / np.maximum(cells.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap=shades, vmin=0, vmax=1)
        _words(axes, f"{name}: accuracy {value(rows, 'accuracy'):.3f}", "predicted class", "true class")
        axes.grid(visible=False)
        if k <= LABELLED:
            labels = [_label(str(each)) for each in classes]
            axes.set_xticks(range(k), labels, rotation=0 if k <= 12 else 90, parse_math=False)
            axes.set_yticks(range(k), labels, parse_math=False)
            for row, column in np.argwhere(cells > 0):
                ink = "white" if shares[row, column] > 0.55 else INK
                axes.text(column, row, str(cells[row, column]), ha="center", va="center", fontsize=8, color=ink)
    return figure


def _predicted_and_true(models: Mapping[str, Rows]) -> Figure:
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("rows", ["#d5ebe8", COLOURS[0], "#06302c"])
    figure, panels = _panels(len(models), width=4.6)
    every = np.concatenate([np.concatenate((rows.truth, rows.predicted)) for rows in models.values()])
    least, most = float(every.min()), float(every.max())
    for axes, (name, rows) in zip(panels, models.items(), strict=True):
        axes.hexbin(
            rows.truth,
            rows.predicted,
            gridsize=45,
            bins="log",
            mincnt=1,
            cmap=shades,
            extent=(least, most, least, most),
            linewidths=0.1,
        )
        axes.plot([least, most], [least, most], color=COLOURS[1], linewidth=1, linestyle=(0, (4, 3)))
        axes.set_aspect("equal")
        title = f"{name}: RMSE {value(rows, 'rmse'):.4g}, R² {value(rows, 'r2'):.3f}"
        _words(axes, title, "true value", "predicted value (darker: more rows)")
    return figure


def _panel(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure, (axes,) = _panels(1, width=5.2)
    _words(axes, title, x, y)
    return figure, axes


def _panels(many: int, width: float) -> tuple[Figure, list[Axes]]:
    """A figure of `many` square panels beside one another, each `width` inches wide."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(
        figsize=(width * many, width),
        dpi=120,
        facecolor="white",
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12),
    )
    panels = [figure.add_subplot(1, many, place + 1) for place in range(many)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.tick_params(colors=INK, labelsize=9, length=3)
        axes.grid(color="#e2e8f0", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, panels


def _label(name: str) -> str:
    """A name of the data's as it fits beside an axis, on one line."""
    line = visible(" ".join(name.split()))
    return line if len(line) <= LABEL else f"{line[: LABEL - 1]}…"


def _words(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=12, color=INK, loc="left", pad=10)
    axes.set_xlabel(x, fontsize=9.5, color=INK)
    axes.set_ylabel(y, fontsize=9.5, color=INK)


def _square(axes: Axes, top: float) -> None:
    room = 0.015 * top
    axes.set_xlim(-room, top + room)
    axes.set_ylim(-room, top + room)
    axes.set_aspect("equal")


def _legend(axes: Axes, place: str, title: str) -> None:
    legend = axes.legend(
        loc=place, title=title, fontsize=9, title_fontsize=9, labelcolor=INK, framealpha=0.9, edgecolor="none"
    )
    legend.get_title().set_color(INK)
    legend.set_alignment("left")


def _colours(models: Mapping[str, Rows]) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(len(models))]


def _thinned(x: Array, y: Array) -> tuple[Array, Array]:
    """At most `POINTS` points of a curve, evenly spread along its length, both ends kept."""
    along = np.concatenate(([0.0], np.cumsum(np.hypot(np.diff(x), np.diff(y)))))
    places = np.unique(np.searchsorted(along, np.linspace(0, along[-1], POINTS)).clip(max=len(x) - 1))
    return x[places], y[places]


def _save(figure: Figure, file: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # drawn as boxes
        FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
    return file
