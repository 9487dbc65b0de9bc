"""One learning step of Quark against its limit, and against the loss that one would write first.

limit: a bare forward and backward of the same tokens (cross-entropy on the completion's rows) plus a forward of the
    reference.
naive: the same loss as Quark's on full logits of every position, left to autograd.

Time: the variants alternate in one process, and the figure is the median of the ratios of neighbours. Memory: each
variant in a process of its own, the peak above what was resident before the step.

    python benchmarks/learn_step.py --json FILE            # the packaged model's shape
    python benchmarks/learn_step.py --vocab 150000         # memory at a large vocabulary
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from report import tell
from transformers import LlamaConfig, LlamaForCausalLM

from quark_lm.collator import Collator, Draw
from quark_lm.loss import LossSettings, quark_loss
from quark_lm.policy import Policy, completion_states
from quark_lm.reward_tokens import RewardTokens


def build(args: argparse.Namespace):
    """(policy, batch): SmolLM2-135M's shape with random weights, under LoRA unless --full."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=args.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM(config).to(device, getattr(torch, args.dtype))
    if not args.full:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    tags = tuple((100 + k, 7, 8, 9, 10, 11, 12) for k in range(5))
    tokens = RewardTokens("text", "first", tuple("abcde"), tags)
    draws = [
        Draw(
            prompt_ids=[20 + i] * args.prompt,
            completion_ids=[40 + i] * args.completion,
            token_at=0,
            quantile=4 * (i % 2),
        )
        for i in range(args.batch)
    ]
    batch = {name: value.to(device) for name, value in Collator(tokens, 0)(draws).items()}
    return Policy(model), batch


def quark(policy: Policy, batch: dict) -> None:
    with policy.reference() as (reference, head):
        reference_states = completion_states(reference, batch, "reference_")
    states = completion_states(policy.model, batch)
    result = quark_loss(
        states,
        reference_states,
        batch["targets"],
        policy.head,
        head,
        policy.head.parameters(),
        LossSettings(),
        len(batch["targets"]),
    )
    result.loss.backward()


def limit(policy: Policy, batch: dict) -> None:
    with policy.reference() as (reference, head):
        head(completion_states(reference, batch, "reference_"))
    logits = policy.head(completion_states(policy.model, batch))
    F.cross_entropy(logits, batch["targets"]).backward()


def naive(policy: Policy, batch: dict) -> None:
    def logits(model, prefix=""):
        inputs = {name: batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "position_ids")}
        return model(**inputs, use_cache=False).logits.float()

    with policy.reference() as (reference, _):
        reference_log_probs = logits(reference, "reference_").log_softmax(-1)
    log_probs = logits(policy.model).log_softmax(-1)
    rows, reference_rows = batch["rows"], batch["reference_rows"]
    p, q = log_probs.flatten(0, 1)[rows], reference_log_probs.flatten(0, 1)[reference_rows]
    nll = -p.gather(1, batch["targets"][:, None]).squeeze(1)
    kl = (q.exp() * (q - p)).sum(1)
    (nll + 0.05 * kl).mean().backward()


VARIANTS = {"quark": quark, "limit": limit, "naive": naive}


def seconds(variant, policy: Policy, batch: dict) -> float:
    started = time.perf_counter()
    variant(policy, batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - started
    policy.model.zero_grad()
    return elapsed


def peak_mib(name: str, args: argparse.Namespace) -> float:
    """MiB that one step takes above what is resident, measured in this process (the parent starts one for each)."""
    policy, batch = build(args)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        VARIANTS[name](policy, batch)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (Linux)
    before = _status("VmRSS")
    VARIANTS[name](policy, batch)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"no {field}: the memory figure needs Linux")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=8)
    parser.add_argument("--completion", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--full", action="store_true", help="no adapter: the whole model learns")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only-memory", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_memory:
        print(peak_mib(args.only_memory, args))
        return
    policy, batch = build(args)
    timed: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for variant in VARIANTS.values():
        seconds(variant, policy, batch)
    for _ in range(args.repeats):
        for name, variant in VARIANTS.items():
            timed[name].append(seconds(variant, policy, batch))
    over = {
        name: statistics.median(q / t for q, t in zip(timed["quark"], timed[name], strict=True))
        for name in ("limit", "naive")
    }
    del policy, batch
    command = [
        sys.executable,
        __file__,
        *(a for a in sys.argv[1:] if a != "--json" and a != str(args.json)),
        "--only-memory",
    ]
    memory = {
        n: float(subprocess.run([*command, n], capture_output=True, text=True, check=True).stdout) for n in VARIANTS
    }
    figures = {
        "name": "learn_step",
        "ratio": over["limit"],
        "time_over_naive": over["naive"],
        "memory_over_limit": memory["quark"] / memory["limit"],
        "extra_memory_over_naive": (memory["quark"] - memory["limit"]) / (memory["naive"] - memory["limit"]),
        "memory_over_naive": memory["quark"] / memory["naive"],
        "median_seconds": {name: statistics.median(values) for name, values in timed.items()},
        "peak_mib": memory,
    }
    tell(figures, args)


if __name__ == "__main__":
    main()
