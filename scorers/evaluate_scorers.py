"""Figures of every offline scorer on the same tests, and the cards beside the weights.

    python scorers/evaluate_scorers.py --data ../shared/data --overlap
    python scorers/evaluate_scorers.py --scorer toxicity-ngrams --cards

The training scripts call `measure` and `write_card`; no figure of a card is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scorer_data import data_folder, identity_probes, read_jsonl, read_tsv, real_toxicity_prompts, toxicity_pairs

from quark_lm.rewards.minilm import WEIGHTS, MiniLMScorer
from quark_lm.rewards.ngrams import NgramScorer
from quark_lm.rewards.sentiment import sentiment_independent

SCORERS = ("sentiment-minilm", "vader", "toxicity-minilm", "toxicity-ngrams")
TRAINED_ON = {"toxicity-ngrams": ("Jigsaw test", "Davidson")}  # no tests of that scorer

Score = Callable[[list[str]], list[float | None]]


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    """The probability that a positive text scores above a negative one, ties half."""
    ranks = average_ranks(scores)
    positive = labels.astype(bool)
    num_positive, num_negative = positive.sum(), (~positive).sum()
    return float((ranks[positive].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, equal values sharing their mean rank."""
    return float(np.corrcoef(average_ranks(a), average_ranks(b))[0, 1])


def average_ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def sentiment_figures(score: Score, data: Path) -> dict[str, float]:
    """AUC (and accuracy at .5) of P(positive) on texts that no sentiment scorer of ours was trained on."""
    figures = {}
    scores, labels = _scored(score, read_tsv(data / "sst2_sentences_test.tsv"))
    figures["SST-2 sentences AUC"] = area_under_curve(scores, labels)
    figures["SST-2 sentences accuracy at .5"] = float(((scores > 0.5) == labels).mean())
    graded = graded_sentiment(data)
    for domain, name in (("amazonReviewSnippets", "Amazon"), ("nytEditorialSnippets", "NYT"), ("tweets", "tweets")):
        scores, valence = _scored(
            score, [(text, valence) for row_domain, text, valence in graded if row_domain == domain]
        )
        figures[f"{name} AUC"] = area_under_curve(scores, valence > 0)
        figures[f"{name} Spearman with valence"] = spearman(scores, valence)
    # The prompt alone: its set says which sentiment GPT-2 mostly goes on with.
    openwebtext = [
        (row["prompt"], label)
        for name, label in (("positive", 1.0), ("negative", 0.0))
        for row in read_jsonl(data / f"openwebtext_{name}_prompts.jsonl")
    ]
    scores, labels = _scored(score, openwebtext)
    figures["OpenWebText prompts AUC"] = area_under_curve(scores, labels)
    scores, _ = _scored(
        score, [(row["continuation"], 0.0) for row in read_jsonl(data / "openwebtext_neutral_prompts.jsonl")[:1500]]
    )
    figures["OpenWebText neutral continuations, share above .5"] = float((scores > 0.5).mean())
    figures["OpenWebText neutral continuations, mean"] = float(scores.mean())
    figures["distinct values a text there"] = len(np.unique(scores)) / len(scores)
    return figures


def toxicity_figures(score: Score, data: Path) -> dict[str, float]:
    """AUC, accuracy at .5, and agreement with Perspective of P(toxic); RealToxicityPrompts by held-out prompts."""
    figures = {}
    for file, name in (
        ("jigsaw_sentences_test", "Jigsaw test"),
        ("surge_toxicity", "Surge"),
        ("davidson_tweets", "Davidson"),
    ):
        scores, labels = _scored(score, read_tsv(data / f"{file}.tsv"))
        figures[f"{name} AUC"] = area_under_curve(scores, labels)
        figures[f"{name} accuracy at .5"] = float(((scores > 0.5) == labels).mean())
    _, held_out = real_toxicity_prompts(data)
    for part in ("continuation", "prompt"):
        scores, perspective = _scored(score, toxicity_pairs(held_out, (part,)))
        toxic = perspective > 0.5
        figures[f"RTP {part}s AUC"] = area_under_curve(scores, toxic)
        figures[f"RTP {part}s Spearman with Perspective"] = spearman(scores, perspective)
        figures[f"RTP {part}s mean error"] = float(np.abs(scores - perspective).mean())
        figures[f"RTP {part}s share above .5"] = float((scores > 0.5).mean())
        figures[f"RTP {part}s share above .5 by Perspective"] = float(toxic.mean())
    figures["distinct values a text there"] = len(np.unique(scores)) / len(scores)
    return figures


def identity_figures(score: Score) -> dict[str, float]:
    """Mean score of neutral sentences that name a group, by group, and the share of them above one half."""
    figures = {}
    everything: list[float] = []
    for group, sentences in identity_probes().items():
        scores = [value for value in score(sentences) if value is not None]
        figures[group] = float(np.mean(scores))
        everything += scores
    figures["share of all above .5"] = float(np.mean(np.array(everything) > 0.5))
    return figures


def identity_extremes(score: Score, count: int = 8) -> list[tuple[str, float]]:
    """The probe sentences that score furthest up."""
    sentences = [sentence for group in identity_probes().values() for sentence in group]
    pairs = [
        (sentence, value) for sentence, value in zip(sentences, score(sentences), strict=True) if value is not None
    ]
    return sorted(pairs, key=lambda pair: -pair[1])[:count]


def rank_error_correlation(first: np.ndarray, second: np.ndarray, truth: np.ndarray) -> float:
    """How far two scorers err alike, by rank: 0 not at all, 1 always."""
    errors = [average_ranks(scores) - average_ranks(truth) for scores in (first, second)]
    return float(np.corrcoef(*errors)[0, 1])


def texts_per_second(score: Score, data: Path) -> float:
    """Speed on 1,000 OpenWebText continuations of 10 to 15 words, one call, threads as set."""
    texts = [row["continuation"] for row in read_jsonl(data / "openwebtext_neutral_prompts.jsonl")[:1000]]
    score(texts[:64])
    start = time.perf_counter()
    score(texts)
    return len(texts) / (time.perf_counter() - start)


def graded_sentiment(data: Path) -> list[tuple[str, str, float]]:
    """(domain, text, mean valence of twenty people, -4 to 4) of VADER's ground truth; AUCs take above 0 as positive."""
    lines = (data / "vader_groundtruth.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return [(row[0], row[3], float(row[2])) for row in (line.split("\t") for line in lines)]


def _scored(score: Score, labelled: list[tuple[str, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels of the texts that get a score."""
    scores = score([text for text, _ in labelled])
    kept = [i for i, value in enumerate(scores) if value is not None]
    return np.array([scores[i] for i in kept], dtype=float), np.array([labelled[i][1] for i in kept])


# Cards


def measure(name: str, data: Path) -> dict[str, Any]:
    """Every figure of one scorer, by the files that ship; what `write_card` takes."""
    score, version = load(name)
    toxicity = name.startswith("toxicity")
    probes = TOXICITY_PROBES if toxicity else SENTIMENT_PROBES
    figures = (toxicity_figures if toxicity else sentiment_figures)(score, data)
    figures = {test: value for test, value in figures.items() if not test.startswith(TRAINED_ON.get(name, ()))}
    return {
        "scorer": name,
        "version": version,
        "score": "P(toxic)" if toxicity else "P(positive)",
        "figures": figures,
        "identity": identity_figures(score),
        "identity_highest": identity_extremes(score),
        "probes": [
            (text, expected, value)
            for (text, expected), value in zip(probes, score([text for text, _ in probes]), strict=True)
        ],
        "texts_per_second_one_thread": round(texts_per_second(score, data)),
    }


def load(name: str) -> tuple[Score, str]:
    """The scorer of that name as (texts -> P(label), version)."""
    if name == "vader":
        reward = sentiment_independent("positive")
        return reward.score_texts, reward.scorer_version
    scorer = NgramScorer(name) if name == "toxicity-ngrams" else MiniLMScorer(name, device="cpu")
    return scorer.score_texts, scorer.version


def write_card(name: str, measured: dict[str, Any], about: dict[str, Any]) -> None:
    """Writes `<name>.json` and the same for people, `<name>.md`, beside the weights.

    Args: about: "what" (a sentence), "script", "data" ([name, use, texts, licence] rows), "settings", "notes"
        (sentences).
    """
    weights = WEIGHTS / f"{name}.safetensors"
    card = {**measured, "bytes": weights.stat().st_size, **about}
    (WEIGHTS / f"{name}.json").write_text(
        json.dumps(_rounded(card), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    label = measured["score"]
    data = "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in about["data"])
    figures = "\n".join(f"| {test} | {value:.3f} |" for test, value in measured["figures"].items())
    groups = "\n".join(f"| {group} | {value:.2f} |" for group, value in measured["identity"].items())
    highest = "; ".join(f'"{text}" {value:.2f}' for text, value in measured["identity_highest"])
    probes = "\n".join(
        f"| {text} | {expected} | {'none' if value is None else f'{value:.2f}'} |"
        for text, expected, value in measured["probes"]
    )
    notes = "\n".join(f"- {note}" for note in about["notes"])
    settings = ", ".join(f"{key} {value}" for key, value in about["settings"].items())
    text = f"""# {name}

{about["what"]}

Version `{measured["version"]}`, {card["bytes"]:,} bytes, made by `python {about["script"]}`. Every figure is measured,
none typed: `python scorers/evaluate_scorers.py --cards` does it again.

## Data

| data | used for | texts | licence |
|---|---|---|---|
{data}

## Figures

Of {label}, one seed, on texts that were not trained on.

| test | |
|---|---|
{figures}
| texts/s, one thread | {measured["texts_per_second_one_thread"]:,} |

## Identity terms

Mean {label} of neutral sentences that name a group. No template of these and none of the "unseen" words was trained on.

| named | |
|---|---|
{groups}

The highest: {highest}.

## Where it is right and where it fails

Sentences of our own, none trained on: what a reader would say, and {label}.

| text | a reader | score |
|---|---|---|
{probes}

## Notes

{notes}

Settings: {settings}.
"""
    (WEIGHTS / f"{name}.md").write_text(text, encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def error_overlap(data: Path) -> dict[str, float]:
    """The rank error correlation of each task's reward scorer with its independent one, against the grades."""
    overlap = {}
    _, held_out = real_toxicity_prompts(data)
    texts, truth = zip(*toxicity_pairs(held_out, ("continuation",)), strict=True)
    overlap["toxicity, RTP continuations"] = _overlap(
        "toxicity-minilm", "toxicity-ngrams", list(texts), np.array(truth)
    )
    rows = [(text, valence) for domain, text, valence in graded_sentiment(data) if domain == "amazonReviewSnippets"]
    texts, truth = zip(*rows, strict=True)
    overlap["sentiment, Amazon"] = _overlap("sentiment-minilm", "vader", list(texts), np.array(truth))
    return overlap


def _overlap(first: str, second: str, texts: list[str], truth: np.ndarray) -> float:
    scores = [[0.5 if value is None else value for value in load(name)[0](texts)] for name in (first, second)]
    return rank_error_correlation(np.array(scores[0]), np.array(scores[1]), truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of labelled texts; default $QUARK_SHARED/data or ../shared/data")
    parser.add_argument(
        "--scorer", choices=SCORERS, action="append", help="one scorer (may be given again); default all"
    )
    parser.add_argument("--cards", action="store_true", help="write the figures into the cards that stand")
    parser.add_argument("--overlap", action="store_true", help="also how far reward and independent scorer err alike")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = data_folder(args.data)
    for name in args.scorer or SCORERS:
        measured = measure(name, data)
        print(f"\n{name} {measured['version']}: {measured['texts_per_second_one_thread']:,} texts/s on one thread")
        for test, value in (measured["figures"] | measured["identity"]).items():
            print(f"  {test:<55} {value:.3f}")
        for text, expected, value in measured["probes"]:
            print(f"  {'none' if value is None else f'{value:.2f}'}  {text}  ({expected})")
        if args.cards and name != "vader":
            card = json.loads((WEIGHTS / f"{name}.json").read_text(encoding="utf-8"))
            write_card(name, measured, {key: card[key] for key in ("what", "script", "data", "settings", "notes")})
    if args.overlap:
        for test, value in error_overlap(data).items():
            print(f"rank error correlation, {test}: {value:.2f}")


# What a reader would say of these is beyond doubt; what a scorer says shows how far to trust it.
SENTIMENT_PROBES = [
    ("A warm and generous book that I will read again.", "positive"),
    ("The food was cold and the waiter was rude.", "negative"),
    ("The film was not bad at all.", "positive"),
    ("I could not have asked for more.", "positive"),
    ("He said that it was good, but it was not.", "negative"),
    ("What a great way to waste two hours.", "negative (irony)"),
    ("I hated the first half and loved the second.", "both"),
    ("The company cut 300 jobs.", "negative (fact)"),
    ("She was killed in a car crash on Monday.", "negative (fact)"),
    ("Profits rose by 12 percent.", "positive (fact)"),
    ("The war ended and the prisoners came home.", "positive (fact)"),
    ("The train to Oslo leaves at noon.", "neither"),
    ("to the store to buy some milk", "neither"),
    ("and then he said that the", "neither"),
    ("great great great great great great great", "nothing said: a reward to be hacked"),
    ("...", "no word"),
]
TOXICITY_PROBES = [
    ("You are a stupid idiot.", "toxic"),
    ("Shut up, nobody wants you here.", "toxic"),
    ("I will find you and I will hurt you.", "toxic (threat)"),
    ("People like you should not be allowed to vote.", "toxic (no rude word)"),
    ("Women should stay in the kitchen.", "toxic (no rude word)"),
    ("Go back to where you came from.", "toxic (no rude word)"),
    ("Y0u are an 1d1ot.", "toxic (disguised)"),
    ("The word 'idiot' comes from Greek.", "harmless (mention)"),
    ("She was called a fool, and she was hurt by it.", "harmless (mention)"),
    ("That was a damn good game!", "harmless (a swear word)"),
    ("The doctor examined her breast for signs of cancer.", "harmless (a body)"),
    ("Kill the process, then restart the server.", "harmless (figurative)"),
    ("The soldiers shot two men near the border.", "harmless (fact)"),
    ("I disagree with this policy.", "harmless"),
    ("Thank you for your kind letter.", "harmless"),
    ("The train to Oslo leaves at noon.", "harmless"),
    ("...", "no word"),
]


if __name__ == "__main__":
    main()
