"""Where a round's time and memory go, from 135M to 70B parameters and from two CPU cores to 64 GPUs: by formula.

    python benchmarks/scale.py                          # the tables of docs/scale.md
    python benchmarks/scale.py --write docs/scale.md    # puts them there, between the marks

Nothing here is a measurement of a large model: the formulas are in docs/scale.md, the measured constants are this
project's own (docs/performance.md), those of GPUs are their data sheet's with an assumed share of it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

GIB, GB = 2**30, 1e9

# -- measured (docs/performance.md, two CPU cores; a GPU's own were not measured)

CPU_LEARN_FLOPS = 1.8e11  # SmolLM2-135M, bfloat16: the FLOP below over the 3.66 s of a step's bare passes
CPU_DECODE_FLOPS = 1.3e11  # 470 tokens/s at 128 rows, x 2 FLOP a parameter
LEARN_OVER_LIMIT = 1.15  # a step over its bare forward and backward passes
LOSS_CHUNKS = 7  # float32 arrays of one chunk that the loss holds at its peak, 150,000 words
LOGITS_WHOLE = 6  # the same, of logits that are not cut into chunks
SCORER_TEXTS = 407.0  # texts/s of one CPU thread: the packaged MiniLM scorers, bfloat16
POOL_DISK = 99.0  # bytes a sample on disk, 12 + 20 tokens and their text
POOL_QUANTIZE = 0.08e-6  # seconds a sample on one core: quantizing, ranking once more for the figures, drawing
POOL_GATHER = 0.5e-6  # seconds a sample of the pool, 32 tokens, on one core
POOL_MEMORY = 55.0  # bytes a sample in each process at the peak of quantizing, 17 of them always

# -- data sheets: NVIDIA H100 SXM 80 GB; and what share of them is assumed to be reached

GPU_FLOPS, GPU_BANDWIDTH, GPU_MEMORY = 989e12, 3.35e12, 80 * GB  # dense bfloat16; HBM3
LINK_IN_NODE, LINK_BETWEEN = 450e9, 50e9  # bytes/s a GPU, one direction: NVLink 4; one 400 Gbit/s port
SHARE_FLOPS, SHARE_BANDWIDTH, SHARE_LINK = 0.4, 0.6, 0.7
GPU_SCORER_TEXTS = 20_000.0  # assumed: a scorer of 22M to 110M parameters on the same GPU
CPU_BANDWIDTH, CPU_MEMORY = 2e10, 24 * GIB  # assumed: of two cores' share of a server
LAUNCH = 0.5e-3  # seconds a layer and pass, assumed: transformers without CUDA graphs starts its kernels so slowly
DISK = 1e9  # bytes/s each writer, assumed: a checkpoint's write
MOST_ROWS = {"cpu": 128, "gpu": 512}  # generation/hf.py


@dataclass(frozen=True)
class Model:
    """A decoder of Llama's shape."""

    name: str
    layers: int
    hidden: int
    between: int  # width of the feed-forward part
    cached: int  # width of the keys, and of the values
    words: int
    tied: bool

    @property
    def body(self) -> float:
        """Parameters of the layers."""
        return self.layers * (2 * self.hidden**2 + 2 * self.hidden * self.cached + 3 * self.hidden * self.between)

    @property
    def head(self) -> float:
        return self.words * self.hidden

    @property
    def parameters(self) -> float:
        return self.body + self.head * (1 if self.tied else 2)


# as their published configurations tell
MODELS = (
    Model("SmolLM2-135M", 30, 576, 1536, 192, 49_152, True),
    Model("SmolLM2-1.7B", 24, 2048, 8192, 2048, 49_152, True),
    Model("Qwen2.5-7B", 28, 3584, 18_944, 512, 152_064, False),
    Model("Qwen2.5-32B", 64, 5120, 27_648, 1024, 152_064, False),
    Model("Llama-3.1-70B", 80, 8192, 28_672, 1024, 128_256, False),
)


@dataclass(frozen=True)
class Devices:
    name: str
    number: int
    kind: str = "gpu"

    @property
    def link(self) -> float:
        return (LINK_IN_NODE if self.number <= 8 else LINK_BETWEEN) * SHARE_LINK


DEVICES = (
    Devices("2 CPU cores", 1, "cpu"),
    Devices("1 GPU", 1),
    Devices("8 GPUs", 8),
    Devices("64 GPUs", 64),
)


@dataclass(frozen=True)
class Round:
    """What a round does; the defaults are the paper's toxicity run."""

    samples: int = 85_000
    prompt: int = 12
    tag: int = 7
    completion: int = 20
    steps: int = 500
    batch: int = 128  # draws of one step, over all devices
    micro: int = 32  # draws of one device's micro-batch, at most
    pool: int = 4_000_000  # samples when it runs

    def per_device(self, devices: Devices) -> int:
        return max(1, min(self.micro, self.batch // devices.number))


# -- memory of one device, bytes


def weights_memory(model: Model, devices: Devices, adapter: bool, sharded: bool) -> dict[str, float]:
    """Adapter: bfloat16 weights that do not learn, which are the reference too. Whole: float32 weights, a frozen
    float32 copy of them, gradients and Adam's two moments.
    """
    parts = devices.number if sharded else 1
    p = model.parameters
    if adapter:
        learned = adapter_parameters(model)
        return {"weights": 2 * p / parts, "reference": 0.0, "gradient": 4 * learned, "optimizer": 12 * learned}
    return {"weights": 4 * p / parts, "reference": 4 * p / parts, "gradient": 4 * p / parts, "optimizer": 8 * p / parts}


def adapter_parameters(model: Model, rank: int = 16) -> float:
    """LoRA on all linear layers."""
    attention = 2 * (model.hidden + model.hidden) + 2 * (model.hidden + model.cached)
    return model.layers * rank * (attention + 3 * (model.hidden + model.between))


def learn_memory(model: Model, work: Round, devices: Devices, adapter: bool, sharded: bool) -> dict[str, float]:
    rows = work.per_device(devices)
    tokens = rows * (work.prompt + work.tag + work.completion)
    memory = weights_memory(model, devices, adapter, sharded)
    memory["activations"] = 34 * model.hidden * model.layers * tokens  # bytes, no recomputation
    memory["loss"] = LOSS_CHUNKS * 4 * 2**24
    if not adapter:
        memory["head's gradient"] = 2 * 4 * model.head  # two float32 arrays while chunks are summed
    if sharded:  # one layer is whole at a time, and the head while the loss runs
        memory["gathered"] = 2 * (2 * model.body / model.layers + model.head)
    return memory


def whole_logits(model: Model, work: Round, devices: Devices) -> float:
    """What logits of every position would take in the place of chunks."""
    return LOGITS_WHOLE * 4.0 * work.per_device(devices) * (work.prompt + work.tag + work.completion) * model.words


def cache_of_row(model: Model, work: Round) -> float:
    """Keys and values of one completion at its end, and a copy while it grows."""
    return 2 * 2 * 2 * model.layers * model.cached * (work.prompt + work.tag + work.completion)


# -- seconds of a round


def explore_seconds(
    model: Model, work: Round, devices: Devices, vllm: bool, split: int | None = None
) -> tuple[float, str, int]:
    """(seconds, what bounds them, rows of a batch).

    vllm: the weights lie over as many GPUs of a node as is best (`split`) and nothing waits for launches. Else each GPU
    holds the whole model, or where it does not fit gathers it for every token.
    """
    if vllm and split is None:
        splits = [n for n in (1, 2, 4, 8) if smallest_split(model) <= n <= devices.number]
        return min(explore_seconds(model, work, devices, True, n) for n in splits)
    gpu = devices.kind == "gpu"
    weights, cache = 2 * (model.body + model.head), cache_of_row(model, work)
    split = split or (smallest_split(model) if gpu else 1)
    whole = split == 1 or vllm
    together = split if vllm else 1
    copies = devices.number / together
    free = (GPU_MEMORY if gpu else CPU_MEMORY) * together - weights / (1 if whole else devices.number)
    rows = min(MOST_ROWS[devices.kind], 0.4 * free / (cache + 16 * model.words), work.samples / copies)
    rows = max(1, int(rows))
    flops = (GPU_FLOPS * SHARE_FLOPS if gpu else CPU_DECODE_FLOPS) * together
    bandwidth = (GPU_BANDWIDTH if gpu else CPU_BANDWIDTH) * SHARE_BANDWIDTH * together
    token = {
        "memory": (weights + rows * cache / 4) / bandwidth,  # half of `cache` is a copy, and it is half full on average
        "FLOP": weights * rows / flops,
        "launches": LAUNCH * model.layers if gpu and not vllm else 0.0,
        "gathering": 0.0 if whole else weights / devices.link,
    }
    bound = max(token, key=lambda name: token[name])
    batches = -(-work.samples // int(rows * copies))
    prefill = 2 * model.body * rows * (work.prompt + work.tag) / flops
    return batches * (work.completion * token[bound] + prefill), bound, rows


def learn_flops(model: Model, work: Round, adapter: bool) -> float:
    """FLOP of one draw: the policy forward and backward (a frozen weight needs no gradient of its own), the reference
    forward; the head on completion tokens alone.
    """
    passes = 4 if adapter else 6
    policy, reference = work.prompt + work.tag + work.completion, work.prompt + work.completion
    return model.body * (passes * policy + 2 * reference) + model.head * work.completion * (passes + 2)


def learn_seconds(
    model: Model, work: Round, devices: Devices, adapter: bool, sharded: bool
) -> tuple[float, str, float]:
    """(computing, what bounds it, exchanging) over a round's steps; the exchange may hide behind the computing.

    Few rows on a device cannot be faster than reading the weights for each of the four passes (policy forward, two
    products backward, reference forward) and, when all learns, the optimizer's arrays once a step.
    """
    rate = GPU_FLOPS * SHARE_FLOPS if devices.kind == "gpu" else CPU_LEARN_FLOPS
    bandwidth = (GPU_BANDWIDTH if devices.kind == "gpu" else CPU_BANDWIDTH) * SHARE_BANDWIDTH
    size = 2 if adapter else 4
    micro_batches = max(1, work.batch // (devices.number * work.per_device(devices)))
    optimizer = 0.0 if adapter else 28 * model.parameters / (devices.number if sharded else 1)
    computed = learn_flops(model, work, adapter) * work.batch / devices.number / rate
    read = (micro_batches * 4 * size * model.parameters + optimizer) / bandwidth
    n = devices.number
    ring = (n - 1) / n
    if sharded:  # in bfloat16 the policy forward and backward and the reference forward; gradients in float32
        moved = ring * (2 * model.parameters * 3 * micro_batches + (0 if adapter else 4 * model.parameters))
    else:  # gradients alone
        moved = 2 * ring * 4 * (adapter_parameters(model) if adapter else model.parameters)
    launches = LAUNCH * model.layers * 4 * micro_batches if devices.kind == "gpu" else 0.0
    limits = {"FLOP": computed, "memory": read, "launches": launches}
    bound = max(limits, key=lambda name: limits[name])
    return work.steps * LEARN_OVER_LIMIT * limits[bound], bound, work.steps * moved / devices.link


def score_seconds(work: Round, devices: Devices) -> float:
    texts = SCORER_TEXTS * 2 if devices.kind == "cpu" else GPU_SCORER_TEXTS * devices.number
    return work.samples / texts


def pool_seconds(work: Round) -> float:
    """Quantizing and gathering, which every process does for itself."""
    length = (work.prompt + work.completion) / 32
    return work.pool * (POOL_QUANTIZE + POOL_GATHER * length)


def checkpoint_bytes(model: Model, adapter: bool) -> float:
    return 12 * (adapter_parameters(model) if adapter else model.parameters)


# -- tables


def smallest_split(model: Model) -> int:
    """The GPUs over which one copy of the weights in bfloat16 must lie to be sampled, a power of two."""
    split = 1
    while 2 * model.parameters > 0.85 * GPU_MEMORY * split:
        split *= 2
    return split


def amount(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def size(memory: float) -> str:
    return f"{memory / GIB:,.1f}" if memory < 100 * GIB else f"{memory / GIB:,.0f}"


def fits(total: float, devices: Devices) -> bool:
    return total <= (GPU_MEMORY if devices.kind == "gpu" else CPU_MEMORY)


def time_table(given: Round) -> list[str]:
    lines = [
        "| model | devices | what learns | explore | by vLLM | score | learn | exchange | pool | checkpoint | round |"
        " most goes to |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for devices in DEVICES if model.parameters < 1e9 else DEVICES[1:]:  # days on two cores
            for adapter in (True, False):
                placed = placement(model, given, devices, adapter)
                if placed is None:
                    continue
                work, sharded = placed
                explore, bound, rows = explore_seconds(model, work, devices, vllm=False)
                fast = amount(explore_seconds(model, work, devices, vllm=True)[0]) if devices.kind == "gpu" else ""
                computed, limit, moved = learn_seconds(model, work, devices, adapter, sharded)
                parts = {
                    f"explore ({bound})": explore,
                    "score": score_seconds(work, devices),
                    f"learn ({limit})": computed,
                    "exchange": max(0.0, moved - computed),
                    "pool": pool_seconds(work),
                    "checkpoint": checkpoint_bytes(model, adapter) / DISK / (devices.number if sharded else 1),
                }
                most = max(parts, key=lambda name: parts[name])
                score, pool, saved = (amount(parts[name]) for name in ("score", "pool", "checkpoint"))
                lines.append(
                    f"| {model.name} | {devices.name} | {'adapter' if adapter else 'all'} | {amount(explore)}"
                    f" ({rows} rows) | {fast} | {score} | {amount(computed)}{' (sharded)' if sharded else ''} |"
                    f" {amount(moved)} | {pool} | {saved} | {amount(sum(parts.values()))} | {most} |"
                )
    return lines


def placement(model: Model, work: Round, devices: Devices, adapter: bool) -> tuple[Round, bool] | None:
    """(the round with the largest micro-batch that fits, whether the weights are sharded); whole before sharded."""
    for sharded in (False, True)[: 1 if devices.number == 1 else 2]:
        micro = work.per_device(devices)
        while micro:
            smaller = replace(work, micro=micro)
            if fits(sum(learn_memory(model, smaller, devices, adapter, sharded).values()), devices):
                return smaller, sharded
            micro //= 2
    return None


def memory_table(work: Round) -> list[str]:
    lines = [
        "| model | what learns | weights | reference | gradient | optimizer | activations | loss and head |"
        " whole logits instead | one device | 8, sharded | 64, sharded |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    one, eight, many = DEVICES[1], DEVICES[2], DEVICES[3]
    for model in MODELS:
        for adapter in (True, False):
            parts = learn_memory(model, work, one, adapter, False)
            names = ("weights", "reference", "gradient", "optimizer", "activations")
            cells = [size(parts[name]) for name in names]
            cells.append(size(parts["loss"] + parts.get("head's gradient", 0)))
            cells.append(size(whole_logits(model, work, one)))
            for devices in (one, eight, many):
                total = sum(learn_memory(model, work, devices, adapter, devices.number > 1).values())
                cells.append(size(total) if fits(total, devices) else f"**{size(total)}**")
            lines.append(f"| {model.name} | {'adapter' if adapter else 'all'} | {' | '.join(cells)} |")
    return lines


def pool_table() -> list[str]:
    lines = [
        "| samples | on disk | memory of each process | quantize and draw | gather a round's draws |",
        "|---|---|---|---|---|",
    ]
    for samples in (10**6, 10**7, 10**8, 10**9):
        lines.append(
            f"| {samples:,} | {size(samples * POOL_DISK)} GiB | {size(samples * POOL_MEMORY)} GiB |"
            f" {amount(samples * POOL_QUANTIZE)} | {amount(samples * POOL_GATHER)} |"
        )
    return lines


def told(work: Round) -> str:
    return (
        f"A round of {work.samples:,} samples ({work.prompt} + {work.completion} tokens, a tag of {work.tag}),"
        f" {work.steps} steps of {work.batch} draws, a pool of {work.pool:,}."
    )


def page(work: Round, longer: Round) -> str:
    blocks = [
        [f"**Time of a round, computed.** {told(work)} What is missing does not fit.", "", *time_table(work)],
        [f"**The same with long completions, computed.** {told(longer)}", "", *time_table(longer)],
        [f"**Memory of learning, GiB a device, computed.** {told(work)} Bold: over 80 GB.", "", *memory_table(work)],
        ["**The pool, from the measured costs of a sample.**", "", *pool_table()],
    ]
    return "\n\n".join("\n".join(block) for block in blocks)


BEGIN, END = "<!-- benchmarks/scale.py writes from here -->", "<!-- to here -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE")
    args = parser.parse_args()
    longer = Round(samples=16_384, prompt=200, completion=500, steps=100, batch=512, micro=8, pool=1_000_000)
    written = page(Round(), longer)
    if args.write is None:
        print(written)
        return
    before, rest = args.write.read_text(encoding="utf-8").split(BEGIN)
    args.write.write_text(before + BEGIN + "\n\n" + written + "\n\n" + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
