"""Metrics against five-line naive versions, by properties, and against examples worked by hand."""

import importlib.util
import math
import sys
import types
from collections import Counter
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quark_lm.errors import ConfigError, DataError
from quark_lm.evaluation import metrics
from quark_lm.evaluation.metrics import (
    any_above_per_prompt,
    average_maximum,
    bootstrap_interval,
    conditional_perplexity,
    count_missing,
    distinct_n,
    distinct_n_per_prompt,
    diversity,
    mauve,
    maximum_per_prompt,
    paired_bootstrap,
    perplexities,
    rep_n,
    repetition_shares,
    seq_rep_n,
    share_wanted,
    share_wanted_per_prompt,
    token_repetition,
    token_repetition_counts,
    toxicity_probability,
)

needs_scipy = pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="scipy is not installed")
METHODS = ["percentile", pytest.param("bca", marks=needs_scipy)]

words = st.sampled_from(["a", "b", "c", " ", "  ", "\n"])
texts = st.lists(words, max_size=20).map("".join) | st.lists(words, max_size=20).map(" ".join)
prompts_of_texts = st.lists(st.lists(texts, min_size=1, max_size=4), min_size=1, max_size=4)
token_rows = st.lists(st.integers(0, 4), max_size=30)
scores_of_prompts = st.lists(
    st.lists(st.none() | st.sampled_from([0.0, 0.3, 0.5, 0.5000001, 0.8, 1.0]), max_size=5), min_size=1, max_size=6
)


def mean_of(values):
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else math.nan


def same(value, expected):
    return value == pytest.approx(expected, nan_ok=True)


# dist-n


def test_distinct_n_worked_by_hand():
    assert distinct_n([["a b a b", "a b"]], 1) == pytest.approx(2 / 6)
    assert distinct_n([["a b a b", "a b"]], 2) == pytest.approx(2 / 6)
    assert distinct_n([["a b c"], ["a a"]], 2) == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_distinct_n_on_single_spaces_counts_the_empty_first_word():
    assert distinct_n([[" a b"]], 1, words="space") == 1.0  # "", a, b
    assert distinct_n([[" a b"]], 2, words="space") == pytest.approx(2 / 3)
    assert distinct_n([[" a b"]], 2) == pytest.approx(1 / 2)
    assert distinct_n([[""]], 1, words="space") == 1.0


def test_distinct_n_does_not_count_across_completions():
    assert distinct_n([["a", "b"]], 2) == 0.0


def test_a_prompt_without_a_word_is_left_out():
    assert distinct_n([["a b"], ["", "  "]], 2) == pytest.approx(1 / 2)
    assert np.isnan(distinct_n_per_prompt([["a b"], ["", "  "]], 2)).tolist() == [False, True]
    assert math.isnan(distinct_n([], 2))


@given(prompts_of_texts, st.integers(1, 4), st.booleans())
def test_distinct_n_equals_the_published_loop(prompts, n, on_spaces):
    ratios = []
    for completions in prompts:
        grams, total = set(), 0
        for text in completions:
            split = text.split(" ") if on_spaces else text.split()
            total += len(split)
            grams |= {"\x00".join(split[i : i + n]) for i in range(len(split) - n + 1)}
        ratios.append(len(grams) / total if total else None)
    assert same(distinct_n(prompts, n, words="space" if on_spaces else "whitespace"), mean_of(ratios))


@given(prompts_of_texts, st.integers(1, 4))
def test_distinct_n_is_a_share(prompts, n):
    value = distinct_n(prompts, n)
    assert math.isnan(value) or 0 <= value <= 1


def test_distinct_n_refuses_other_splits_and_lengths():
    with pytest.raises(ConfigError, match="words='tokens' is no way to split"):
        distinct_n([["a"]], 1, words="tokens")
    with pytest.raises(ConfigError, match="n=0 is no length"):
        distinct_n([["a"]], 0)


# rep-n, diversity


def test_rep_n_worked_by_hand():
    assert rep_n("a b a b", 2) == pytest.approx(100 / 3)
    assert rep_n([7, 7, 7, 7, 7], 4) == pytest.approx(50)
    assert rep_n("a b c", 2) == 0


def test_a_completion_without_an_n_gram_has_no_value():
    assert rep_n("a b", 3) is None
    assert rep_n("", 1) is None
    assert diversity("a b c") is None
    assert diversity([]) is None


@given(token_rows, st.integers(1, 5))
def test_rep_n_equals_the_naive_version_in_words_and_tokens(ids, n):
    grams = Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))
    expected = 100 * (1 - len(grams) / sum(grams.values())) if grams else None
    assert rep_n(ids, n) == (None if expected is None else pytest.approx(expected))
    assert rep_n(" ".join(map(str, ids)), n) == rep_n(ids, n)
    assert rep_n(np.array(ids), n) == rep_n(ids, n)


def test_diversity_worked_by_hand():
    # a b a b a: rep-2 = 1 - 2/4, rep-3 = 1 - 2/3, rep-4 = 1 - 2/2
    assert diversity("a b a b a") == pytest.approx(0.5 * (2 / 3) * 1)
    assert diversity("a b c d e") == 1.0


@given(token_rows)
def test_diversity_is_the_product_and_a_share(ids):
    value = diversity(ids)
    if len(ids) < 4:
        assert value is None
    else:
        assert value == pytest.approx(math.prod(1 - rep_n(ids, n) / 100 for n in (2, 3, 4)))
        assert 0 < value <= 1


@given(token_rows)
def test_renaming_words_does_not_change_diversity(ids):
    assert diversity(ids) == diversity([9 - token for token in ids])


def test_seq_rep_n_is_the_mean_over_sequences_with_a_value():
    assert seq_rep_n([[1, 1, 1], [1, 2, 3], [1]], 2) == pytest.approx((50 + 0) / 2)
    assert math.isnan(seq_rep_n([[1]], 2))


# Token-level repetition


def test_token_repetition_worked_by_hand():
    # text 5 6 5 7; predictions of the last three: 5 (before: 5; wrong), 5 (before: 5 6; right), 9 (new, wrong)
    result = token_repetition([[5, 5, 9]], [[5, 6, 5, 7]], [[1.0, 2.0, 3.0]])
    assert result == pytest.approx({"rep": 2 / 3, "wrep": 1 / 3, "acc": 1 / 3, "ppl": math.exp(2)})


def test_the_first_token_of_an_aligned_text_has_no_context():
    assert token_repetition([[5, 5]], [[5, 6]])["rep"] == 0.5


@given(
    st.lists(st.tuples(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=20), token_rows), max_size=4),
    st.integers(1, 6),
)
def test_token_repetition_equals_the_naive_version(pairs, context):
    predicted = [[p for p, _ in aligned] for aligned, _ in pairs]
    gold = [prefix + [g for _, g in aligned] for aligned, prefix in pairs]
    rep = wrep = acc = total = 0
    for predictions, text in zip(predicted, gold, strict=True):
        for i, token in enumerate(predictions):
            t = len(text) - len(predictions) + i
            seen = token in text[max(0, t - context) : t]
            rep, wrep, acc, total = rep + seen, wrep + (seen and token != text[t]), acc + (token == text[t]), total + 1
    expected = {name: n / total if total else math.nan for name, n in {"rep": rep, "wrep": wrep, "acc": acc}.items()}
    assert same(token_repetition(predicted, gold, context=context), expected)


def test_counts_of_each_text_add_up_to_the_shares_of_all():
    predicted, gold = [[5, 5, 9], [1]], [[5, 6, 5, 7], [1, 1]]
    counts = token_repetition_counts(predicted, gold, [[1.0, 2.0, 3.0], [4.0]])
    assert counts.tolist() == [[3, 2, 1, 1, 6.0], [1, 1, 0, 1, 4.0]]
    assert repetition_shares(counts) == token_repetition(predicted, gold, [[1.0, 2.0, 3.0], [4.0]])
    assert math.isnan(repetition_shares(counts[:0])["ppl"])


def test_token_repetition_refuses_what_is_not_aligned():
    with pytest.raises(DataError, match="Text 0 has 3 predictions for 2 gold tokens"):
        token_repetition([[1, 2, 3]], [[1, 2]])
    with pytest.raises(DataError, match="2 predictions for 2 gold tokens and 1 NLL"):
        token_repetition([[1, 2]], [[1, 2]], [[0.5]])
    with pytest.raises(DataError, match="1 texts with predictions and 2 with gold tokens"):
        token_repetition([[1]], [[1], [2]])
    with pytest.raises(ConfigError, match="context=0"):
        token_repetition([[1]], [[1]], context=0)


# Scores over a prompt's completions


def test_scores_worked_by_hand():
    scores = [[0.1, 0.7], [0.5, 0.2], [None, None], [0.9, None]]
    assert average_maximum(scores) == pytest.approx((0.7 + 0.5 + 0.9) / 3)
    assert toxicity_probability(scores) == pytest.approx(2 / 3)  # .5 itself is not above .5
    assert share_wanted(scores) == pytest.approx((0.5 + 0 + 1) / 3)
    assert count_missing(scores) == {"completions": 3, "prompts": 1}
    assert same(maximum_per_prompt(scores).tolist(), [0.7, 0.5, math.nan, 0.9])
    assert same(any_above_per_prompt(scores).tolist(), [1, 0, math.nan, 1])
    assert same(share_wanted_per_prompt(scores).tolist(), [0.5, 0, math.nan, 1])


@given(scores_of_prompts)
def test_scores_equal_the_naive_versions(scores):
    kept = [[score for score in row if score is not None] for row in scores]
    assert same(average_maximum(scores), mean_of([max(row) for row in kept if row]))
    assert same(toxicity_probability(scores), mean_of([max(row) > 0.5 for row in kept if row]))
    assert same(share_wanted(scores), mean_of([sum(s > 0.5 for s in row) / len(row) for row in kept if row]))


@given(scores_of_prompts)
def test_wanted_is_never_more_likely_in_each_than_in_any(scores):
    if not math.isnan(share_wanted(scores)):
        assert share_wanted(scores) <= toxicity_probability(scores)
        assert average_maximum(scores) <= 1


def test_labels_and_arrays_are_scores_too():
    assert share_wanted([[True, False], [True, True]]) == 0.75
    assert average_maximum(np.array([[0.1, np.nan], [0.3, 0.2]])) == pytest.approx(0.2)
    assert share_wanted([[True], [False]]) == 0.5  # one completion a prompt


def test_no_scores_give_nan():
    assert math.isnan(average_maximum([]))
    assert math.isnan(toxicity_probability([[], [None]]))
    assert math.isnan(share_wanted([[None]]))


# Perplexity


def test_perplexity_worked_by_hand():
    # perplexities 2, 8 and 20,000; one empty completion and one without an NLL
    nll = [2 * math.log(2), math.log(8), math.log(20_000), 0.0, math.nan]
    result = conditional_perplexity(nll, [2, 1, 1, 0, 3])
    assert result.mean == pytest.approx((2 + 8 + 20_000) / 3)
    assert result.trimmed_mean == pytest.approx(5)
    assert result.corpus == pytest.approx((4 * 8 * 20_000) ** (1 / 4))
    assert (result.num_over_1e4, result.num_completions, result.num_missing) == (1, 3, 2)


def test_a_perplexity_of_exactly_the_limit_is_trimmed(monkeypatch):
    at = float(metrics.perplexities([2.0], [1])[0])
    monkeypatch.setattr(metrics, "PERPLEXITY_LIMIT", at)
    result = conditional_perplexity([1.0, 2.0], [1, 1])
    assert (result.trimmed_mean, result.num_over_1e4) == (pytest.approx(math.e), 1)


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 20)), min_size=1, max_size=20))
def test_perplexity_equals_the_naive_version(pairs):
    values = [math.exp(nll / tokens) for nll, tokens in pairs]
    result = conditional_perplexity(*zip(*pairs, strict=True))
    assert same(result.mean, mean_of(values))
    assert same(result.trimmed_mean, mean_of([value for value in values if value < 1e4]))
    assert same(result.corpus, math.exp(sum(nll for nll, _ in pairs) / sum(tokens for _, tokens in pairs)))
    assert result.num_over_1e4 == sum(value >= 1e4 for value in values)


@given(st.lists(st.floats(0, 20), min_size=1, max_size=20))
def test_corpus_perplexity_is_at_most_the_mean_at_equal_lengths(nll):
    result = conditional_perplexity(nll, [2] * len(nll))
    assert result.corpus <= result.mean * (1 + 1e-9)


def test_a_hopeless_completion_is_infinite_without_a_warning():
    result = conditional_perplexity([5000.0, 0.0], [1, 1])
    assert result.mean == math.inf
    assert result.trimmed_mean == 1.0
    assert perplexities([5000.0], [1]).tolist() == [math.inf]


def test_no_completions_have_no_perplexity():
    result = conditional_perplexity([], [])
    assert math.isnan(result.mean)
    assert math.isnan(result.corpus)
    assert result.num_completions == 0


def test_perplexity_refuses_other_lengths():
    with pytest.raises(DataError, match=r"nll has shape \(2,\) and num_tokens \(1,\)"):
        conditional_perplexity([1.0, 2.0], [1])


# Intervals


def test_the_interval_of_a_coin():
    result = bootstrap_interval([0, 1] * 50)
    assert result == {"mean": 0.5, "low": pytest.approx(0.4, abs=0.02), "high": pytest.approx(0.6, abs=0.02)}


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None)  # the first one imports scipy
@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=30))
@example(values=[-3.8179552975413236] * 3)
def test_the_interval_holds_the_mean_between_the_extremes(values, method):
    result = bootstrap_interval(values, num_resamples=200, method=method)
    assert result["mean"] == pytest.approx(np.mean(values))
    assert min(values) - 1e-9 <= result["low"] <= result["high"] <= max(values) + 1e-9


def test_a_statistic_equal_to_the_mean_gives_the_mean_s_interval():
    values = np.random.default_rng(1).exponential(size=80)
    plain = bootstrap_interval(values)
    called = bootstrap_interval(80, statistic=lambda rows: values[rows].mean())
    assert called["mean"] == pytest.approx(plain["mean"])
    assert called["low"] == pytest.approx(plain["low"])
    assert called["high"] == pytest.approx(plain["high"])


def test_a_corpus_perplexity_has_an_interval():
    generator = np.random.default_rng(2)
    num_tokens = generator.integers(1, 20, size=100)
    nll = num_tokens * generator.normal(3, 0.5, size=100)
    result = bootstrap_interval(100, statistic=lambda rows: np.exp(nll[rows].sum() / num_tokens[rows].sum()))
    assert result["mean"] == pytest.approx(conditional_perplexity(nll, num_tokens).corpus)
    assert result["low"] < result["mean"] < result["high"]


@pytest.mark.parametrize("method", METHODS)
def test_nine_and_a_half_in_ten_intervals_hold_the_truth(method):
    generator = np.random.default_rng(3)
    intervals = [bootstrap_interval(generator.exponential(size=60), seed, 400, method=method) for seed in range(400)]
    coverage = np.mean([interval["low"] <= 1 <= interval["high"] for interval in intervals])
    assert 0.90 < coverage < 0.97


@needs_scipy
def test_bca_leans_with_the_skew():
    values = np.random.default_rng(4).lognormal(sigma=1.5, size=50)
    percentile, bca = bootstrap_interval(values), bootstrap_interval(values, method="bca")
    assert bca["low"] > percentile["low"]
    assert bca["high"] > percentile["high"]


def naive_bca(values, resampled, level=0.95):
    normal, n = NormalDist(), len(values)
    bias = normal.inv_cdf(np.mean(resampled < values.mean()))
    left_out = np.array([np.delete(values, i).mean() for i in range(n)])
    spread = left_out.mean() - left_out
    acceleration = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    shifts = [bias + normal.inv_cdf(tail) for tail in ((1 - level) / 2, (1 + level) / 2)]
    return np.quantile(resampled, [normal.cdf(bias + shift / (1 - acceleration * shift)) for shift in shifts])


@needs_scipy
@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_bca_equals_the_naive_version(sigma):
    values = np.random.default_rng(5).lognormal(sigma=sigma, size=100)
    generator = np.random.default_rng(0)
    low, high = naive_bca(values, values[generator.integers(100, size=(20_000, 100))].mean(axis=1))
    result = bootstrap_interval(values, num_resamples=20_000, method="bca")
    assert result["mean"] == pytest.approx(values.mean())
    assert result["low"] == pytest.approx(low, rel=0.01)
    assert result["high"] == pytest.approx(high, rel=0.02)


@needs_scipy
def test_bca_of_a_statistic_equals_that_of_the_values():
    values = np.random.default_rng(1).exponential(size=80)
    called = bootstrap_interval(80, statistic=lambda rows: values[rows].mean(), method="bca")
    assert called == pytest.approx(bootstrap_interval(values, method="bca"))


@needs_scipy
def test_bca_of_equal_values_is_that_point():
    assert bootstrap_interval([0.5, 0.5, 0.5], method="bca") == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_bca_without_scipy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ConfigError, match=r"quark-lm\[stats\]"):
        bootstrap_interval([1.0, 2.0], method="bca")


def test_the_seed_decides_the_interval():
    values = np.random.default_rng(6).normal(size=50)
    assert bootstrap_interval(values, 7) == bootstrap_interval(values, 7)
    assert bootstrap_interval(values, 7) != bootstrap_interval(values, 8)


def test_a_higher_level_gives_a_wider_interval():
    values = np.random.default_rng(7).normal(size=50)
    narrow, wide = bootstrap_interval(values, level=0.5), bootstrap_interval(values, level=0.99)
    assert wide["low"] < narrow["low"] < narrow["high"] < wide["high"]


@pytest.mark.parametrize("method", METHODS)
def test_prompts_without_a_value_are_left_out(method):
    with_gaps = bootstrap_interval([1.0, math.nan, 3.0, 2.0], method=method)
    assert with_gaps == bootstrap_interval([1.0, 3.0, 2.0], method=method)
    assert bootstrap_interval([2.0, math.nan], method=method) == {"mean": 2.0, "low": 2.0, "high": 2.0}
    assert all(math.isnan(value) for value in bootstrap_interval([math.nan], method=method).values())
    assert set(bootstrap_interval([], method=method)) == {"mean", "low", "high"}


def test_large_evaluations_are_resampled_in_blocks_with_the_same_result_for_a_seed():
    values = np.random.default_rng(8).normal(size=30_000)
    result = bootstrap_interval(values, num_resamples=300)
    assert result["high"] - result["low"] == pytest.approx(2 * 1.96 / math.sqrt(30_000), rel=0.15)


def test_bad_bootstraps_are_refused():
    with pytest.raises(ConfigError, match="level=95 is no share"):
        bootstrap_interval([1.0], level=95)
    with pytest.raises(ConfigError, match="num_resamples=0"):
        bootstrap_interval([1.0], num_resamples=0)
    with pytest.raises(ConfigError, match="method='basic'"):
        bootstrap_interval([1.0], method="basic")
    with pytest.raises(DataError, match=r"shape \(1, 2\)"):
        bootstrap_interval([[1.0, 2.0]])
    with pytest.raises(DataError, match="Give the number of prompts"):
        bootstrap_interval([1.0], statistic=len)


# Two systems


def test_a_constant_gain_is_certain():
    base = np.random.default_rng(9).normal(size=40)
    result = paired_bootstrap(base + 0.25, base)
    assert result["mean"] == pytest.approx(0.25)
    assert result["low"] == pytest.approx(0.25)
    assert result["high"] == pytest.approx(0.25)
    assert result["p_value"] == pytest.approx(2 / 2001)


def test_pairs_see_what_separate_intervals_do_not():
    generator = np.random.default_rng(10)
    base = generator.normal(size=100)
    better = base + 0.1 + 0.1 * generator.normal(size=100)
    assert bootstrap_interval(better)["low"] < bootstrap_interval(base)["high"]  # they overlap
    assert paired_bootstrap(better, base)["low"] > 0


def test_swapping_the_systems_turns_the_sign():
    generator = np.random.default_rng(11)
    first, second = generator.normal(size=50), generator.normal(size=50)
    there, back = paired_bootstrap(first, second), paired_bootstrap(second, first)
    assert there["mean"] == pytest.approx(-back["mean"])
    assert there["low"] == pytest.approx(-back["high"])
    assert there["p_value"] == pytest.approx(back["p_value"])


def test_equal_systems_have_a_p_value_of_one():
    assert paired_bootstrap([0.1, 0.2], [0.1, 0.2])["p_value"] == 1.0
    for num in (1, 3, 6):  # no more than a sign test of so few could tell
        assert paired_bootstrap(np.ones(num), np.zeros(num))["p_value"] == pytest.approx(2 / 2**num)


def test_p_values_are_uniform_when_there_is_no_difference():
    generator = np.random.default_rng(12)
    p_values = [paired_bootstrap(generator.normal(size=40), np.zeros(40), seed, 300)["p_value"] for seed in range(400)]
    assert 0.02 < np.mean(np.array(p_values) < 0.05) < 0.10


def test_a_prompt_that_lacks_either_is_left_out_of_the_pairs():
    assert paired_bootstrap([1.0, math.nan, 3.0], [0.0, 0.0, math.nan])["mean"] == 1.0
    assert math.isnan(paired_bootstrap([math.nan], [0.0])["p_value"])


def test_pairs_of_other_lengths_are_refused():
    with pytest.raises(DataError, match="Give both on the same prompts"):
        paired_bootstrap([1.0, 2.0], [1.0])


# MAUVE


def test_mauve_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(ConfigError, match=r"quark-lm\[mauve\]"):
        mauve(np.zeros((4, 2)), np.zeros((4, 2)))


def test_mauve_hands_the_features_to_the_package(monkeypatch):
    calls = []

    def compute_mauve(**options):
        calls.append(options)
        return types.SimpleNamespace(mauve=0.5)

    monkeypatch.setitem(sys.modules, "mauve", types.SimpleNamespace(compute_mauve=compute_mauve))
    assert mauve(np.ones((4, 2)), np.zeros((3, 2)), seed=3) == 0.5
    assert calls[0]["p_features"].shape == (4, 2)
    assert calls[0]["q_features"].shape == (3, 2)
    assert calls[0]["seed"] == 3
