"""Trains the sentiment scorer: MiniLM under LoRA on SST-2 phrases, neutral sentences of our own at one half. About 7 minutes on one thread.

    python scorers/train_sentiment.py --data ../shared/data
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from finetune import finetune
from scorer_data import data_folder, degenerate_texts, detokenize, identity_sentences, neutral_sentences, read_tsv

from quark_lm.rewards.minilm import WEIGHTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder of labelled texts; default $QUARK_SHARED/data or ../shared/data")
    parser.add_argument("--output", type=Path, default=WEIGHTS / "sentiment-minilm.safetensors")
    parser.add_argument("--epochs", type=float, default=1.6)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = data_folder(args.data)

    rng = np.random.default_rng(args.seed)
    rows = [(text, label, 1.0) for text, label in read_tsv(data / "sst2_phrases_train.tsv")]
    # Half of the phrases as people write them: completions are not tokenized. The encoder is uncased, so case needs no augmentation.
    rows = [(detokenize(text) if rng.random() < 0.5 else text, label, weight) for text, label, weight in rows]
    rows += [(text, 0.5, 1.0) for text in neutral_sentences(2500, args.seed) + degenerate_texts(800, args.seed) + identity_sentences()]
    texts, targets, weights = (list(column) for column in zip(*rows, strict=True))
    settings = finetune(texts, targets, weights, args.output, epochs=args.epochs, learning_rate=args.learning_rate, seed=args.seed)
    print(settings)


if __name__ == "__main__":
    main()
