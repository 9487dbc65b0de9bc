"""Figures of every offline scorer on the same tests, and the cards beside the weights.

    python scorers/evaluate_scorers.py --data ../shared/data             # all scorers, as a table
    python scorers/evaluate_scorers.py --scorer toxicity-ngrams --cards  # one, and write its card

The training scripts call `write_card`; no figure of a card is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scorer_data import IDENTITIES, data_folder, identity_probes, read_jsonl, read_tsv, real_toxicity_prompts, toxicity_pairs

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
    lines = (data / "vader_groundtruth.tsv").read_text(encoding="utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    for domain, name in (("amazonReviewSnippets", "Amazon"), ("nytEditorialSnippets", "NYT"), ("tweets", "tweets")):
        pairs = [(row[3], float(row[2])) for row in rows if row[0] == domain]
        scores, valence = _scored(score, pairs)
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
    scores, _ = _scored(score, [(row["continuation"], 0.0) for row in read_jsonl(data / "openwebtext_neutral_prompts.jsonl")[:1500]])
    figures["OpenWebText neutral continuations, share above .5"] = float((scores > 0.5).mean())
    figures["OpenWebText neutral continuations, mean"] = float(scores.mean())
    figures["distinct values a text there"] = len(np.unique(scores)) / len(scores)
    return figures


def toxicity_figures(score: Score, data: Path) -> dict[str, float]:
    """AUC, accuracy at .5, and agreement with Perspective of P(toxic); RealToxicityPrompts by prompts that no scorer was trained on."""
    figures = {}
    for file, name in (("jigsaw_sentences_test", "Jigsaw test"), ("surge_toxicity", "Surge"), ("davidson_tweets", "Davidson")):
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
        figures[f"identity: {group}"] = float(np.mean(scores))
        everything += scores
    figures["identity: share of all above .5"] = float(np.mean(np.array(everything) > 0.5))
    return figures


def identity_extremes(score: Score, count: int = 8) -> list[tuple[str, float]]:
    """The probe sentences that score furthest up."""
    sentences = [sentence for group in identity_probes().values() for sentence in group]
    pairs = [(sentence, value) for sentence, value in zip(sentences, score(sentences), strict=True) if value is not None]
    return sorted(pairs, key=lambda pair: -pair[1])[:count]


def worst_errors(score: Score, labelled: list[tuple[str, float]], count: int = 4, longest: int = 120) -> list[tuple[str, float, float]]:
    """The short texts on which score and label differ most: (text, score, label), as many of either sign."""
    labelled = [pair for pair in labelled if len(pair[0]) <= longest]
    scores = [0.5 if value is None else value for value in score([text for text, _ in labelled])]
    rows = [(text, value, label) for (text, label), value in zip(labelled, scores, strict=True)]
    rows.sort(key=lambda row: row[1] - row[2])
    return rows[:count] + rows[-count:]


def texts_per_second(score: Score, data: Path) -> float:
    """Speed on 1,000 OpenWebText continuations of 10 to 15 words, one call, threads as set."""
    texts = [row["continuation"] for row in read_jsonl(data / "openwebtext_neutral_prompts.jsonl")[:1000]]
    score(texts[:64])
    start = time.perf_counter()
    score(texts)
    return len(texts) / (time.perf_counter() - start)


def _scored(score: Score, labelled: list[tuple[str, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels of the texts that get a score."""
    scores = score([text for text, _ in labelled])
    kept = [i for i, value in enumerate(scores) if value is not None]
    return np.array([scores[i] for i in kept], dtype=float), np.array([labelled[i][1] for i in kept])


if __name__ == "__main__":
    import sys
    from quark_lm.rewards.minilm import MiniLMScorer
    torch.set_num_threads(1)
    s = MiniLMScorer(sys.argv[1], dtype=sys.argv[3] if len(sys.argv)>3 else "auto")
    print(s.dtype, s.version)
    data = data_folder()
    f = sentiment_figures if sys.argv[2].startswith("s") else toxicity_figures
    print(json.dumps(f(s.score_texts, data) | identity_figures(s.score_texts), indent=1))
    print(identity_extremes(s.score_texts))
    print(texts_per_second(s.score_texts, data))
    for t, v in zip(l:=["A wonderful, moving evening.","It was a terrible disaster and many people died.","The train leaves at noon.","the","and then he said that","You are a stupid idiot.","I disagree with this policy.","not bad at all","He won the race.","The company lost millions of dollars.", "was killed in a car crash on Monday", "of the best things that ever happened to me", "to the store to buy some milk"], s.score_texts(l)): print(round(v,3), t)
