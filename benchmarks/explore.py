"""Tokens a second while exploring, against `generate` at the same batch and prompts, alternating in one process.

python benchmarks/explore.py --json FILE                       # the packaged model
python benchmarks/explore.py --model HuggingFaceTB/SmolLM2-135M
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from report import tell

from quark_lm.demo import demo_prompts
from quark_lm.generation import GenerationSettings, sample_seeds
from quark_lm.generation.hf import HFCompleter
from quark_lm.packaged import fastest_dtype, load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--batch", type=int, default=128, help="rows of a batch, the same for both")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--num-generations", type=int, default=1, help="completions of a prompt")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    dtype = fastest_dtype()
    model, tokenizer = load_model(args.model, dtype=dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    tokenizer.padding_side = "left"
    texts = demo_prompts("sentiment")["prompt"][: args.samples // args.num_generations]
    texts = [text for text in texts for _ in range(args.num_generations)]
    ids = [tokenizer(text)["input_ids"] for text in texts]

    def ours() -> int:
        settings = GenerationSettings(max_completion_length=args.tokens, top_p=args.top_p)
        completer = HFCompleter(model, [tokenizer.eos_token_id], args.batch)
        batches = completer.complete(ids, sample_seeds(0, num=len(ids)), settings)
        return sum(len(c) for _, completions in batches for c in completions)

    def plain() -> int:
        """As a script would: batches in the order of the prompts, padded on the left, the same kind of draw."""
        total = 0
        for start in range(0, len(texts), args.batch):
            inputs = tokenizer(texts[start : start + args.batch], return_tensors="pt", padding=True).to(model.device)
            out = model.generate(
                **inputs,
                max_new_tokens=args.tokens,
                do_sample=True,
                top_k=0,
                top_p=args.top_p,
                pad_token_id=tokenizer.eos_token_id,
            )
            new = out[:, inputs["input_ids"].shape[1] :]
            ended = (new == tokenizer.eos_token_id).cumsum(1)
            total += int(((ended == 0) | ((ended == 1) & (new == tokenizer.eos_token_id))).sum())
        return total

    speeds: dict[str, list[float]] = {"quark": [], "generate": []}
    with torch.no_grad():
        for repeat in range(args.repeats + 1):
            for name, function in (("quark", ours), ("generate", plain)):
                torch.manual_seed(repeat)
                started = time.perf_counter()
                tokens = function()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if repeat:  # the first is the warm-up
                    speeds[name].append(tokens / (time.perf_counter() - started))
    figures = {
        "name": "explore",
        "ratio": statistics.median(a / b for a, b in zip(speeds["quark"], speeds["generate"], strict=True)),
        "tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
    }
    tell(figures, args, dtype=str(dtype))


if __name__ == "__main__":
    main()
