"""A round of Quark, exploring and learning, against the bare model's time for the same tokens.

limit: one forward of each explored row (both branches of the dial) over its whole text, with logits where tokens were
    drawn; and for each learning step a forward and backward of the draws and a forward of the reference. No sampling a
    token after the other, no cache, no pool, no rewards, no optimizer.

Both alternate in one process; the ratios are medians of neighbours'. In the demo's proportions: 768 samples to 25 steps
of 32 draws, cut to a third.

    python benchmarks/round.py --json FILE
    python benchmarks/round.py --strength 1       # exploring without the dial
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from learn_step import limit as bare_step
from learn_step import quark as quark_step
from peft import LoraConfig, get_peft_model
from report import tell

from quark_lm.collator import Collator, Draw, view
from quark_lm.demo import TASKS, demo_prompts
from quark_lm.generation import GenerationSettings, complete_all, sample_seeds
from quark_lm.generation.hf import HFCompleter
from quark_lm.packaged import fastest_dtype, load_model
from quark_lm.policy import Policy, completion_states
from quark_lm.prompts import encode
from quark_lm.reward_tokens import RewardTokens
from quark_lm.steering import branches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--draws", type=int, default=32, help="of a step")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--strength", type=float, default=3.0, help="the dial while exploring; 1: none")
    parser.add_argument("--rows", type=int, help="forward rows of a batch, of both; none: what fits")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = fastest_dtype()
    model, tokenizer = load_model(args.model, dtype=dtype)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    policy = Policy(model)
    tags = TASKS["sentiment"].tags
    tokens = RewardTokens.create(model, tokenizer, num_quantiles=len(tags), texts=list(tags))
    prompts = encode(demo_prompts("sentiment").select(range(args.samples)), tokenizer)
    conditioned, dials = branches(tokens, prompts, [tokens.best] * len(prompts), args.strength)
    settings = GenerationSettings(max_completion_length=args.tokens, top_p=0.95)
    completer = HFCompleter(model, [tokenizer.eos_token_id], args.rows)
    rows = args.rows or completer.fitting_rows(conditioned, settings)

    def explore() -> list[list[int]]:
        with policy.evaluating(), policy.merged():
            seeds = sample_seeds(0, num=len(conditioned))
            return complete_all(completer.complete(conditioned, seeds, settings, dials=dials), len(conditioned))

    completions = explore()
    asked = [*conditioned, *(prompt for contrasts, _ in dials for prompt in contrasts)]
    texts = sorted(zip(asked, completions * (1 + len(dials)), strict=True), key=lambda text: sum(map(len, text)))

    def bare_explore() -> None:
        with policy.evaluating(), policy.merged():
            for start in range(0, len(texts), rows):
                batch = view(texts[start : start + rows], tokenizer.eos_token_id)
                batch = {name: value.to(model.device) for name, value in batch.items()}
                policy.head(completion_states(model, batch))

    draws = [
        Draw(prompt_ids=prompts.ids[i], completion_ids=completions[i], token_at=0, quantile=(i % 2) * tokens.best)
        for i in range(args.samples)
    ]
    collator = Collator(tokens, tokenizer.eos_token_id)
    batches = [
        {name: value.to(model.device) for name, value in collator(batch).items()}
        for batch in ([draws[(s * args.draws + i) % len(draws)] for i in range(args.draws)] for s in range(args.steps))
    ]

    def learn(step: Callable[[Policy, dict], None]) -> None:
        for batch in batches:
            step(policy, batch)
            model.zero_grad()

    parts: dict[str, Callable[[], object]] = {
        "explore": explore,
        "bare_explore": bare_explore,
        "learn": lambda: learn(quark_step),
        "bare_learn": lambda: learn(bare_step),
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(args.repeats + 1):
        for name, part in parts.items():
            started = time.perf_counter()
            part()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:  # the first is the warm-up
                seconds[name].append(time.perf_counter() - started)

    def ratio(*names: str) -> float:
        ours = [sum(values) for values in zip(*(seconds[name] for name in names), strict=True)]
        bare = [sum(values) for values in zip(*(seconds[f"bare_{name}"] for name in names), strict=True)]
        return statistics.median(a / b for a, b in zip(ours, bare, strict=True))

    figures = {
        "name": "round",
        "ratio": ratio("explore", "learn"),
        "explore_ratio": ratio("explore"),
        "learn_ratio": ratio("learn"),
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "rows": rows,
    }
    tell(figures, args, dtype=str(dtype))


if __name__ == "__main__":
    main()
