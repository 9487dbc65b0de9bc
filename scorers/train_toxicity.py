"""Trains the toxicity scorer: MiniLM under LoRA on Perspective's scores of RealToxicityPrompts and on Jigsaw dev
sentences. About 6 minutes on one thread.

Neutral sentences of our own that name groups of people, and plain facts, are given low targets: without them "Muslims
pray five times a day." is toxic.

    python scorers/train_toxicity.py --data ../shared/data
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from evaluate_scorers import measure, write_card
from finetune import finetune
from scorer_data import (
    UNKNOWN,
    data_folder,
    degenerate_texts,
    detokenize,
    identity_sentences,
    neutral_sentences,
    read_tsv,
    real_toxicity_prompts,
    toxicity_pairs,
    without,
)

from quark_lm.rewards.minilm import WEIGHTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder of labelled texts; default $QUARK_SHARED/data or ../shared/data")
    parser.add_argument("--output", type=Path, default=WEIGHTS / "toxicity-minilm.safetensors")
    parser.add_argument("--epochs", type=float, default=2.2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = data_folder(args.data)

    train, held_out = real_toxicity_prompts(data)
    tests = [
        toxicity_pairs(held_out),
        read_tsv(data / "jigsaw_sentences_test.tsv"),
        read_tsv(data / "surge_toxicity.tsv"),
    ]
    perspective = without(toxicity_pairs(train), tests)
    jigsaw = without(read_tsv(data / "jigsaw_sentences_dev.tsv"), tests)
    rows = [(text, target, 1.5) for text, target in perspective]
    # Jigsaw says yes or no; .05 and .9 are about what Perspective says of such sentences, and keep the reward graded.
    rows += [(detokenize(text) if i % 2 else text, 0.05 + 0.85 * label, 1.0) for i, (text, label) in enumerate(jigsaw)]
    named, plain = identity_sentences(), neutral_sentences(600, args.seed) + degenerate_texts(300, args.seed)
    rows += [(text, 0.1, 1.0) for text in named] + [(text, 0.05, 1.0) for text in plain]
    texts, targets, weights = (list(column) for column in zip(*rows, strict=True))
    settings = finetune(
        texts, targets, weights, args.output, epochs=args.epochs, learning_rate=args.learning_rate, seed=args.seed
    )
    print(settings)
    if args.output != WEIGHTS / "toxicity-minilm.safetensors":
        return
    about = {
        "what": "P(toxic) of an English text, as Perspective would grade it: a LoRA adapter and a head for "
        "all-MiniLM-L6-v2 (Apache-2.0), which `quark_lm.rewards.minilm` loads. The reward of the toxicity task is 1 "
        "- P(toxic); its independent judge is "
        "toxicity-ngrams, never this.",
        "script": "scorers/train_toxicity.py",
        "data": [
            [
                "RealToxicityPrompts (Gehman et al. 2020), prompts and continuations of four fifths of the prompts",
                "training, target Perspective's score",
                len(perspective),
                "Apache-2.0 by its hub card; see the data set's own",
            ],
            [
                "Jigsaw sentences, dev",
                "training, target .05 or .9",
                len(jigsaw),
                "Civil Comments and the Jigsaw challenges are CC0 by their cards; " + UNKNOWN,
            ],
            [
                "neutral sentences of our own that name a group (`scorers/scorer_data.py`)",
                "training, target .1",
                len(named),
                "as this repository",
            ],
            ["plain facts and fragments of our own", "training, target .05", len(plain), "as this repository"],
            [
                "RealToxicityPrompts by held-out prompts, Jigsaw test, Surge's toxicity data, Davidson's tweets (MIT)",
                "tests only",
                "",
                UNKNOWN,
            ],
        ],
        "settings": settings,
        "notes": [
            "RTP: RealToxicityPrompts; toxic is a Perspective score above .5. A prompt is held out by a hash of its "
            "text, continuation and all.",
            "Davidson labels slang and slurs of tweets as offensive in four of five rows: another notion of toxic "
            "than Perspective's.",
            "It knows words better than meaning: a threat or a wish to shut people out, told in plain words, scores "
            "low, and the mention of a rude word scores high.",
            "English only; lower-cased; 128 tokens at most are read. Not for moderating people.",
        ],
    }
    write_card("toxicity-minilm", measure("toxicity-minilm", data), about)


if __name__ == "__main__":
    main()
