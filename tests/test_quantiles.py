"""Quantiles against naive versions and by properties: sizes, ties, few groups, prompts, windows, draws and AUC."""

import math
import tracemalloc
import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from quark_lm import quantiles as quantiles_module
from quark_lm.errors import ConfigError, DataError, QuarkError
from quark_lm.quantiles import (
    FewQuantilesWarning,
    assign,
    assign_per_group,
    auc,
    auc_standard_error,
    draw,
    in_window,
)

floats = st.floats(-1e6, 1e6)
few_values = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0])  # so that ties are common
rewards_with_ties = st.lists(few_values, min_size=1, max_size=60).map(np.array)
distinct_rewards = st.lists(floats, min_size=2, max_size=80, unique=True).map(np.array)
num_quantiles_between_2_and_9 = st.integers(2, 9)


def quietly(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewQuantilesWarning)
        return function(*args)


def naive_assign(rewards, num_quantiles):
    """The rule of `assign`, one sample at a time."""
    groups, ranked = sorted(set(rewards)), sorted(rewards)
    size, remainder = divmod(len(rewards), num_quantiles)
    quantiles = []
    for reward in rewards:
        position, copies = groups.index(reward), ranked.count(reward)
        middle = ranked.index(reward) + (copies - 1) // 2
        if reward == groups[-1]:
            quantiles.append(num_quantiles - 1)
        elif reward == groups[0]:
            quantiles.append(0)
        elif len(groups) < num_quantiles:
            quantiles.append(int(np.floor(position * (num_quantiles - 1) / (len(groups) - 1) + 0.5)))
        else:
            quantiles.append(max(0, (middle - remainder) // size))
    return quantiles


# Quantize


def test_a_worked_example_without_ties():
    assert assign([0.3, 0.1, 0.9, 0.5, 0.7, 0.2, 0.8], 3).tolist() == [0, 0, 2, 1, 1, 0, 2]


@given(distinct_rewards, num_quantiles_between_2_and_9)
def test_sizes_without_ties_are_the_authors(rewards, num_quantiles):
    if len(rewards) < num_quantiles:
        return
    size, remainder = divmod(len(rewards), num_quantiles)
    counts = np.bincount(assign(rewards, num_quantiles), minlength=num_quantiles)
    assert counts.tolist() == [size + remainder] + [size] * (num_quantiles - 1)


@given(rewards_with_ties, num_quantiles_between_2_and_9)
def test_assign_equals_the_naive_version(rewards, num_quantiles):
    assert quietly(assign, rewards, num_quantiles).tolist() == naive_assign(rewards.tolist(), num_quantiles)


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=60).map(np.array),
    num_quantiles_between_2_and_9,
)
def test_assign_equals_the_naive_version_for_any_floats(rewards, num_quantiles):
    assert quietly(assign, rewards, num_quantiles).tolist() == naive_assign(rewards.tolist(), num_quantiles)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(200, 600), st.integers(0, 3), st.integers(2, 300))
def test_assign_equals_the_naive_version_when_some_groups_are_large(seed, num, digits, num_quantiles):
    rewards = np.random.default_rng(seed).beta(0.5, 0.8, num)
    rewards[::3] = rewards[::3].round(digits)
    assert quietly(assign, rewards, num_quantiles).tolist() == naive_assign(rewards.tolist(), num_quantiles)


def test_the_rewards_are_left_as_they_were():
    rewards = np.array([0.3, 0.1, 0.2, 0.1])
    rewards.flags.writeable = False
    assert assign(rewards, 2).tolist() == [1, 0, 1, 0]
    assert assign_per_group(rewards, np.zeros(4, int), 2).tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(("per_group", "bytes_a_sample"), [(False, 24), (True, 64)])
def test_ranking_takes_a_bounded_memory_a_sample(per_group, bytes_a_sample):
    generator = np.random.default_rng(0)
    num = 1_000_000
    rewards, groups = generator.random(num), generator.integers(0, num // 100, num)
    tracemalloc.start()
    assign_per_group(rewards, groups, 5) if per_group else assign(rewards, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < bytes_a_sample * num


@given(rewards_with_ties, num_quantiles_between_2_and_9)
def test_equal_rewards_share_a_quantile(rewards, num_quantiles):
    quantiles = quietly(assign, rewards, num_quantiles)
    assert len({(reward, quantile) for reward, quantile in zip(rewards, quantiles, strict=True)}) == len(set(rewards))


@given(rewards_with_ties, num_quantiles_between_2_and_9)
def test_a_better_reward_never_earns_a_worse_quantile(rewards, num_quantiles):
    quantiles = quietly(assign, rewards, num_quantiles)
    assert (np.diff(quantiles[np.argsort(rewards)]) >= 0).all()


@given(rewards_with_ties, num_quantiles_between_2_and_9)
def test_the_best_reward_earns_the_best_quantile_and_the_worst_the_worst(rewards, num_quantiles):
    quantiles = quietly(assign, rewards, num_quantiles)
    assert (quantiles[rewards == rewards.max()] == num_quantiles - 1).all()
    if rewards.min() < rewards.max():
        assert (quantiles[rewards == rewards.min()] == 0).all()


@given(rewards_with_ties, num_quantiles_between_2_and_9, st.randoms(use_true_random=False))
def test_the_order_of_the_samples_does_not_matter(rewards, num_quantiles, random):
    order = np.array(random.sample(range(len(rewards)), len(rewards)))
    assert (quietly(assign, rewards, num_quantiles)[order] == quietly(assign, rewards[order], num_quantiles)).all()


@given(rewards_with_ties, num_quantiles_between_2_and_9)
def test_only_the_order_of_the_rewards_matters(rewards, num_quantiles):
    assert (quietly(assign, rewards, num_quantiles) == quietly(assign, np.exp(rewards), num_quantiles)).all()


@given(rewards_with_ties, num_quantiles_between_2_and_9)
def test_with_few_groups_each_has_a_quantile_of_its_own(rewards, num_quantiles):
    num_groups = len(set(rewards))
    used = len(set(quietly(assign, rewards, num_quantiles)))
    assert used <= min(num_groups, num_quantiles)
    if num_groups < num_quantiles:
        assert used == num_groups


def test_two_distinct_rewards_use_the_two_ends_and_warn():
    message = r"num_quantiles=8 needs at least 8 distinct rewards, but the pool has 2 \(0 and 1\).* Set num_quantiles=2"
    with pytest.warns(FewQuantilesWarning, match=message) as caught:
        assert assign([0.0, 1.0, 1.0, 0.0], 8).tolist() == [0, 7, 7, 0]
    assert len(caught) == 1
    assert caught[0].filename == __file__  # it points at the caller


def test_three_distinct_rewards_are_spread_evenly():
    with pytest.warns(FewQuantilesWarning, match=r"has 3 \(0.1 to 0.9\)"):
        assert assign([0.1, 0.5, 0.9], 5).tolist() == [0, 2, 4]


def test_constant_rewards_are_all_the_best_and_warn():
    with pytest.warns(FewQuantilesWarning, match="tells samples apart"):
        assert assign([0.5, 0.5, 0.5], 5).tolist() == [4, 4, 4]


def test_minus_zero_equals_zero():
    assert assign([0.0, -0.0, 1.0], 2).tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    "function", [assign, lambda rewards, k: assign_per_group(rewards, np.zeros(len(rewards), int), k)]
)
class TestBadRewards:
    def test_nan_is_refused_with_its_index(self, function):
        with pytest.raises(DataError, match=r"1 of 3 rewards are NaN or infinite \(the first at index 1\)"):
            function([0.1, float("nan"), 0.3], 2)

    def test_infinity_is_refused(self, function):
        with pytest.raises(DataError, match="2 of 2 rewards"):
            function([float("inf"), -float("inf")], 2)

    def test_no_rewards_are_refused(self, function):
        with pytest.raises(DataError, match="no rewards to rank"):
            function([], 2)

    def test_one_quantile_is_refused(self, function):
        with pytest.raises(ConfigError, match="num_quantiles=1 compares nothing"):
            function([0.1, 0.2], 1)

    def test_the_error_is_also_a_value_error_and_a_quark_error(self, function):
        with pytest.raises(ValueError, match="rewards") as caught:
            function([], 2)
        assert isinstance(caught.value, QuarkError)


def test_a_matrix_of_rewards_is_refused():
    with pytest.raises(DataError, match=r"shape \(2, 2\)"):
        assign(np.zeros((2, 2)), 2)


# Within a prompt


@given(
    arrays.arrays(np.int64, st.integers(1, 60), elements=st.integers(-3, 5)).flatmap(
        lambda groups: st.tuples(st.just(groups), arrays.arrays(np.float64, len(groups), elements=few_values))
    ),
    num_quantiles_between_2_and_9,
)
def test_per_group_is_assign_within_each_group(groups_and_rewards, num_quantiles):
    groups, rewards = groups_and_rewards
    quantiles = quietly(assign_per_group, rewards, groups, num_quantiles)
    for group in set(groups):
        inside = groups == group
        if len(set(rewards[inside])) == 1:
            assert (quantiles[inside] == -1).all()
        else:
            assert (quantiles[inside] == quietly(assign, rewards[inside], num_quantiles)).all()


def test_per_group_is_the_same_however_many_prompts_are_ranked_at_once(monkeypatch):
    generator = np.random.default_rng(0)
    groups, rewards = generator.integers(0, 50, 500), generator.random(500).round(1)
    whole = assign_per_group(rewards, groups, 4)
    for at_once in (1, 30, 100):
        monkeypatch.setattr(quantiles_module, "_AT_ONCE", at_once)
        assert (assign_per_group(rewards, groups, 4) == whole).all()


@pytest.mark.parametrize(
    "groups",
    [
        np.array([-(2**63), 2**63 - 1, -(2**63), 2**63 - 1, 0, 0]),
        np.array([2**64 - 1, 2**63, 2**64 - 1, 2**63, 7, 7], dtype=np.uint64),
        np.array([-128, 127, -128, 127, 0, 0], dtype=np.int8),
        np.array(["a", "b", "a", "b", "c", "c"]),
        np.array([True, False, True, False, False, False]),
    ],
    ids=["far apart", "unsigned", "short", "text", "yes or no"],
)
def test_groups_may_be_any_numbers_or_texts(groups):
    rewards = np.array([0.1, 0.9, 0.2, 0.8, 0.5, 0.5])
    numbered = np.unique(groups, return_inverse=True)[1]
    expected = [-1] * 6
    for group in set(numbered.tolist()):
        inside = np.flatnonzero(numbered == group)
        if len(set(rewards[inside])) > 1:
            for i, quantile in zip(inside, naive_assign(rewards[inside].tolist(), 2), strict=True):
                expected[i] = quantile
    assert quietly(assign_per_group, rewards, groups, 2).tolist() == expected


def test_a_prompt_whose_samples_all_score_alike_is_not_drawn():
    assert assign_per_group([0.1, 0.9, 0.5, 0.5], ["a", "a", "b", "b"], 2).tolist() == [0, 1, -1, -1]


def test_a_prompt_with_one_sample_is_not_drawn():
    assert assign_per_group([0.1, 0.9, 0.5], [1, 1, 2], 2).tolist() == [0, 1, -1]


def test_per_group_warns_once_when_no_prompt_fills_the_quantiles():
    with pytest.warns(FewQuantilesWarning, match="none has more than 2.*Set num_quantiles=2, or raise") as caught:
        assert assign_per_group([1, 2, 3, 4], [0, 0, 1, 1], 5).tolist() == [0, 4, 0, 4]
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_per_group_is_quiet_when_one_prompt_fills_the_quantiles():
    assert assign_per_group([1, 2, 3, 4, 5], [0, 0, 0, 1, 1], 3).tolist() == [0, 1, 2, 0, 2]


def test_groups_of_another_length_are_refused():
    with pytest.raises(DataError, match=r"groups has shape \(1,\)"):
        assign_per_group([1.0, 2.0], [0], 2)


# Window


def test_the_window_holds_the_last_rounds_and_the_current_one():
    rounds = np.array([0, 1, 2, 3, 4])
    assert in_window(rounds, 3, 2).tolist() == [False, False, True, True, False]
    assert in_window(rounds, 3, 1).tolist() == [False, False, False, True, False]
    assert in_window(rounds, 3, 99).tolist() == [True, True, True, True, False]
    assert in_window(rounds, 4, None).all()


def test_a_window_of_no_rounds_is_refused():
    with pytest.raises(ConfigError, match="pool_window=0"):
        in_window([0], 0, 0)


# Draw

quantiles_to_draw = st.lists(st.integers(-1, 4), min_size=1, max_size=40).map(np.array)
modes = st.sampled_from(["all", "balanced", "ends", "best"])


def can_draw(quantiles, mode):
    wanted = {"all": range(5), "balanced": range(5), "ends": (0, 4), "best": (4,)}[mode]
    return np.isin(quantiles, wanted).any()


@given(quantiles_to_draw, st.integers(0, 200), st.integers(0, 2**31), st.integers(0, 50), modes)
def test_draws_are_a_pure_function_and_the_first_do_not_depend_on_how_many(quantiles, num_draws, seed, round, mode):
    if not can_draw(quantiles, mode):
        return
    rows = draw(quantiles, num_draws, seed, round, mode, 5)
    assert rows.dtype == np.int64
    assert len(rows) == num_draws
    assert rows.tolist() == draw(quantiles, num_draws, seed, round, mode, 5).tolist()
    assert rows.tolist() == draw(quantiles, num_draws + 17, seed, round, mode, 5)[:num_draws].tolist()


@given(quantiles_to_draw, st.integers(1, 200), modes)
def test_rows_repeat_only_when_all_were_drawn(quantiles, num_draws, mode):
    if not can_draw(quantiles, mode):
        return
    rows = draw(quantiles, num_draws, 0, 0, mode, 5)
    strata = [quantiles >= 0] if mode == "all" else [quantiles == k for k in range(5)]
    for stratum in strata:
        counts = [Counter(rows.tolist())[row] for row in np.flatnonzero(stratum)]
        assert max(counts, default=0) - min(counts, default=0) <= 1


@given(quantiles_to_draw, st.integers(1, 200), modes)
def test_each_mode_draws_from_its_quantiles_equally(quantiles, num_draws, mode):
    if not can_draw(quantiles, mode):
        return
    drawn = quantiles[draw(quantiles, num_draws, 3, 1, mode, 5)]
    wanted = {"all": range(5), "balanced": range(5), "ends": (0, 4), "best": (4,)}[mode]
    present = sorted(set(quantiles) & set(wanted))
    assert set(drawn) <= set(present)
    if mode != "all":
        counts = [int((drawn == quantile).sum()) for quantile in present]
        assert max(counts) - min(counts) <= 1


def test_every_batch_of_the_balanced_draw_is_balanced():
    quantiles = np.repeat(np.arange(5), [1000, 10, 10, 10, 10])
    batches = quantiles[draw(quantiles, 400, 0, 0, "balanced", 5)].reshape(-1, 20)
    assert all(np.bincount(batch, minlength=5).tolist() == [4] * 5 for batch in batches)


def test_all_draws_each_row_once_in_a_pass():
    assert sorted(draw(np.array([0, 1, -1, 2]), 3, 0, 0)) == [0, 1, 3]


def test_rounds_and_seeds_draw_differently():
    quantiles = np.zeros(1000, dtype=int)
    draws = [tuple(draw(quantiles, 20, seed, round)) for seed in range(3) for round in range(3)]
    assert len(set(draws)) == 9


def test_all_is_uniform_over_rows():
    counts = np.bincount(np.concatenate([draw(np.zeros(10, int), 3, 0, round) for round in range(3000)]))
    assert abs(counts - 900).max() < 120  # four standard errors of a binomial(3000, .3)


def test_the_order_inside_a_block_is_random():
    quantiles = np.array([0, 4])
    first = quantiles[[draw(quantiles, 2, 0, round, "ends", 5)[0] for round in range(200)]]
    assert 70 < (first == 4).sum() < 130


def test_an_end_without_a_sample_leaves_the_other():
    for best_share in (0.5, 0.75):
        assert set(draw(np.array([4, 4, 2]), 10, 0, 0, "ends", 5, best_share=best_share)) == {0, 1}
        assert set(draw(np.array([2, 0, 0]), 10, 0, 0, "ends", 5, best_share=best_share)) == {1, 2}


@pytest.mark.parametrize(("best_share", "best"), [(0.5, 8), (0.75, 12), (0.25, 4), (0.8, 13), (15 / 16, 15)])
def test_a_share_of_the_best_holds_in_every_run(best_share, best):
    quantiles = np.repeat(np.arange(5), 400)
    rows = draw(quantiles, 160, 0, 0, "ends", 5, best_share=best_share)
    drawn = quantiles[rows]
    assert set(drawn) == {0, 4}
    assert len(set(rows)) == len(rows)
    assert (drawn == 4).sum() == pytest.approx(10 * best, abs=2)
    assert rows[:50].tolist() == draw(quantiles, 50, 0, 0, "ends", 5, best_share=best_share).tolist()
    if best_share != 0.8:  # of five
        assert ((drawn.reshape(-1, 16) == 4).sum(1) == best).all()


def test_nothing_to_draw_is_an_error():
    with pytest.raises(DataError, match="draw='all' found no sample to learn from among 2 rows"):
        draw(np.array([-1, -1]), 4, 0, 0)
    with pytest.raises(DataError, match="draw='best'"):
        draw(np.array([0, 1]), 4, 0, 0, "best", 5)


def test_an_unknown_mode_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"draw='top' is not .* Choose one of all, balanced, ends, best"):
        draw(np.array([0]), 1, 0, 0, "top", 5)


# AUC


@given(
    st.lists(st.tuples(few_values, st.booleans()), min_size=2, max_size=40).filter(
        lambda pairs: len({label for _, label in pairs}) == 2
    )
)
def test_auc_counts_pairs(pairs):
    positives = [score for score, label in pairs if label]
    negatives = [score for score, label in pairs if not label]
    wins = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    scores, labels = zip(*pairs, strict=True)
    assert auc(scores, labels) == pytest.approx(wins / len(positives) / len(negatives))
    assert auc(scores, labels) == pytest.approx(1 - auc([-score for score in scores], labels))


def test_auc_worked_example():
    assert auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75


def test_auc_takes_infinite_scores():
    assert auc([-np.inf, 0.0, np.inf], [0, 0, 1]) == 1.0


def test_auc_refuses_one_class_and_nan():
    with pytest.raises(DataError, match="0 positives and 2 negatives"):
        auc([1.0, 2.0], [0, 0])
    with pytest.raises(DataError, match="1 of 2 scores are NaN"):
        auc([1.0, np.nan], [0, 1])
    with pytest.raises(DataError, match="Give one label a score"):
        auc([1.0, 2.0], [0])


def test_standard_error_worked_by_hand():
    # A = .75, 3 and 2: Q1 = .6, Q2 = 1.125 / 1.75; variance = (.1875 + 2 (Q1 - .5625) + 1 (Q2 - .5625)) / 6
    assert auc_standard_error(0.75, 3, 2) == pytest.approx(math.sqrt((0.1875 + 0.075 + 0.0803571) / 6), rel=1e-6)
    assert auc_standard_error(1.0, 10, 10) == 0.0


def test_standard_error_is_the_spread_of_the_auc():
    generator = np.random.default_rng(0)
    labels = np.arange(200) < 100
    values = [auc(generator.exponential(1.0 + labels), labels) for _ in range(1000)]
    assert auc_standard_error(2 / 3, 100, 100) == pytest.approx(np.std(values), rel=0.1)


def test_standard_error_needs_both_classes():
    with pytest.raises(DataError, match="3 positives and 0 negatives"):
        auc_standard_error(0.5, 3, 0)
