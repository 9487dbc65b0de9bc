"""Trains the sentiment scorer: MiniLM under LoRA on SST-2 phrases and sentences of our own. 8 minutes on one thread.

python scorers/train_sentiment.py --data ../shared/data
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from evaluate_scorers import graded_sentiment, measure, write_card
from finetune import finetune
from scorer_data import (
    UNKNOWN,
    data_folder,
    degenerate_texts,
    detokenize,
    good_and_bad_sentences,
    identity_sentences,
    neutral_sentences,
    read_tsv,
    without,
)

from quark_lm.rewards.minilm import WEIGHTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder of labelled texts; default $QUARK_SHARED/data or ../shared/data")
    parser.add_argument("--output", type=Path, default=WEIGHTS / "sentiment-minilm.safetensors")
    parser.add_argument("--epochs", type=float, default=1.4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = data_folder(args.data)

    rng = np.random.default_rng(args.seed)
    graded = [(text, valence) for domain, text, valence in graded_sentiment(data) if domain != "movieReviewSnippets"]
    phrases = without(read_tsv(data / "sst2_phrases_train.tsv"), [read_tsv(data / "sst2_sentences_test.tsv"), graded])
    # Half of the phrases as people write them: completions are not tokenized. The encoder is uncased, so case needs no
    # augmentation.
    rows = [(detokenize(text) if rng.random() < 0.5 else text, label, 1.0) for text, label in phrases]
    plain = neutral_sentences(1200, args.seed) + degenerate_texts(600, args.seed) + identity_sentences()
    rows += [(text, 0.5, 0.5) for text in plain]
    opinions = good_and_bad_sentences(700, args.seed)
    rows += [(text, label, 0.5) for text, label in opinions]
    texts, targets, weights = (list(column) for column in zip(*rows, strict=True))
    settings = finetune(
        texts, targets, weights, args.output, epochs=args.epochs, learning_rate=args.learning_rate, seed=args.seed
    )
    print(settings)
    if args.output != WEIGHTS / "sentiment-minilm.safetensors":
        return
    about = {
        "what": "P(positive) of an English text: a LoRA adapter and a head for all-MiniLM-L6-v2 (Apache-2.0), which "
        "`quark_lm.rewards.minilm` loads. The reward of the sentiment task; the independent judge of that task is "
        "VADER, never this.",
        "script": "scorers/train_sentiment.py",
        "data": [
            [
                "Stanford Sentiment Treebank, phrases of the training part (Socher et al. 2013; film reviews of "
                "Rotten Tomatoes)",
                "training, target 0 or 1",
                len(phrases),
                UNKNOWN,
            ],
            [
                "neutral sentences, fragments and identity sentences of our own (`scorers/scorer_data.py`)",
                "training, target .5, weight .5",
                len(plain),
                "as this repository",
            ],
            [
                "good and bad news and opinions of our own, in the forms of the neutral sentences",
                "training, target 0 or 1, weight .5",
                len(opinions),
                "as this repository",
            ],
            [
                "SST-2 sentences, VADER's ground truth (Hutto and Gilbert 2014), OpenWebText prompts of DExperts",
                "tests only",
                "",
                UNKNOWN,
            ],
        ],
        "settings": settings,
        "notes": [
            "Amazon, NYT and tweets: sentences that twenty people graded; AUC takes a mean above 0 as positive. "
            "Domains that training never saw.",
            "OpenWebText prompts: prompts that GPT-2 always goes on with positively against those it always goes on "
            "with negatively, the prompt alone scored.",
            "Trained on film reviews: good and bad news in plain words is weaker ground than opinion, irony may be "
            "missed, and praise repeated over and over scores high.",
            "Tried and left: pieces of WikiText at .5. All plain prose then scored near .5, and Amazon and NYT fell.",
            "English only; lower-cased; 128 tokens at most are read.",
        ],
    }
    write_card("sentiment-minilm", measure("sentiment-minilm", data), about)


if __name__ == "__main__":
    main()
