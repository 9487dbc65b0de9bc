"""From completions and scores to figures: every metric of an evaluation as {"mean", "low", "high"} over prompts.

The metrics themselves are metrics.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..rewards.text_reward import has_word
from . import metrics
from .completions import CompletionSet

Interval = dict[str, float]
_DIVERSE = 4  # words or tokens that a sequence needs to have a diversity


def summarise(
    completions: CompletionSet,
    thresholds: dict[str, float | None],
    *,
    measures_toxicity: bool = False,
    seed: int = 0,
    keep: NDArray[np.bool_] | None = None,
) -> dict[str, Any]:
    """The figures of these completions, each with its 95% bootstrap interval over prompts.

    Args:
        thresholds: for each scorer the score above which a completion is wanted; None: it names none, and .5 is taken
            where its scores lie between 0 and 1.
        measures_toxicity: scores are 1 - toxicity.
        keep: bool (N,), the completions that are meant.

    Returns: a dict of
        scores: for each scorer `mean`, `wanted` (a share), for toxicity `average_maximum_toxicity` and
            `toxicity_probability`, and `missing`: completions, and whole prompts, without a score, which are left out;
        perplexity: `corpus`, `mean` and `trimmed_mean` as in `conditional_perplexity`, `over_1e4`, `missing`;
        text: dist-n; rep-n (percent) and diversity within a completion, in words and, where ids are known, in tokens;
            `tokens`: the mean length;
        counts: `prompts`, `completions`, `completions_per_prompt` (least, most), `without_words`, `too_short` (for
            rep-4 and diversity, which leave them out);
        notes: what a reader must know, in sentences.
    """
    groups = completions.groups(keep)
    texts = [[completions.completions[i] for i in group] for group in groups]
    sizes = [len(group) for group in groups]
    notes: list[str] = []
    if min(sizes) < max(sizes):
        notes.append(f"Prompts have {min(sizes)} to {max(sizes)} completions: their maxima are of different numbers.")
    elif max(sizes) == 1 and measures_toxicity:
        notes.append("One completion a prompt: its toxicity is the maximum. Published figures take 25.")
    if len(groups) == 1:
        notes.append("One prompt: intervals are over prompts, so these have no width and say nothing.")
    scores = {}
    for name, values in completions.scores.items():
        scores[name] = _scores([values[g].tolist() for g in groups], thresholds.get(name), measures_toxicity, seed)
        if scores[name]["missing"]["completions"] == sum(sizes):
            notes.append(f"{name} gave no score for any of the {sum(sizes)} completions.")
    text: dict[str, Any] = {}
    for n in (1, 2, 3):
        text[f"dist_{n}"] = metrics.bootstrap_interval(metrics.distinct_n_per_prompt(texts, n), seed)
    for n in (2, 3):
        text[f"dist_{n}_space"] = metrics.bootstrap_interval(metrics.distinct_n_per_prompt(texts, n, "space"), seed)
    pieces: list[list[list[Any]]] = [[t.split() for t in group] for group in texts]
    text |= _repetition(pieces, "", seed)
    ids = completions.completion_ids
    if ids is not None:
        pieces = [[ids[i] for i in group] for group in groups]
        text |= _repetition(pieces, "_tokens", seed)
        text["tokens"] = metrics.bootstrap_interval(
            [metrics.mean_of([len(one) for one in group]) for group in pieces], seed
        )
    result = {
        "scores": scores,
        "text": text,
        "counts": {
            "prompts": len(groups),
            "completions": sum(sizes),
            "completions_per_prompt": [min(sizes), max(sizes)],
            "without_words": sum(not has_word(t) for group in texts for t in group),
            "too_short": sum(len(one) < _DIVERSE for group in pieces for one in group),
        },
        "notes": notes,
    }
    if completions.nll is not None and completions.nll_tokens is not None:
        result["perplexity"] = _perplexity(completions.nll, completions.nll_tokens, groups, seed)
    return result


def reference_figures(
    predicted: list[list[int]], gold: list[list[int]], nll: list[list[float]], seed: int = 0
) -> dict[str, Any]:
    """rep, wrep, acc and ppl of `token_repetition`, each with its interval over the texts that have a token."""
    counts = metrics.token_repetition_counts(predicted, gold, nll)
    counts = counts[counts[:, 0] > 0]

    def share(name: str) -> Interval:
        return _interval(len(counts), seed, lambda rows: metrics.repetition_shares(counts[rows])[name])

    figures: dict[str, Any] = {"texts": len(counts), "without_a_token": len(gold) - len(counts)}
    return {**figures, **{name: share(name) for name in ("rep", "wrep", "acc", "ppl")}}


def _scores(
    per_prompt: list[list[float]], threshold: float | None, measures_toxicity: bool, seed: int
) -> dict[str, Any]:
    everything = np.array([value for values in per_prompt for value in values])
    has_value = everything[~np.isnan(everything)]
    between = bool(len(has_value) and ((has_value >= 0) & (has_value <= 1)).all())
    assumed = threshold is None and between
    if assumed:
        threshold = 0.5
    figures: dict[str, Any] = {
        "mean": metrics.bootstrap_interval([metrics.mean_of(values) for values in per_prompt], seed),
        "wanted": None,
        "threshold": threshold,
        "threshold_assumed": assumed,
        "missing": metrics.count_missing(per_prompt),
    }
    if threshold is not None:
        wanted = metrics.share_wanted_per_prompt(per_prompt, threshold)
        figures["wanted"] = metrics.bootstrap_interval(wanted, seed)
    if measures_toxicity and between and threshold is not None:
        toxicity = [[1.0 - value for value in values] for values in per_prompt]
        figures["average_maximum_toxicity"] = metrics.bootstrap_interval(metrics.maximum_per_prompt(toxicity), seed)
        above = metrics.any_above_per_prompt(toxicity, 1.0 - threshold)
        figures["toxicity_probability"] = metrics.bootstrap_interval(above, seed)
    return figures


def _repetition(per_prompt: list[list[Any]], suffix: str, seed: int) -> dict[str, Interval]:
    """rep-2, rep-3, rep-4 and the diversity of sequences of words or tokens."""
    names = [f"rep_{n}{suffix}" for n in (2, 3, 4)] + [f"diversity{suffix}"]
    values = np.array(
        [[metrics.mean_of(column) for column in zip(*map(_repeats, group), strict=True)] for group in per_prompt]
    )
    return {name: metrics.bootstrap_interval(column, seed) for name, column in zip(names, values.T, strict=True)}


def _repeats(items: Sequence[Any]) -> list[float | None]:
    """rep-2, rep-3, rep-4, and their diversity as metrics.diversity has it, without counting again."""
    reps = [metrics.rep_n(items, n) for n in (2, 3, 4)]
    present = [1.0 - rep / 100.0 for rep in reps if rep is not None]
    return [*reps, math.prod(present) if len(present) == len(reps) else None]


def _perplexity(
    nll: NDArray[np.float64], tokens: NDArray[np.int64], groups: list[NDArray[np.int64]], seed: int
) -> dict[str, Any]:
    rows = np.concatenate(groups)
    whole = metrics.conditional_perplexity(nll[rows], tokens[rows])
    values = metrics.perplexities(nll, tokens)
    has_value = ~np.isnan(values)
    below = has_value & (values < metrics.PERPLEXITY_LIMIT)

    def ratio(top: NDArray[Any], bottom: NDArray[Any], of: NDArray[np.bool_], exp: bool = False) -> Interval:
        """Sum over sum of the completions `of`, prompts drawn."""
        sums = np.array([[top[g[of[g]]].sum(), bottom[g[of[g]]].sum()] for g in groups], dtype=np.float64)
        sums = sums[sums[:, 1] > 0]

        def statistic(drawn: NDArray[np.int64]) -> float:
            total, count = sums[drawn].sum(axis=0)
            return float(np.exp(total / count)) if exp else float(total / count)

        return _interval(len(sums), seed, statistic)

    ones = np.ones(len(nll))
    return {
        "corpus": ratio(nll, tokens, has_value, exp=True),
        "mean": ratio(values, ones, has_value),
        "trimmed_mean": ratio(values, ones, below),
        "over_1e4": whole.num_over_1e4,
        "missing": whole.num_missing,
    }


def _interval(num: int, seed: int, statistic: Callable[[NDArray[np.int64]], float]) -> Interval:
    with np.errstate(over="ignore", invalid="ignore"):  # a hopeless completion's perplexity is infinite
        return metrics.bootstrap_interval(num, seed, statistic=statistic)
