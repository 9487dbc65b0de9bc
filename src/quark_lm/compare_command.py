"""`quark compare BASE OTHER`: two finished evaluations of the same prompts, told apart prompt by prompt.

Two intervals that overlap say little about two systems that answered the same prompts: most of their width is how the
prompts differ, which both share. The difference of each prompt leaves that out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import ConfigError, DataError
from .files import parsed
from .run_folder import finite
from .shown import printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .evaluation.completions import CompletionSet

    PerPrompt = dict[str, NDArray[np.float64]]  # a figure's values, float (P,)
    Groups = list[NDArray[np.int64]]  # the completions of each prompt, by their rows


@dataclass
class _Evaluated:
    """A finished evaluation's folder: its completions and its results.json."""

    folder: Path
    completions: CompletionSet
    results: dict[str, Any]

    @classmethod
    def read(cls, source: str) -> _Evaluated:
        from .evaluation.completions import read_completions

        path = Path(source).expanduser()
        folder = path.parent if path.name in ("completions.parquet", "results.json") else path
        if not (folder / "results.json").is_file():
            raise ConfigError(
                f"{source} holds no results.json, so there is no finished evaluation to compare. Give the folder of a"
                " `quark evaluate` that ended."
            )
        try:
            results = parsed((folder / "results.json").read_bytes())
            if results["name"] != "evaluate":
                raise ValueError(f"it is of {results['name']!r:.40}")
            for name in ("scorers", "scores", "made"):
                if not isinstance(results[name], dict):
                    raise ValueError(f"{name} is no table")
            _ = results["evaluator"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder / 'results.json'} is no `quark evaluate`'s ({error}). Give the folder of one that ended."
            ) from error
        return cls(folder, read_completions(folder / "completions.parquet"), results)

    def scores(self, name: str, groups: Groups, threshold: float | None, measures_toxicity: bool) -> PerPrompt:
        """This scorer's figures of each prompt; those that ask for a threshold only where there is one."""
        from .evaluation import metrics

        values = [self.completions.scores[name][group].tolist() for group in groups]
        out = {"mean": np.array([_mean(of) for of in values])}
        if threshold is not None:
            out["wanted"] = metrics.share_wanted_per_prompt(values, threshold)
            if measures_toxicity:
                toxicity = [[1.0 - value for value in of] for of in values]
                out["average_maximum_toxicity"] = metrics.maximum_per_prompt(toxicity)
                out["toxicity_probability"] = metrics.any_above_per_prompt(toxicity, 1.0 - threshold)
        return out

    def text(self, groups: Groups) -> PerPrompt:
        from .evaluation import metrics

        texts = [[self.completions.completions[i] for i in group] for group in groups]
        out = {f"dist_{n}": metrics.distinct_n_per_prompt(texts, n) for n in (2, 3)}
        return {**out, "diversity": np.array([_mean([metrics.diversity(t) for t in of]) for of in texts])}

    @property
    def keys(self) -> list[tuple[str, int]]:
        """Each prompt's text, and how often it came before."""
        seen: dict[str, int] = {}
        keys = []
        for prompt in self.completions.prompts:
            text = repr(prompt)
            keys.append((text, seen.get(text, 0)))
            seen[text] = seen.get(text, 0) + 1
        return keys


def compare(base: str, other: str, *, seed: int = 0, console: Console | None = None) -> dict[str, Any]:
    """Prints and returns the differences, other - base, over the prompts that both have.

    Args:
        base, other: folders of finished evaluations.
        seed: of the bootstrap.

    Returns: `prompts`, `left_out` (prompts that one alone has), and for each scorer that both have in the same version,
    for perplexity under the same evaluator (a ratio) and for the text's figures `{"base", "other", "difference":
    {"mean", "low", "high", "p_value"}}`; `notes`.
    Raises: ConfigError, DataError for folders that cannot be compared.
    """
    from .evaluation import metrics

    first, second = _Evaluated.read(base), _Evaluated.read(other)
    where = {key: at for at, key in enumerate(second.keys)}
    pairs = [(at, where[key]) for at, key in enumerate(first.keys) if key in where]
    if not pairs:
        raise DataError(
            f"{base} and {other} have no prompt in common, so nothing can be compared prompt by prompt. Evaluate both"
            " on the same --prompts."
        )
    left_out = len(first.completions.prompts) + len(second.completions.prompts) - 2 * len(pairs)
    all_groups = (first.completions.groups(), second.completions.groups())
    groups = ([all_groups[0][a] for a, _ in pairs], [all_groups[1][b] for _, b in pairs])
    notes = _unlike(first.results["made"], second.results["made"])
    if left_out:
        notes.append(f"{left_out} prompts that only one of the two has are left out.")
    if {len(group) for group in groups[0]} != {len(group) for group in groups[1]}:
        notes.append("The two have different numbers of completions a prompt: maxima do not compare.")

    def differences(values: PerPrompt, baseline: PerPrompt) -> dict[str, Any]:
        return {
            key: {
                "base": _mean(baseline[key]),
                "other": _mean(values[key]),
                "difference": metrics.paired_bootstrap(values[key], baseline[key], seed),
            }
            for key in baseline
        }

    scores: dict[str, Any] = {}
    for name, facts in first.results["scorers"].items():
        if name not in second.results["scorers"]:
            continue
        theirs = second.results["scorers"][name]
        if any(theirs.get(key) != facts.get(key) for key in ("scorer", "version", "scope")):
            notes.append(f"{name} is of another version in the second: score again by `quark evaluate --from`.")
            continue
        of = first.results["scores"][name]
        threshold = of.get("threshold")
        if threshold != second.results["scores"][name].get("threshold"):
            threshold = None  # assumed, from the scores of one alone
        toxicity = "toxicity_probability" in of
        scores[name] = differences(
            second.scores(name, groups[1], threshold, toxicity), first.scores(name, groups[0], threshold, toxicity)
        )
    results: dict[str, Any] = {
        "name": "compare",
        "base": {"folder": str(first.folder), "made": first.results["made"]},
        "other": {"folder": str(second.folder), "made": second.results["made"]},
        "prompts": len(pairs),
        "left_out": left_out,
        "seed": seed,
        "scores": scores,
        "text": differences(second.text(groups[1]), first.text(groups[0])),
    }
    if first.results["evaluator"] and first.results["evaluator"] == second.results["evaluator"]:
        results["perplexity"] = _perplexity((first, second), groups, seed)
    elif first.results["evaluator"] and second.results["evaluator"]:
        notes.append("Their perplexities are under two evaluators, or of other tokens, and do not compare.")
    if not scores:
        notes.append("No scorer measured both: only the text's figures compare.")
    results = finite(results | {"notes": notes})
    show(console or Console(), results)
    return results


def _unlike(base: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What the two were not sampled alike in, in sentences."""
    sampling = ("max_completion_length", "min_completion_length", "temperature", "top_p", "top_k", "num_beams")
    return [
        f"They were not sampled alike: {name} is {base.get(name)} and {other.get(name)}."
        for name in sampling
        if base.get(name) != other.get(name)
    ]


def show(console: Console, results: dict[str, Any]) -> None:
    """The table of `compare`, at most 80 columns wide."""
    for name in ("base", "other"):
        console.print(printable(f"{name}: {results[name]['folder']}"), markup=False, highlight=False)
    console.print(
        f"{results['prompts']} prompts in both; other - base, prompt by prompt, with its 95% interval", highlight=False
    )
    table = Table("", "base", "other", "difference", "p")
    for column in table.columns[1:]:
        column.justify = "right"
    labels = {
        "mean": ("mean score", "{:.3f}", 1),
        "wanted": ("% wanted", "{:.1f}", 100),
        "average_maximum_toxicity": ("average max. toxicity", "{:.3f}", 1),
        "toxicity_probability": ("toxicity probability", "{:.3f}", 1),
    }
    for name, figures in results["scores"].items():
        table.add_row(f"[bold]{escape(printable(name))}[/bold]")
        for key, (label, form, factor) in labels.items():
            if key in figures:
                table.add_row(f"  {label}", *_cells(figures[key], form, factor))
    table.add_row("[bold]text[/bold]")
    if "perplexity" in results:
        table.add_row("  perplexity (a ratio)", *_cells(results["perplexity"], "{:.2f}", 1, sign=False))
    for key, label in (("dist_2", "dist-2"), ("dist_3", "dist-3"), ("diversity", "diversity within")):
        table.add_row(f"  {label}", *_cells(results["text"][key], "{:.3f}", 1))
    console.print(table)
    for note in results["notes"]:
        console.print(printable(note), markup=False, highlight=False)


def _cells(figure: dict[str, Any], form: str, factor: float, sign: bool = True) -> list[str]:
    def one(value: float | None, form: str = form) -> str:
        return "-" if value is None else form.format(factor * value)

    of = figure["difference"]
    signed = form.replace(":", ":+") if sign else form
    change = one(of["mean"], signed)
    if of["low"] is not None:
        change += f" ({one(of['low'], signed)} to {one(of['high'], signed)})"
    p_value = of["p_value"]
    return [one(figure["base"]), one(figure["other"]), change, "-" if p_value is None else f"{p_value:.3f}"]


def _perplexity(both: tuple[_Evaluated, _Evaluated], groups: tuple[Groups, Groups], seed: int) -> dict[str, Any]:
    """Corpus perplexities, and other / base over prompts drawn for both together."""
    from .evaluation import metrics

    sums = []
    for one, of in zip(both, groups, strict=True):
        nll, tokens = one.completions.nll, one.completions.nll_tokens
        if nll is None or tokens is None:
            raise DataError(f"{one.folder}/completions.parquet lacks the perplexity that results.json tells of.")
        counted = np.where(np.isnan(nll), 0, tokens)
        sums.append(np.array([[np.nansum(nll[group]), counted[group].sum()] for group in of], dtype=np.float64))
    has_both = (sums[0][:, 1] > 0) & (sums[1][:, 1] > 0)
    base, other = (of[has_both] for of in sums)

    def rate(of: NDArray[np.float64], rows: NDArray[np.int64]) -> float:
        total, count = of[rows].sum(axis=0)
        return float(total / count)

    def ratio(rows: NDArray[np.int64]) -> float:
        return float(np.exp(rate(other, rows) - rate(base, rows)))

    interval = metrics.bootstrap_interval(len(base), seed, statistic=ratio)
    everything = np.arange(len(base))
    perplexities = [float(np.exp(rate(of, everything))) if len(of) else float("nan") for of in (base, other)]
    return {"base": perplexities[0], "other": perplexities[1], "difference": {**interval, "p_value": None}}


def _mean(values: Any) -> float:
    array = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    array = array[~np.isnan(array)]
    return float(array.mean()) if len(array) else float("nan")
