"""Trains the independent toxicity scorer: hashed n-grams on Jigsaw test sentences and Davidson's tweets. Under a minute on one thread.

Its ranks rest on labels that the reward scorer never saw. Two numbers do not: slope and offset of the final line on the logit (Platt scaling) are
fitted on 1,000 prompts and continuations of RealToxicityPrompts that are not held out, so that .5 means here what .5 means to Perspective.

    python scorers/train_toxicity_independent.py --data ../shared/data
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from scorer_data import data_folder, degenerate_texts, identity_sentences, neutral_sentences, read_tsv, real_toxicity_prompts, toxicity_pairs
from torch.nn.functional import binary_cross_entropy_with_logits

from quark_lm.rewards.ngrams import WEIGHTS, NgramHasher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder of labelled texts; default $QUARK_SHARED/data or ../shared/data")
    parser.add_argument("--output", type=Path, default=WEIGHTS / "toxicity-ngrams.safetensors")
    parser.add_argument("--buckets", type=int, default=2**18)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=3e-2)
    parser.add_argument("--weight-decay", type=float, default=1e-4, help="of the squared weights")
    parser.add_argument("--davidson-weight", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = data_folder(args.data)

    jigsaw = [(text, label, 1.0) for text, label in read_tsv(data / "jigsaw_sentences_test.tsv")]
    tweets = [(text, label, args.davidson_weight) for text, label in read_tsv(data / "davidson_tweets.tsv")]
    toxic_share = np.mean([label for _, label, _ in tweets])  # .83: both classes get the weight of one half
    tweets = [(text, label, weight * 0.5 / (toxic_share if label else 1 - toxic_share)) for text, label, weight in tweets]
    ours = [(text, 0.0, 1.0) for text in identity_sentences() + neutral_sentences(600, args.seed) + degenerate_texts(200, args.seed)]
    weight, bias = fit(jigsaw + tweets + ours, args.buckets, args.epochs, args.learning_rate, args.weight_decay, args.seed)

    train, _ = real_toxicity_prompts(data)
    pairs = toxicity_pairs(train)
    chosen = np.random.default_rng(args.seed).permutation(len(pairs))[:1000]
    slope, offset = platt([pairs[i] for i in chosen], weight, bias)
    save_file(
        {
            "weight": weight.astype(np.float16),
            **{name: np.array([value], dtype=np.float32) for name, value in (("bias", bias), ("slope", slope), ("offset", offset))},
        },
        args.output,
    )
    print(f"bias {bias:.3f}, slope {slope:.3f}, offset {offset:.3f}, {args.output.stat().st_size:,} bytes")


def fit(
    rows: list[tuple[str, float, float]], num_buckets: int, epochs: int, learning_rate: float, weight_decay: float, seed: int
) -> tuple[np.ndarray, float]:
    """Weights (num_buckets,) and bias of a logistic regression on L2-normalised binary features, by Adagrad in batches of 64."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    hasher = NgramHasher(num_buckets)
    buckets = [torch.from_numpy(hasher.buckets(text)) for text, _, _ in rows]
    target = torch.tensor([label for _, label, _ in rows])
    importance = torch.tensor([weight for _, _, weight in rows])
    table = torch.nn.EmbeddingBag(num_buckets, 1, mode="sum", sparse=False)
    torch.nn.init.zeros_(table.weight)
    bias = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adagrad([table.weight, bias], lr=learning_rate)
    for epoch in range(epochs):
        losses = []
        order = rng.permutation(len(rows))
        for start in range(0, len(order), 256):
            batch = order[start : start + 256]
            lengths = torch.tensor([max(len(buckets[i]), 1) for i in batch])
            offsets = torch.cat([torch.zeros(1, dtype=torch.long), torch.tensor([len(buckets[i]) for i in batch]).cumsum(0)[:-1]])
            logits = table(torch.cat([buckets[i] for i in batch]), offsets).squeeze(1) / lengths.sqrt() + bias
            loss = (binary_cross_entropy_with_logits(logits, target[batch], reduction="none") * importance[batch]).mean()
            losses.append(loss.item())
            loss = loss + weight_decay * table.weight.square().sum() / 256
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.4f}", flush=True)
    return table.weight.detach().squeeze(1).numpy(), bias.item()


def platt(pairs: list[tuple[str, float]], weight: np.ndarray, bias: float) -> tuple[float, float]:
    """(slope, offset) that bring slope x logit + offset nearest to the soft targets by cross-entropy."""
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

    optimizer.step(closure)
    return line[0].item(), line[1].item()


if __name__ == "__main__":
    main()
