"""The dial's curve as a picture: strength against score, perplexity and diversity, with their intervals.

Who measures it is evaluate_command.py's job.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import written_whole

_COLOURS = ("#1f6f8b", "#c8553d", "#6a994e", "#6d597a")  # told apart by the common kinds of colour blindness


def need_matplotlib() -> None:
    """Raises: ConfigError when matplotlib, which draws the curve, is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "The dial's curve is drawn by matplotlib, which is not installed. pip install 'quark-lm[plot]'"
        )


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws the curve of `dial.json` to a PNG: scores, perplexity where it is known, and diversity."""
    from matplotlib.figure import Figure  # not pyplot, which would look for a screen

    curve = results["curve"]
    strengths = [point["strength"] for point in curve]
    panels: list[tuple[str, dict[str, list[Any]]]] = [
        (
            "mean score",
            {
                f"{results['scorers'][name]['role'] or 'scorer'}: {name}": [p["scores"][name]["mean"] for p in curve]
                for name in curve[0]["scores"]
            },
        )
    ]
    if "perplexity" in curve[0]:
        evaluator = Path(results["evaluator"]["model"]).name
        panels.append((f"perplexity under {evaluator}", {"corpus": [p["perplexity"]["corpus"] for p in curve]}))
    text = {"dist-2": "dist_2", "dist-3": "dist_3", "diversity within": "diversity"}
    panels.append(("diversity", {label: [p["text"][key] for p in curve] for label, key in text.items()}))
    start = "no" if results["made"]["from_token"] == "none" else "worst"
    attribute = results["made"].get("attribute")
    of = f" of {attribute}" if attribute else ""
    figure = Figure(figsize=(4.2 * len(panels), 3.6), dpi=150, layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for (label, intervals), colour in zip(lines.items(), _COLOURS * 8, strict=False):
            known = [(s, i) for s, i in zip(strengths, intervals, strict=True) if i and i["mean"] is not None]
            if not known:
                continue
            x = [s for s, _ in known]
            mean, low, high = ([i[key] for _, i in known] for key in ("mean", "low", "high"))
            axes.plot(x, mean, color=colour, marker="o", markersize=4, label=label)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.axvline(1.0, color="0.7", linewidth=0.8, zorder=0)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(f"strength{of} (0: {start} token, 1: plain Quark)", fontsize=9)
        axes.tick_params(labelsize=8)
        if len(lines) > 1:
            axes.legend(fontsize=7)
    model = Path(results["made"]["model"])
    name = model.parent.name if model.name == "model" else model.name  # a run's model/ says nothing by its own name
    figure.suptitle(f"{name}: 95% intervals over prompts", fontsize=9)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png")
