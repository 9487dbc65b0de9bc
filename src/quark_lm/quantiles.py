"""Quantiles of the pool: which reward token each sample earns, and which samples a round draws.

Numpy only; files are pool.py's job.

Quantile 0 is the worst and `num_quantiles - 1` the best. -1 stands for a sample that is not drawn.
Source: Lu et al. 2022, section 2, and the authors' code for the sizes.
"""

import warnings
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quark_lm.errors import ConfigError, DataError

DRAW_MODES = ("all", "balanced", "ends", "best")

NOT_DRAWN = -1


class FewQuantilesWarning(UserWarning):
    """The rewards hold fewer distinct values than there are quantiles, so some reward tokens stay unused."""


# Quantize


def assign(rewards: ArrayLike, num_quantiles: int) -> NDArray[np.int64]:
    """The quantile of each sample, 0 (worst) to `num_quantiles - 1` (best).

    Without ties the sizes are the authors': N // K samples in each of the quantiles 1 to K - 1, and the remainder joins
    the worst. Equal rewards share one quantile, the one of their middle rank; the best reward always earns K - 1, the
    worst 0.
    authors' code: a stable sort that gives the older of two equal samples the better token, a bias.

    With fewer distinct rewards than K they are spread evenly, best to K - 1 and worst to 0, with a
    `FewQuantilesWarning`; when all are equal, all are the best.

    Args: rewards, float (N,), finite. num_quantiles, K, at least 2.
    Returns: int64 (N,). `assign([0.1, 0.9, 0.5, 0.9], 2)` gives `[0, 1, 0, 1]`.
    Raises: DataError for no rewards or one that is not finite; ConfigError for K below 2.
    """
    rewards = _checked_rewards(rewards)
    _check_num_quantiles(num_quantiles)
    # The quantile only grows with the reward, so its K - 1 borders tell all: sorting the values alone and comparing
    # with the borders is several times faster than ranking each sample by an argsort.
    ranked = np.sort(rewards)
    distinct = _least_distinct(ranked, num_quantiles)
    if len(distinct) < num_quantiles:
        _warn_few(distinct, num_quantiles)
        borders, names = distinct[1:], _spread(np.arange(len(distinct)), len(distinct), num_quantiles)
    else:
        borders, names = _borders(ranked, num_quantiles), np.arange(num_quantiles)
    del ranked
    passed = np.zeros(len(rewards), dtype=np.min_scalar_type(num_quantiles))
    for border in borders:
        passed += rewards >= border
    return names[passed]


def assign_per_group(rewards: ArrayLike, groups: ArrayLike, num_quantiles: int) -> NDArray[np.int64]:
    """The quantile of each sample among the samples of its own group (its prompt), by the rule of `assign`.

    A group whose rewards are all equal compares nothing: its samples get -1, are not drawn, and are the caller's to
    count (`(quantiles < 0).sum()`). Groups with fewer distinct rewards than K are the usual case here, so a
    `FewQuantilesWarning` comes only when no group at all has K of them.

    Args: rewards, float (N,), finite. groups, (N,), integers or strings, one a prompt. num_quantiles, K, at least 2.
    Returns: int64 (N,). `assign_per_group([0.1, 0.2, 0.8, 0.9], [7, 7, 8, 8], 2)` gives `[0, 1, 0, 1]`.
    Raises: DataError, ConfigError as `assign`, and DataError for lengths that differ.
    """
    rewards = _checked_rewards(rewards)
    _check_num_quantiles(num_quantiles)
    groups = np.asarray(groups)
    if groups.shape != rewards.shape:
        raise DataError(
            f"groups has shape {groups.shape} but rewards has {rewards.shape}, so samples have no prompt of their own. "
            "Give one group a reward."
        )
    quantiles = np.empty(len(rewards), dtype=np.int64)
    most_distinct = 0
    for samples in _groups_of_one_size(groups):
        samples = np.take_along_axis(samples, np.argsort(rewards[samples], axis=1), axis=1)
        ranked = rewards[samples]
        rank = np.arange(samples.shape[1], dtype=np.int32)
        is_first, is_last = np.ones(ranked.shape, dtype=bool), np.ones(ranked.shape, dtype=bool)  # of equal rewards
        np.not_equal(ranked[:, 1:], ranked[:, :-1], out=is_first[:, 1:])
        is_last[:, :-1] = is_first[:, 1:]
        first = np.maximum.accumulate(np.where(is_first, rank, 0), axis=1)
        last = np.minimum.accumulate(np.where(is_last, rank, rank[-1])[:, ::-1], axis=1)[:, ::-1]
        position = np.cumsum(is_first, axis=1, dtype=np.int32) - 1
        num_distinct = position[:, -1:] + 1
        most_distinct = max(most_distinct, int(num_distinct.max()))
        found = _quantile_of_rank((first + last) // 2, position, num_distinct, num_quantiles)
        quantiles[samples] = np.where(num_distinct == 1, NOT_DRAWN, found)
    if most_distinct < num_quantiles:
        warnings.warn(
            f"num_quantiles={num_quantiles} within each prompt needs a prompt with at least {num_quantiles} distinct "
            f"rewards, but none has more than {most_distinct}, so some reward tokens stay unused. "
            f"Set num_quantiles={max(most_distinct, 2)}, or raise num_generations.",
            FewQuantilesWarning,
            stacklevel=2,
        )
    return quantiles


def in_window(rounds: ArrayLike, current_round: int, window: int | None) -> NDArray[np.bool_]:
    """Which samples belong to the last `window` rounds, the current one included; all rounds up to it if None.

    A round later than the current one never counts: a run resumed from an earlier checkpoint may find some on disk.
    """
    if window is not None and window < 1:
        raise ConfigError(
            f"pool_window={window} would leave no round to learn from. Set it to 1 or more, or to None for all rounds."
        )
    rounds = np.asarray(rounds)
    mask = rounds <= current_round
    if window is not None:
        mask &= rounds > current_round - window
    return mask


# Draw


def draw(
    quantiles: ArrayLike,
    num_draws: int,
    seed: int,
    round: int,
    mode: str = "all",
    num_quantiles: int = 5,
    attribute: int = 0,
    best_share: float = 0.5,
) -> NDArray[np.int64]:
    """The rows that a round learns from, in the order in which its steps take them.

    A pure function of its arguments, and the first draws do not depend on how many follow. Rows come without
    replacement until all have been drawn, then in a new order. With several quantiles, each run of as many draws as
    there are quantiles holds one from each in random order, so every batch is balanced up to its remainder; "ends" with
    a best_share of 3/4 has runs of one from the worst and three from the best.

    Args:
        quantiles: int (N,), as `assign` gives them; a row with -1 is never drawn.
        mode: "all" draws uniformly, as in the paper; "balanced" equally often from each quantile that holds a sample;
            "ends" from the worst and the best (from one of them if the other is empty); "best" from the best only.
        attribute: by whose quantiles, where several are ranked apart: each draws by random numbers of its own.
        best_share: what "ends" draws from the best; the nearest fraction with a denominator of at most 16.
    Returns: int64 (num_draws,), indices into `quantiles`.
    Raises: DataError when no row is left to draw; ConfigError for an unknown mode or share.
    """
    if mode not in DRAW_MODES:
        raise ConfigError(f"draw={mode!r} is not a way to draw samples. Choose one of {', '.join(DRAW_MODES)}.")
    if not 1 / 16 <= best_share <= 15 / 16:
        raise ConfigError(f"best_share={best_share} would leave draw='ends' one end. Set it from 0.0625 to 0.9375.")
    quantiles = np.asarray(quantiles)
    of_a_run = [1] * num_quantiles  # draws of each stratum
    if mode == "all":
        strata = [np.flatnonzero(quantiles >= 0)]
    else:
        wanted = {"balanced": range(num_quantiles), "ends": (0, num_quantiles - 1), "best": (num_quantiles - 1,)}[mode]
        strata = [np.flatnonzero(quantiles == quantile) for quantile in wanted]
        if mode == "ends":
            share = Fraction(float(best_share)).limit_denominator(16)
            of_a_run = [share.denominator - share.numerator, share.numerator]
    # Each stratum keeps its own stream, so that an empty one does not move the others.
    streams = [(number, rows) for number, rows in enumerate(strata) if len(rows)]
    if not streams:
        raise DataError(
            f"draw={mode!r} found no sample to learn from among {len(quantiles):,} rows: all were dropped, or lie in "
            "other quantiles. Check the rewards with `quark check-reward`."
        )
    num_blocks = -(-num_draws // sum(of_a_run[number] for number, _ in streams))
    columns = [
        _endless(
            rows, num_blocks * of_a_run[number], [seed, round, _DRAW_STREAM + _ATTRIBUTE * attribute, number]
        ).reshape(num_blocks, of_a_run[number])
        for number, rows in streams
    ]
    blocks = np.concatenate(columns, axis=1)
    if len(streams) > 1:
        places = (
            np.random.default_rng([seed, round, _ORDER_STREAM + _ATTRIBUTE * attribute])
            .random(blocks.shape)
            .argsort(axis=1)
        )
        blocks = np.take_along_axis(blocks, places, axis=1)
    return blocks.reshape(-1)[:num_draws]


# Whether the tokens mean anything yet


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """The chance that a positive scores above a negative, ties counted half: the area under the ROC curve.

    0.5 tells nothing apart; 1 orders every pair rightly. The share of either class does not matter.

    Args: scores, float (N,), infinities allowed. labels, (N,), true (or 1) for the positives.
    Raises: DataError for NaN, lengths that differ, or one class only.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels).astype(bool)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise DataError(
            f"scores has shape {scores.shape} and labels {labels.shape}, so they cannot be paired. "
            "Give one label a score."
        )
    num_positive = int(labels.sum())
    num_negative = len(labels) - num_positive
    _check_both_classes(num_positive, num_negative)
    if np.isnan(scores).any():
        raise DataError(f"{np.isnan(scores).sum()} of {len(scores)} scores are NaN and have no rank. Drop them first.")
    order = np.argsort(scores)
    ranked = scores[order]
    starts = np.flatnonzero(np.concatenate(([True], ranked[1:] != ranked[:-1])))
    sizes = np.diff(starts, append=len(ranked))
    middle_ranks = np.repeat(starts + (sizes - 1) / 2, sizes)  # counted from 0
    rank_sum = middle_ranks[labels[order]].sum()
    return float((rank_sum - num_positive * (num_positive - 1) / 2) / (num_positive * num_negative))


def auc_standard_error(auc: float, num_positive: int, num_negative: int) -> float:
    """The standard error of an AUC over independent samples; it is 0 at an AUC of 0 or 1.

    Source: Hanley and McNeil 1982, "The meaning and use of the area under a ROC curve", with their Q1 and Q2.
    """
    _check_both_classes(num_positive, num_negative)
    q1 = auc / (2 - auc)  # two positives both above one negative
    q2 = 2 * auc**2 / (1 + auc)  # one positive above two negatives
    variance = auc * (1 - auc) + (num_positive - 1) * (q1 - auc**2) + (num_negative - 1) * (q2 - auc**2)
    return float(np.sqrt(max(variance, 0.0) / (num_positive * num_negative)))


# Helpers

_AT_ONCE = 2**17  # samples that are ranked within their prompts at once; more are no faster
_ATTRIBUTE = 1000  # an attribute's streams are so far from those of the one before it
_DRAW_STREAM, _ORDER_STREAM = 1, 2  # apart from each other, and from any other stream seeded by (seed, round)


def _least_distinct(ranked: NDArray[np.float64], num: int) -> NDArray[np.float64]:
    """The `num` least distinct values of a sorted array, or all where there are fewer."""
    places = [0]
    while len(places) < num:
        place = int(np.searchsorted(ranked, ranked[places[-1]], side="right"))
        if place == len(ranked):
            break
        places.append(place)
    return ranked[places]


def _borders(ranked: NDArray[np.float64], num_quantiles: int) -> NDArray[np.float64]:
    """The least reward of each quantile but the worst, (K - 1,); a quantile that stays empty has the next one's.

    Args: ranked: sorted, with at least `num_quantiles` distinct values.
    """
    size, remainder = divmod(len(ranked), num_quantiles)
    ranks = remainder + size * np.arange(1, num_quantiles)
    values = ranked[ranks]
    starts = np.searchsorted(ranked, values)
    ends = np.searchsorted(ranked, values, side="right")
    # The group of equal rewards at a border is above it by its middle rank; the worst group never is, the best always.
    is_below = (starts + (ends - starts - 1) // 2 < ranks) | (starts == 0)
    return np.where(is_below & (ends < len(ranked)), ranked[np.minimum(ends, len(ranked) - 1)], values)


def _groups_of_one_size(groups: NDArray[Any]) -> Iterator[NDArray[np.int64]]:
    """The samples (groups, size) of groups that are equally large, so many groups at once as are good for the cache."""
    bits = len(groups).bit_length()
    if not np.issubdtype(groups.dtype, np.signedinteger) or int(groups.max()) - int(groups.min()) >= 2 ** (63 - bits):
        groups = np.unique(groups, return_inverse=True)[1]
    # Group and number of a sample in one integer: sorting these is several times faster than an argsort.
    order = groups.astype(np.int64)
    order -= order.min()
    order <<= bits
    order |= np.arange(len(order))
    order.sort()
    starts = np.flatnonzero(np.diff(order >> bits, prepend=-1))
    order &= (1 << bits) - 1
    sizes = np.diff(starts, append=len(order))
    by_size = np.argsort(sizes, kind="stable")
    for chosen in np.split(by_size, np.flatnonzero(np.diff(sizes[by_size])) + 1):
        size = sizes[chosen[0]]
        at_once = max(1, _AT_ONCE // size)
        for begin in range(0, len(chosen), at_once):
            yield order[starts[chosen[begin : begin + at_once], None] + np.arange(size)]


def _quantile_of_rank(
    middle_rank: NDArray[np.int32],
    position: NDArray[np.int32],
    num_distinct: NDArray[np.int32],
    num_quantiles: int,
) -> NDArray[np.int32]:
    """The quantile of each sample of a group: by the middle rank of its equals, or spread evenly.

    Args: all but the last int (groups, size): the rank among the samples, the rank among the distinct rewards, and
        (groups, 1) the number of distinct rewards.
    """
    size, remainder = divmod(middle_rank.shape[1], num_quantiles)
    quantiles = np.maximum(middle_rank - remainder, 0) // max(size, 1)
    quantiles[position == 0] = 0
    quantiles[position == num_distinct - 1] = num_quantiles - 1
    few = num_distinct[:, 0] < num_quantiles
    quantiles[few] = _spread(position[few], num_distinct[few], num_quantiles)
    return quantiles


def _spread(position: NDArray[Any], num_distinct: int | NDArray[Any], num_quantiles: int) -> NDArray[Any]:
    """The quantile of each distinct reward where they are fewer than the quantiles: evenly, from end to end."""
    # round(position * (K - 1) / (distinct - 1)) in integers; the steps are longer than 1, so no two rewards meet
    steps = np.maximum(np.asarray(num_distinct) - 1, 1)
    spread = (2 * position * (num_quantiles - 1) + steps) // (2 * steps)
    return np.where(position == num_distinct - 1, num_quantiles - 1, spread)  # a lone one is the best


def _endless(rows: NDArray[np.int64], num_draws: int, seed: list[int]) -> NDArray[np.int64]:
    """The first `num_draws` of an endless walk over `rows`: each pass takes all of them in a new random order."""
    generator = np.random.default_rng(seed)
    num_passes = max(-(-num_draws // len(rows)), 1)
    return np.concatenate([generator.permutation(rows) for _ in range(num_passes)])[:num_draws]


def _checked_rewards(rewards: ArrayLike) -> NDArray[np.float64]:
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim != 1:
        raise DataError(f"rewards has shape {rewards.shape}, so samples have no single rank. Give one number a sample.")
    if not len(rewards):
        raise DataError(
            "There are no rewards to rank: every sample was dropped, or none was made. Check the reward function."
        )
    is_bad = ~np.isfinite(rewards)
    if is_bad.any():
        raise DataError(
            f"{is_bad.sum():,} of {len(rewards):,} rewards are NaN or infinite (the first at index {is_bad.argmax()}) "
            "and have no rank. Drop those samples, or mend the reward function."
        )
    return rewards


def _check_num_quantiles(num_quantiles: int) -> None:
    if num_quantiles < 2:
        raise ConfigError(
            f"num_quantiles={num_quantiles} compares nothing with anything. Set it to 2 or more; the paper has 5."
        )


def _check_both_classes(num_positive: int, num_negative: int) -> None:
    if num_positive < 1 or num_negative < 1:
        raise DataError(
            f"There are {num_positive} positives and {num_negative} negatives, and AUC compares the ones with the "
            "others. Give some of both."
        )


def _warn_few(distinct: NDArray[np.float64], num_quantiles: int) -> None:
    values = [f"{value:.6g}" for value in distinct]
    shown = " and ".join(values) if len(values) < 3 else f"{values[0]} to {values[-1]}"
    mend = (
        f"Set num_quantiles={len(values)}, or use a graded reward."
        if len(values) > 1
        else "Use a reward that tells samples apart."
    )
    warnings.warn(
        f"num_quantiles={num_quantiles} needs at least {num_quantiles} distinct rewards, but the pool has "
        f"{len(values)} ({shown}), so some reward tokens stay unused. {mend}",
        FewQuantilesWarning,
        stacklevel=3,
    )
