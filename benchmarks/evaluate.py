"""What `quark evaluate` costs beside generation, one pass of each scorer and one of the evaluator alone.

Both alternate in one process on models that are loaded already; the ratio is the median of neighbours'. The files that
an evaluation writes, its journal with an fsync a batch, every metric and every interval are in its time.

    python benchmarks/evaluate.py --json FILE     # the packaged model, the toxicity task
    python benchmarks/evaluate.py --tiny          # a model of two layers: does it run at all
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from report import tell

from quark_lm.evaluate_command import EvaluationRun, Request
from quark_lm.generation import complete_all, sample_seeds
from quark_lm.generation.hf import HFCompleter
from quark_lm.policy import Head, completion_log_probs
from quark_lm.steering import eos_ids


def prepared(args: argparse.Namespace, folder: Path) -> EvaluationRun:
    model, scorers = args.model, tuple(args.scorer)
    if args.tiny:
        model = str(folder / "tiny")
        if not Path(model).exists():
            save_tiny(Path(model))
        scorers = scorers or ("repetition", "repetition(unit=tokens)")
    return EvaluationRun.make(
        "evaluate",
        Request(
            model=model,
            task=args.task,
            num_prompts=args.prompts,
            num_generations=args.num_generations,
            max_completion_length=args.tokens,
            scorers=scorers,
            evaluator=model,
            output_dir=str(folder / f"{time.monotonic_ns()}"),
        ),
    )


def save_tiny(folder: Path) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from tiny import tiny_gpt2, tiny_tokenizer

    tiny_gpt2().save_pretrained(folder)
    tiny_tokenizer(pad=False).save_pretrained(folder)


@torch.no_grad()
def alone(run: EvaluationRun) -> tuple[float, dict[str, float]]:
    """(seconds in all, of each pass): the same work with nothing kept and nothing summed up."""
    assert run.asked is not None
    assert run.prompts is not None
    assert run.settings is not None
    assert run.evaluator is not None
    model, tokenizer = run.asked.model, run.asked.tokenizer
    number = run.made["num_generations"]
    prompts = run.prompts.select([p for p in range(len(run.prompts)) for _ in range(number)])
    seconds = {}

    def timed(name: str, function: Any) -> Any:
        started = time.perf_counter()
        result = function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - started
        return result

    def generate() -> list[list[int]]:
        completer = HFCompleter(model, eos_ids(model, tokenizer))
        return complete_all(
            completer.complete(prompts.ids, sample_seeds(0, num=len(prompts)), run.settings), len(prompts)
        )

    ids = timed("generate", generate)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    for scorer in run.scorers:
        arguments = {"prompts": prompts.prompts, "completions": texts, "completion_ids": ids}
        timed(f"score {scorer.name}", lambda s=scorer, a=arguments: s.function(**a))
    judge = run.evaluator.model
    timed("evaluator", lambda: completion_log_probs(judge, Head(judge), prompts.ids, ids, 0))
    return sum(seconds.values()), seconds


def whole(run: EvaluationRun) -> float:
    started = time.perf_counter()
    run.evaluate()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--task", default="toxicity")
    parser.add_argument("--scorer", action="append", default=[])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--num-generations", type=int, default=25)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    wholes, alones, passes = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats + 1):
            seconds = whole(prepared(args, Path(folder)))
            total, of_passes = alone(prepared(args, Path(folder)))
            if repeat:  # the first is the warm-up
                wholes.append(seconds)
                alones.append(total)
                passes.append(of_passes)
    figures = {
        "name": "evaluate",
        "ratio": statistics.median(a / b for a, b in zip(wholes, alones, strict=True)),
        "median_seconds": {
            "evaluate": statistics.median(wholes),
            "alone": statistics.median(alones),
            **{name: statistics.median(p[name] for p in passes) for name in passes[0]},
        },
        "completions": args.prompts * args.num_generations,
    }
    tell(figures, args)


if __name__ == "__main__":
    main()
