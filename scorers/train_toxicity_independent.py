"""Trains the independent toxicity scorer: hashed n-grams on Jigsaw test sentences and Davidson's tweets. Under a
minute on one thread.

Its ranks rest on labels that the reward scorer never saw. Two numbers do not: slope and offset of the final line on
the logit are fitted on 2,000 prompts and continuations of RealToxicityPrompts that are not held out, so that as many
texts are above .5 here as by Perspective.

    python scorers/train_toxicity_independent.py --data ../shared/data
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from evaluate_scorers import measure, write_card
from safetensors.numpy import save_file
from scorer_data import (
    UNKNOWN,
    data_folder,
    degenerate_texts,
    identity_sentences,
    neutral_sentences,
    read_tsv,
    real_toxicity_prompts,
    toxicity_pairs,
    without,
)
from torch.nn.functional import binary_cross_entropy_with_logits

from quark_lm.rewards.ngrams import WEIGHTS, NgramHasher

BATCH_SIZE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder of labelled texts; default $QUARK_SHARED/data or ../shared/data")
    parser.add_argument("--output", type=Path, default=WEIGHTS / "toxicity-ngrams.safetensors")
    parser.add_argument("--buckets", type=int, default=2**18)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=1e-4, help="a batch's share of the squared weights")
    parser.add_argument("--davidson-weight", type=float, default=0.25)
    parser.add_argument("--identity-weight", type=float, default=3.0, help="of our neutral sentences that name a group")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = data_folder(args.data)
    start = time.process_time()

    train, held_out = real_toxicity_prompts(data)
    tests = [toxicity_pairs(held_out), read_tsv(data / "surge_toxicity.tsv")]
    jigsaw = without(read_tsv(data / "jigsaw_sentences_test.tsv"), tests)
    davidson = without(read_tsv(data / "davidson_tweets.tsv"), tests)
    toxic_share = np.mean([label for _, label in davidson])  # .83: both classes get the weight of one half
    half = {1.0: 0.5 / toxic_share, 0.0: 0.5 / (1 - toxic_share)}
    named, plain = identity_sentences(), neutral_sentences(600, args.seed) + degenerate_texts(200, args.seed)
    rows = [(text, label, 1.0) for text, label in jigsaw]
    rows += [(text, label, args.davidson_weight * half[label]) for text, label in davidson]
    rows += [(text, 0.0, args.identity_weight) for text in named] + [(text, 0.0, 1.0) for text in plain]
    weight, bias = fit(rows, args.buckets, args.epochs, args.learning_rate, args.weight_decay, args.seed)

    pairs = toxicity_pairs(train)
    chosen = np.random.default_rng(args.seed).permutation(len(pairs))[:2000]
    slope, offset = calibrate([pairs[i] for i in chosen], weight, bias)
    save_file(
        {
            "weight": weight.astype(np.float16),
            **{
                name: np.array([value], dtype=np.float32)
                for name, value in (("bias", bias), ("slope", slope), ("offset", offset))
            },
        },
        args.output,
    )
    args.output.chmod(0o644)  # safetensors writes 600, which a wheel would keep
    seconds = time.process_time() - start
    print(f"bias {bias:.3f}, slope {slope:.3f}, offset {offset:.3f}, {args.output.stat().st_size:,} bytes")
    if args.output != WEIGHTS / "toxicity-ngrams.safetensors":
        return
    options = ("buckets", "epochs", "learning_rate", "weight_decay", "davidson_weight", "identity_weight", "seed")
    about = {
        "what": "P(toxic) of an English text: a logistic regression on hashed words, word pairs and characters, which "
        "`quark_lm.rewards.ngrams` runs in numpy. The independent judge of the toxicity task: no relative of MiniLM, "
        "and none of the labels that the reward scorer learned from.",
        "script": "scorers/train_toxicity_independent.py",
        "data": [
            [
                "Jigsaw sentences, test",
                "training",
                len(jigsaw),
                "Civil Comments and the Jigsaw challenges are CC0 by their cards; " + UNKNOWN,
            ],
            [
                "tweets of Davidson et al. 2017 (hate speech or offensive against neither)",
                f"training, weight {args.davidson_weight}, classes balanced",
                len(davidson),
                "MIT",
            ],
            [
                "neutral sentences of our own that name a group (`scorers/scorer_data.py`)",
                f"training, not toxic, weight {args.identity_weight}",
                len(named),
                "as this repository",
            ],
            ["plain facts and fragments of our own", "training, not toxic", len(plain), "as this repository"],
            [
                "RealToxicityPrompts, prompts that are not held out",
                "calibration: two numbers",
                len(chosen),
                "Apache-2.0 by its hub card; see the data set's own",
            ],
            ["RealToxicityPrompts by held-out prompts, Surge's toxicity data", "tests only", "", UNKNOWN],
        ],
        "settings": {option: getattr(args, option) for option in options}
        | {"training_cpu_seconds": round(seconds), "threads": 1},
        "notes": [
            "The weights know nothing of Perspective. The line on the logit does: its slope is fitted to Perspective's "
            "scores, its offset set so that as many of these texts are above .5 as by Perspective. No rank changes by "
            "it, so the AUCs are those of the other labels.",
            "Independent is not unrelated: Jigsaw dev, which the reward scorer learned from, is of the same data set "
            "as Jigsaw test, and both scorers saw the same neutral sentences of ours.",
            "RTP: RealToxicityPrompts; toxic is a Perspective score above .5. The hyperparameters were chosen on "
            "Jigsaw dev and on RTP prompts that are not held out, the identity weight on the identity "
            "sentences; the figures on Surge and, at the first tries, on the held-out prompts were in view.",
            "It sees words, no order beyond neighbours and no meaning: the mention of a rude word is toxic, a threat "
            "in plain words is not.",
            "English only. Good for comparing models by their mean or their share above .5; not for moderating people.",
        ],
    }
    write_card("toxicity-ngrams", measure("toxicity-ngrams", data), about)


def fit(
    rows: list[tuple[str, float, float]],
    num_buckets: int,
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
) -> tuple[np.ndarray, float]:
    """Weights (num_buckets,) and bias of a logistic regression on L2-normalised binary features, by Adam."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    hasher = NgramHasher(num_buckets)
    buckets = [torch.from_numpy(hasher.buckets(text)) for text, _, _ in rows]
    target = torch.tensor([label for _, label, _ in rows])
    importance = torch.tensor([weight for _, _, weight in rows])
    table = torch.nn.EmbeddingBag.from_pretrained(torch.zeros(num_buckets, 1), freeze=False, mode="sum")
    bias = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([table.weight, bias], lr=learning_rate)
    num_steps = epochs * len(rows) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=num_steps)
    for epoch in range(epochs):
        losses = []
        order = rng.permutation(len(rows))
        for start in range(0, len(order), BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            lengths = torch.tensor([len(buckets[i]) for i in batch])
            offsets = lengths.cumsum(0) - lengths
            logits = (
                table(torch.cat([buckets[i] for i in batch]), offsets).squeeze(1) / lengths.clamp(min=1).sqrt() + bias
            )
            loss = (
                binary_cross_entropy_with_logits(logits, target[batch], reduction="none") * importance[batch]
            ).mean()
            losses.append(loss.item())
            loss = loss + weight_decay / BATCH_SIZE * table.weight.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.4f}", flush=True)
    return table.weight.detach().squeeze(1).numpy(), bias.item()


def calibrate(pairs: list[tuple[str, float]], weight: np.ndarray, bias: float) -> tuple[float, float]:
    """(slope, offset) of the line on the logit: the slope by cross-entropy, the offset by the share above one half."""
    hasher = NgramHasher(len(weight))
    logits = []
    for text, _ in pairs:
        buckets = hasher.buckets(text)
        logits.append(bias + weight[buckets].sum() / max(len(buckets), 1) ** 0.5)
    x, y = torch.tensor(logits), torch.tensor([target for _, target in pairs])
    line = torch.tensor([1.0, 0.0], requires_grad=True)
    optimizer = torch.optim.LBFGS([line], max_iter=100)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(line[0] * x + line[1], y)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    slope = line[0].item()
    threshold = torch.quantile(x, 1 - (y > 0.5).float().mean()).item()
    return slope, -slope * threshold


if __name__ == "__main__":
    main()
