"""The tables of `quark evaluate` and `quark dial`, from results.json and dial.json; they fit 80 columns."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..shown import printable
from .tasks import TASKS


def show_evaluation(console: Console, results: dict[str, Any], folder: Path) -> None:
    """The table of results.json."""
    counts = results["counts"]
    least, most = counts["completions_per_prompt"]
    each = f"{least}" if least == most else f"{least} to {most}"
    console.print(_title(results), markup=False, highlight=False)
    console.print(f"{counts['prompts']} prompts, {each} completions each; 95% intervals over prompts", highlight=False)
    wanted = TASKS[results["task"]].wanted if results["task"] else "wanted"
    rows = (
        ("mean score", "mean", "{:.3f}", 1),
        (f"% {wanted}", "wanted", "{:.1f}", 100),
        ("average maximum toxicity", "average_maximum_toxicity", "{:.3f}", 1),
        ("toxicity probability", "toxicity_probability", "{:.3f}", 1),
    )
    scores = list(results["scores"].items())
    for start in range(0, len(scores), 2):  # two scorers fit a terminal's width
        some = scores[start : start + 2]
        table = Table("scorer")
        for name, _ in some:
            role = results["scorers"][name]["role"]
            heading = escape(printable(name)) + (f"\n({role})" if role else "")
            table.add_column(heading, justify="right", overflow="fold")
        for label, key, form, factor in rows:
            cells = [figures.get(key) for _, figures in some]
            if any(cells):
                table.add_row(label, *(_cell(cell, form, factor) for cell in cells))
        missing = [figures["missing"]["completions"] for _, figures in some]
        if any(missing):
            table.add_row("completions without a score", *map(str, missing))
        console.print(table)
    table = Table("text", "")
    table.columns[1].justify = "right"
    for label, cell, form in _text_rows(results):
        table.add_row(label, str(cell) if isinstance(cell, int) else _cell(cell, form))
    console.print(table)
    _print_notes(console, results, [*results["notes"], *_left_out(counts)])
    told = f"Figures in {folder / 'results.json'}, texts and scores in completions.parquet."
    console.print(printable(told), markup=False, highlight=False)


def show_dial(console: Console, results: dict[str, Any], folder: Path) -> None:
    """The table of dial.json."""
    curve = results["curve"]
    counts = curve[0]["counts"]
    console.print(_title(results), markup=False, highlight=False)
    console.print(
        f"{counts['prompts']} prompts, {counts['completions_per_prompt'][0]} completions each at every strength;"
        " below each its 95% interval",
        highlight=False,
    )
    columns: list[tuple[str, str, float, tuple[str, ...]]] = []  # heading, format, factor, where a point has it
    names = list(curve[0]["scores"])[:2]  # two scorers fit a terminal's width; dial.json has all
    for name in names:
        heading = results["scorers"][name]["role"] or escape(printable(name))
        columns.append((heading, "{:.3f}", 1, ("scores", name, "mean")))
    if names:
        columns.append(("%\nwanted", "{:.0f}", 100, ("scores", names[-1], "wanted")))
    if "perplexity" in curve[0]:
        columns.append(("perplexity", "{:.1f}", 1, ("perplexity", "corpus")))
    columns.append(("dist-2", "{:.2f}", 1, ("text", "dist_2")))
    columns.append(("diversity\nwithin", "{:.2f}", 1, ("text", "diversity")))
    attribute = results["made"].get("attribute")
    first = f"strength\nof {escape(printable(attribute))}" if attribute else "strength"
    table = Table(first, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading, *_ in columns:
        table.add_column(heading, justify="right", overflow="fold", max_width=11)
    for point in curve:
        cells = [
            _cell(functools.reduce(lambda at, key: at[key], where, point), form, factor, under=True)
            for _, form, factor, where in columns
        ]
        table.add_row(f"{point['strength']:g}", *cells)
    console.print(table)
    if names:
        console.print(f"Scores are means; % wanted is by {escape(printable(names[-1]))}.", highlight=False)
    notes = [note for point in curve for note in point["notes"]]
    for point in curve:  # a dial that is too strong may leave nothing to score
        at = f"At strength {point['strength']:g} "
        notes += [at + told for told in _left_out(point["counts"])]
        lost = {name: point["scores"][name]["missing"]["completions"] for name in names}
        notes += [f"{at}{name} gave no score for {num} completions." for name, num in lost.items() if num]
    _print_notes(console, results, notes)
    told = f"The curve is in {folder / 'dial.json'} and dial.png."
    console.print(printable(told), markup=False, highlight=False)


def shown(value: Any) -> str:
    """A setting as a person writes it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(f"{v:g}" for v in value)
    return str(value)


def _text_rows(results: dict[str, Any]) -> list[tuple[str, Any, str]]:
    """(label, interval or count, format)."""
    text, perplexity, references = results["text"], results.get("perplexity"), results.get("references")
    rows: list[tuple[str, Any, str]] = []
    if perplexity:
        rows += [
            ("perplexity, all tokens together", perplexity["corpus"], "{:.1f}"),
            ("perplexity, mean of those below 1e4", perplexity["trimmed_mean"], "{:.1f}"),
            ("completions of 1e4 and more", perplexity["over_1e4"], ""),
        ]
        if perplexity["missing"]:
            rows.append(("completions without a perplexity", perplexity["missing"], ""))
    rows += [(f"dist-{n}", text[f"dist_{n}"], "{:.3f}") for n in (2, 3)]
    suffix, unit = ("_tokens", "tokens") if "diversity_tokens" in text else ("", "words")
    if results["task"] == "repetition":
        rows += [(f"rep-{n}, {unit}, %", text[f"rep_{n}{suffix}"], "{:.1f}") for n in (2, 3, 4)]
    rows.append((f"diversity within, {unit}", text[f"diversity{suffix}"], "{:.3f}"))
    if "tokens" in text:
        rows.append(("tokens of a completion", text["tokens"], "{:.1f}"))
    if references:
        rows += [(f"{name}, on the references", references[name], "{:.3f}") for name in ("rep", "wrep", "acc")]
        rows.append(("perplexity of the references", references["ppl"], "{:.1f}"))
    if "mauve" in results:
        rows.append(("MAUVE", results["mauve"], "{:.3f}"))
    return rows


def _title(results: dict[str, Any]) -> str:
    made = results["made"]
    what = printable(str(made.get("model") or made.get("file")))
    if made.get("reward_tokens"):
        k, quantile = len(made["reward_tokens"]) // max(1, len(made.get("reward_attributes") or ())), made["quantile"]
        names = {None: "no reward token", k - 1: "best token", 0: "worst token"}
        what += f", {names.get(quantile, f'token {quantile} of 0 to {k - 1}')}"
        if made["strengths"] != [1.0]:
            what += f", strength {shown(made['strengths'])}"
            what += " from no token" if made["from_token"] == "none" else ""
    return f"{results['task'] or 'evaluation'}: {what}"


def _left_out(counts: dict[str, Any]) -> list[str]:
    """What the figures could not count, in sentences."""
    told = []
    for key, (of_one, of_more) in {
        "without_words": ("holds no word", "hold no word"),
        "too_short": ("is too short for a diversity", "are too short for a diversity"),
    }.items():
        num = counts.get(key, 0)  # a results file of an earlier version lacks it
        if num:
            told.append(f"{num} completion {of_one}." if num == 1 else f"{num} completions {of_more}.")
    return told


def _print_notes(console: Console, results: dict[str, Any], notes: list[str]) -> None:
    out = list(dict.fromkeys(notes))
    evaluator = results["evaluator"]
    if evaluator:
        out.append(f"Perplexity under {printable(evaluator['model'])}, tokens {evaluator['tokens']}.")
    for note in out:
        console.print(printable(note), markup=False, highlight=False)


def _cell(interval: dict[str, Any] | None, form: str, factor: float = 1, under: bool = False) -> str:
    if interval is None or interval["mean"] is None:
        return "-"
    mean = form.format(factor * interval["mean"])
    if interval["low"] is None or interval["high"] is None:
        return mean
    low, high = (form.format(factor * interval[end]) for end in ("low", "high"))
    if under:  # .123 in place of 0.123: a dial's table is wide
        return f"{_short(mean)}\n{_short(low)}-{_short(high)}"
    return f"{mean} ({low} to {high})"


def _short(number: str) -> str:
    return number.replace("0.", ".", 1) if number.startswith(("0.", "-0.")) else number
