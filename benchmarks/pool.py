"""The pool at ten million samples: opening, quantizing, drawing, appending a round, gathering a round's draws.

    python benchmarks/pool.py --json FILE
    python benchmarks/pool.py --rows 100000000 --rounds 200 --only open rank quantize gather

Each part runs in a process of its own: the best of its repeats by the clock and by the processor's time (on a busy
machine the second is the steadier), and its peak memory above what it began with. The samples are synthetic; the
Parquet files are real, copies of one round's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa

from quark_lm import Pool, quantiles
from quark_lm.run_folder import hardware


def rewards(rows: int) -> np.ndarray:
    """Scores of a classifier, a third of them rounded, so that there are ties."""
    values = np.random.default_rng(0).beta(0.5, 0.8, rows)
    values[::3] = values[::3].round(3)
    return values


def columns(rows: int, seed: int) -> dict:
    """One round's: 12-token prompts, 20-token completions and their text."""
    numbers = np.random.default_rng(seed)
    prompt, completion = numbers.integers(0, 49_152, (rows, 12)), numbers.integers(0, 49_152, (rows, 20))
    return {
        "prompt_index": numbers.integers(0, 100_000, rows),
        "prompt_ids": list(prompt.astype(np.int32)),
        "completion_ids": list(completion.astype(np.int32)),
        "token_at": np.zeros(rows, np.int32),
        "prompt": [f"prompt number {i} of the training set" for i in range(rows)],
        "completion": [f" goes on with some twenty tokens of text, number {i}, as it was drawn" for i in range(rows)],
        "reward": numbers.random(rows),
        "held_out": numbers.random(rows) < 0.1,
    }


def make(folder: Path, rows: int, rounds: int) -> None:
    """A pool on disk; its rounds are one round's file under other names (which tells round 0 in all), with a manifest
    that is true of them.
    """
    pool = Pool.open(folder, create=True)
    pool.append(0, columns(rows // rounds, 0))
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["rounds"][0]
    entries = [{**entry, "round": round, "file": f"round-{round:05d}.parquet"} for round in range(rounds)]
    for other in entries[1:]:
        shutil.copyfile(folder / entry["file"], folder / other["file"])
    (folder / "manifest.json").write_text(json.dumps({"rounds": entries}))


def status(field: str) -> float:
    """MiB; needs Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field}: the memory figure needs Linux")


def measured(function, repeats: int = 3) -> dict[str, float]:
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    best = {"seconds": float("inf"), "cpu_seconds": float("inf")}
    for _ in range(repeats):
        clock, cpu = time.perf_counter(), time.process_time()
        function()
        best["seconds"] = min(best["seconds"], time.perf_counter() - clock)
        best["cpu_seconds"] = min(best["cpu_seconds"], time.process_time() - cpu)
    return {**best, "peak_gib": (status("VmHWM") - before) / 1024}


def quantize(pool: Pool, scope: str) -> np.ndarray:
    """What the trainer does between exploring and drawing."""
    from quark_lm import QuarkTrainer

    settings = SimpleNamespace(num_quantiles=5, pool_window=None, quantile_scope=scope, reward_attributes=None)
    return QuarkTrainer.quantize(SimpleNamespace(open_pool=lambda: pool, args=settings), pool.num_rounds - 1)


def part(name: str, folder: Path, rows: int) -> dict[str, float]:
    if name == "rank":  # the ranking alone
        values = rewards(rows)
        return measured(lambda: quantiles.assign(values, 5), 5)
    if name == "draw":
        assigned = quantiles.assign(rewards(rows), 5)
        return measured(lambda: quantiles.draw(assigned, 64_000, 0, 3, "ends", 5, best_share=0.75))
    if name == "open":
        return measured(lambda: Pool.open(folder), 1)
    pool = Pool.open(folder)
    if name.startswith("quantize"):
        import torch  # noqa: F401  # what the trainer needs is not what quantizing costs
        import transformers  # noqa: F401

        from quark_lm import QuarkTrainer  # noqa: F401

        scope = "prompt" if name == "quantize_per_prompt" else "global"
        return measured(lambda: quantize(pool, scope), 5 if rows <= 10_000_000 else 2)
    if name == "verify":
        return measured(pool.verify, 1)
    if name == "gather":  # 500 steps of 128 draws
        drawn = np.random.default_rng(1).integers(0, len(pool), 64_000)
        return measured(lambda: pool.gather(drawn, ["prompt_ids", "completion_ids", "token_at"]), 1)
    new = columns(50_000, 9)
    return measured(lambda: pool.append(pool.num_rounds, new))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=20)
    names = ("open", "rank", "quantize", "quantize_per_prompt", "draw", "gather", "append", "verify")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(part(args.part, args.folder, args.rows)))
        return
    parts: dict[str, dict[str, float]] = {}

    def run(name: str, folder: Path) -> dict[str, float]:
        command = [sys.executable, __file__, "--part", name, "--folder", str(folder), "--rows", str(args.rows)]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    with tempfile.TemporaryDirectory() as temporary:
        large, small = Path(temporary) / "large", Path(temporary) / "small"
        make(large, args.rows, args.rounds)
        make(small, args.rows // args.rounds, 1)
        for name in args.only:
            parts[name] = run(name, large)
            print(name, parts[name], file=sys.stderr, flush=True)
        for name in sorted({"gather", "append"} & set(args.only)):
            parts[f"{name}_in_a_pool_of_one_round"] = run(name, small)
        size = sum(path.stat().st_size for path in large.iterdir()) / 2**30
    result = {
        "name": "pool",
        "rows": args.rows,
        "rounds": args.rounds,
        "gib_on_disk": size,
        "parts": parts,
        "cpus": os.cpu_count(),
        "hardware": hardware(),
        "numpy": np.__version__,
        "pyarrow": pa.__version__,
        "load": os.getloadavg()[1],
    }
    if "append" in parts:  # to the large pool, over appending to one of a single round
        result["ratio"] = parts["append"]["cpu_seconds"] / parts["append_in_a_pool_of_one_round"]["cpu_seconds"]
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
