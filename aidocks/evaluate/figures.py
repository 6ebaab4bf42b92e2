"""Pictures of models beside one another, drawn without a display and without global state."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from aidocks.evaluate.comparison import significant
from aidocks.picture import png
from aidocks.specs.perplexities import ModelPerplexity

_LONGEST_NAME = 28
_BLUE, _AMBER, _GREEN = "#1f4e79", "#b8860b", "#2e7d32"
_COLORS = {"base": "#8a97a3", "average": _AMBER}
#: Beyond these a picture is no longer read: what is left out is said, and is in the report's numbers.
_MOST_PANELS, _MOST_MODELS = 12, 15


def draw_perplexities(
    models: Sequence[ModelPerplexity], titles: Sequence[str], texts: Sequence[str]
) -> bytes:
    """Draw the perplexity of every model on every text as a PNG, one panel a text with an axis of its own.

    Args:
        models: Each with the same domains; the last is the result. One that is called like a domain has a star there.
        titles: What people call each model.
        texts: What people call each domain.
    """
    shown = list(zip(models, titles, strict=True))
    hidden = max(0, len(shown) - _MOST_MODELS)
    # Rivals and result stay: the base comes first, the average and the result last.
    shown = shown[: _MOST_MODELS - 2] + shown[len(shown) - 2 :] if hidden else shown
    models, titles = [model for model, _ in shown], [short_name(title) for _, title in shown]
    panels = min(len(texts), _MOST_PANELS)
    columns = panels if panels <= 3 else 2 if panels == 4 else 3
    rows = ceil(panels / columns)
    size = (1.6 + 2.7 * columns, 0.6 + (0.75 + 0.17 * len(models)) * rows)
    figure = Figure(figsize=size, layout="constrained")
    for number, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if number >= panels:
            axes.set_axis_off()
            continue
        _draw_domain(axes, models, number, texts[number])
        labels = titles if number % columns == 0 else [""] * len(models)
        axes.set_yticks(range(len(models)), labels, fontsize=7)
    figure.suptitle("\n".join(_caption(models, hidden, len(texts) - panels)), fontsize=8)
    return png(figure)


def _caption(models: Sequence[ModelPerplexity], hidden_models: int, hidden_texts: int) -> list[str]:
    names = {model.model for model in models}
    domains = {part.domain for part in models[0].domains}
    marks = ["bars: standard error"]
    marks += ["line: plain average"] * ("average" in names) + ["star: the text's own"] * bool(names & domains)
    hidden = [f"{hidden_models} more models"] * bool(hidden_models)
    hidden += [f"{hidden_texts} more texts"] * bool(hidden_texts)
    left_out = [f"{' and '.join(hidden)} are not drawn"] * bool(hidden)
    return ["Perplexity, lower is better", "; ".join(marks), *left_out]


def _draw_domain(axes: Any, models: Sequence[ModelPerplexity], number: int, title: str) -> None:
    """Draw one text: a row a model, its number at the right border."""
    domain = models[0].domains[number].domain
    values = []
    for row, model in enumerate(models):
        measured = model.domains[number]
        is_result = row == len(models) - 1
        color = _GREEN if is_result else _COLORS.get(model.model, _BLUE)
        text, weight = "not finite", "bold" if is_result else "normal"
        if measured.perplexity is not None:
            values.append(measured.perplexity)
            text = significant(measured.perplexity, 4)
            axes.errorbar(
                measured.perplexity,
                row,
                xerr=measured.standard_error,
                fmt="*" if model.model == domain else "o",
                markersize=7 if model.model == domain else 4,
                color=color,
                elinewidth=0.8,
            )
            if model.model == "average":
                axes.axvline(measured.perplexity, color=_AMBER, linewidth=0.6, zorder=0)
        axes.text(
            1.02, row, text, transform=axes.get_yaxis_transform(), fontsize=6, va="center", weight=weight
        )
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.set_title(title, fontsize=8)
    axes.tick_params(labelsize=6, length=2)
    if values and max(values) > 4 * min(values):
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        steps = (1, 10) if high > 500 * low else (1, 2, 5)
        ticks = [s * 10.0**e for e in range(-1, 300) for s in steps if low <= s * 10.0**e <= high and s < 10]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))


def short_name(name: str) -> str:
    """Return a name that fits beside an axis; of a long one the end."""
    # A dollar sign would begin a formula.
    name = name.replace("$", r"\$")
    return name if len(name) <= _LONGEST_NAME else f"…{name[-_LONGEST_NAME:]}"
