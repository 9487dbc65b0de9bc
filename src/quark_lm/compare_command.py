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
from .evaluate_command import read_json
from .generation import DRAWING
from .run_folder import finite
from .shown import printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .evaluation.completions import CompletionSet

    PerPrompt = dict[str, NDArray[np.float64]]  # a figure's values, float (P,), NaN for a prompt without one
    Groups = list[NDArray[np.int64]]  # the completions of each prompt, by their rows

# With fewer prompts an interval and a p-value say little.
_FEW_PROMPTS = 20
# (where a figure is, its label, its format, its factor)
_SCORES = (
    ("mean", "mean score", "{:.3f}", 1),
    ("wanted", "% wanted", "{:.1f}", 100),
    ("average_maximum_toxicity", "average max. toxicity", "{:.3f}", 1),
    ("toxicity_probability", "toxicity probability", "{:.3f}", 1),
)
_TEXT = (
    ("dist_2", "dist-2", "{:.3f}", 1),
    ("dist_3", "dist-3", "{:.3f}", 1),
    ("diversity", "diversity within", "{:.3f}", 1),
    ("tokens", "tokens", "{:.1f}", 1),
)


def compare(base: str, other: str, *, seed: int = 0, console: Console | None = None) -> dict[str, Any]:
    """Prints and returns the differences, other - base, over the prompts that both have.

    Args:
        base, other: folders of finished evaluations.
        seed: of the bootstrap.

    Returns: `prompts`, `left_out` (prompts that one alone has); `scores`, for each scorer that both have in the same
        version, `text`, and `perplexity` under the same evaluator: each figure `{"base", "other", "prompts",
        "difference": {"mean", "low", "high", "p_value"}}` over the prompts that have it in both, of perplexity the
        ratio, without a p-value; `notes`.
    Raises: ConfigError, DataError for folders that cannot be compared.
    """
    first, second = _Evaluated.read(base), _Evaluated.read(other)
    where = {key: at for at, key in enumerate(second.keys)}
    pairs = [(at, where[key]) for at, key in enumerate(first.keys) if key in where]
    if not pairs:
        raise DataError(
            f"{base} and {other} have no prompt in common, so nothing can be compared prompt by prompt. Evaluate both"
            " on the same --prompts."
        )
    all_groups = (first.completions.groups(), second.completions.groups())
    groups = ([all_groups[0][a] for a, _ in pairs], [all_groups[1][b] for _, b in pairs])
    left_out = len(first.completions.prompts) + len(second.completions.prompts) - 2 * len(pairs)
    notes = _unlike(first, second)
    if left_out:
        notes.append(f"{left_out} prompts that only one of the two has are left out.")
    if len(pairs) < _FEW_PROMPTS:
        notes.append(f"Only {len(pairs)} prompts: the intervals are over prompts, and say little of so few.")
    if list(map(len, groups[0])) != list(map(len, groups[1])):
        notes.append("The two have different numbers of completions a prompt: maxima and dist-n do not compare.")
    try:
        results: dict[str, Any] = {
            "name": "compare",
            "base": {"folder": str(first.folder), "made": first.results["made"]},
            "other": {"folder": str(second.folder), "made": second.results["made"]},
            "prompts": len(pairs),
            "left_out": left_out,
            "seed": seed,
            "scores": _scores(first, second, groups, seed, notes),
            "text": _differences(first.text(groups[0]), second.text(groups[1]), seed),
        }
        if _same_evaluator(first, second, notes):
            results["perplexity"] = _perplexity((first, second), groups, seed)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # a file that somebody changed
        raise DataError(
            f"results.json and completions.parquet of {base} or of {other} do not go together ({error!r:.80}). Evaluate"
            " again, or score again by `quark evaluate --from`."
        ) from error
    if not results["scores"]:
        notes.append("No scorer measured both: only the text's figures compare.")
    results = finite(results | {"notes": notes})
    show(console or Console(), results)
    return results


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
    for name, figures in results["scores"].items():
        table.add_row(f"[bold]{escape(printable(name))}[/bold]")
        _add_rows(table, figures, _SCORES)
    table.add_row("[bold]text[/bold]")
    if "perplexity" in results:
        table.add_row("  perplexity (a ratio)", *_cells(results["perplexity"], "{:.2f}", 1, sign=False))
    _add_rows(table, results["text"], _TEXT)
    console.print(table)
    for note in results["notes"]:
        console.print(printable(note), markup=False, highlight=False)


def _add_rows(table: Table, figures: dict[str, Any], rows: tuple[tuple[str, str, str, int], ...]) -> None:
    for key, label, form, factor in rows:
        if key in figures:
            table.add_row(f"  {label}", *_cells(figures[key], form, factor))


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


# The two


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
        if not path.exists():
            raise ConfigError(f"There is no folder {source}. Give one of a `quark evaluate` that ended.")
        for name in ("results.json", "completions.parquet"):
            if not (folder / name).is_file():
                raise ConfigError(
                    f"{source} holds no {name}, so there is no finished evaluation to compare. Give the folder of a"
                    " `quark evaluate` that ended."
                )
        results = read_json(folder / "results.json")
        tables = ("scorers", "scores", "made")
        if results.get("name") != "evaluate" or not all(isinstance(results.get(name), dict) for name in tables):
            raise ConfigError(
                f"{folder / 'results.json'} is no `quark evaluate`'s (name: {results.get('name')!s:.40}). Give"
                " the folder of one that ended."
            )
        return cls(folder, read_completions(folder / "completions.parquet"), results)

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

    def scores(self, name: str, groups: Groups, threshold: float | None, measures_toxicity: bool) -> PerPrompt:
        """This scorer's figures of each prompt; those that ask for a threshold only where there is one."""
        from .evaluation import metrics

        values = [self.completions.scores[name][group].tolist() for group in groups]
        out = {"mean": np.array([metrics.mean_of(of) for of in values])}
        if threshold is not None:
            out["wanted"] = metrics.share_wanted_per_prompt(values, threshold)
            if measures_toxicity:
                toxicity = [[1.0 - value for value in of] for of in values]
                out["average_maximum_toxicity"] = metrics.maximum_per_prompt(toxicity)
                out["toxicity_probability"] = metrics.any_above_per_prompt(toxicity, 1.0 - threshold)
        return out

    def text(self, groups: Groups) -> PerPrompt:
        """The text's figures of each prompt; `tokens`, the mean length, where the ids are known."""
        from .evaluation import metrics

        texts = [[self.completions.completions[i] for i in group] for group in groups]
        out = {f"dist_{n}": metrics.distinct_n_per_prompt(texts, n) for n in (2, 3)}
        out["diversity"] = np.array([metrics.mean_of([metrics.diversity(t) for t in of]) for of in texts])
        if (ids := self.completions.completion_ids) is not None:
            out["tokens"] = np.array([metrics.mean_of([len(ids[i]) for i in group]) for group in groups])
        return out


def _unlike(first: _Evaluated, second: _Evaluated) -> list[str]:
    """What the two were not sampled alike in, in sentences."""
    notes = []
    made = [one.results["made"] for one in (first, second)]
    for one, of in zip((first, second), made, strict=True):
        if not any(name in of for name in DRAWING):
            notes.append(f"{one.folder} does not say how its completions were sampled.")
    for name in (*DRAWING, "num_beams"):
        if all(name in of for of in made) and made[0][name] != made[1][name]:
            notes.append(f"They were not sampled alike: {name} is {made[0][name]} and {made[1][name]}.")
    return notes


# The differences


def _differences(base: PerPrompt, other: PerPrompt, seed: int) -> dict[str, Any]:
    """Of each figure that both have, over the prompts that have it in both."""
    from .evaluation import metrics

    out = {}
    for key in base:
        if key not in other:
            continue
        has_both = ~np.isnan(base[key]) & ~np.isnan(other[key])
        ours, theirs = other[key][has_both], base[key][has_both]
        out[key] = {
            "base": metrics.mean_of(theirs),
            "other": metrics.mean_of(ours),
            "prompts": int(has_both.sum()),
            "difference": metrics.paired_bootstrap(ours, theirs, seed),
        }
    return out


def _scores(
    first: _Evaluated, second: _Evaluated, groups: tuple[Groups, Groups], seed: int, notes: list[str]
) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, facts in first.results["scorers"].items():
        theirs = second.results["scorers"].get(name)
        if theirs is None:
            continue
        if any(theirs.get(key) != facts.get(key) for key in ("scorer", "version", "scope")):
            notes.append(f"{name} is of another version in the second: score again by `quark evaluate --from`.")
            continue
        if facts.get("version") in (None, "unpinned"):
            notes.append(f"{name} tells no version, so that nobody knows whether both are of one.")
        of = [one.results["scores"][name] for one in (first, second)]
        threshold = of[0].get("threshold")
        if threshold != of[1].get("threshold"):
            notes.append(
                f"{name} has a threshold of {threshold} and of {of[1].get('threshold')}: % wanted is left out."
            )
            threshold = None
        toxicity = all("toxicity_probability" in figures for figures in of)
        ours, base = (
            one.scores(name, g, threshold, toxicity) for one, g in zip((second, first), groups[::-1], strict=True)
        )
        out[name] = _differences(base, ours, seed)
    return out


def _same_evaluator(first: _Evaluated, second: _Evaluated, notes: list[str]) -> bool:
    """Whether their perplexities compare: the same weights read the same kind of tokens."""
    base, other = (one.results.get("evaluator") for one in (first, second))
    if not base or not other:
        return False
    differing = [key for key in ("weights", "dtype", "tokens") if base.get(key) != other.get(key)]
    if differing:
        told = (f"{key} {base.get(key)} and {other.get(key)}" for key in differing)
        notes.append(f"Their perplexities do not compare, for their evaluators have {', '.join(told)}.")
    return not differing


def _perplexity(both: tuple[_Evaluated, _Evaluated], groups: tuple[Groups, Groups], seed: int) -> dict[str, Any]:
    """Corpus perplexities, and other / base over prompts drawn for both together."""
    from .evaluation import metrics

    sums = []
    for one, of in zip(both, groups, strict=True):
        nll, tokens = one.completions.nll, one.completions.nll_tokens
        if nll is None or tokens is None:
            raise ValueError("completions.parquet lacks the perplexity")
        counted = np.where(np.isnan(nll), 0, tokens)
        sums.append(np.array([[np.nansum(nll[group]), counted[group].sum()] for group in of], dtype=np.float64))
    has_both = (sums[0][:, 1] > 0) & (sums[1][:, 1] > 0)
    base, other = (of[has_both] for of in sums)

    def rate(of: NDArray[np.float64], rows: NDArray[np.int64]) -> float:
        total, count = of[rows].sum(axis=0)
        return float(total / count)

    def ratio(rows: NDArray[np.int64]) -> float:
        return float(np.exp(rate(other, rows) - rate(base, rows)))

    with np.errstate(over="ignore", invalid="ignore"):  # a hopeless completion's perplexity is infinite
        interval = metrics.bootstrap_interval(len(base), seed, statistic=ratio)
        everything = np.arange(len(base))
        perplexities = [float(np.exp(rate(of, everything))) if len(of) else float("nan") for of in (base, other)]
    return {
        "base": perplexities[0],
        "other": perplexities[1],
        "prompts": int(has_both.sum()),
        "difference": {**interval, "p_value": None},
    }
