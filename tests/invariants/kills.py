"""Kills a run with SIGKILL, starts it again, and compares its end with that of a run that nobody killed, bit for bit.

Half of the kills come at a random moment, the others within what they are told to hit: a batch that is kept, a pool's
or a manifest's write, a line of metrics, a checkpoint's files, its marker.

    PYTHONPATH=tests python tests/invariants/kills.py 100 --seed 1 --json docs/results/kill.json
    PYTHONPATH=tests python tests/invariants/kills.py 20 --cases packaged --json docs/results/kill-packaged.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import recipe
import torch

import quark_lm.exploring as exploring
import quark_lm.packaged as packaged
import quark_lm.run_folder as run_folder
import quark_lm.trainer as trainer_module
from quark_lm import Pool, QuarkTrainer, demo
from quark_lm.generation.hf import HFCompleter
from quark_lm.pool import PartialRound
from quark_lm.run_folder import MetricsFile

CASES = ("gpt2-untied", "llama-tied-lora")
PACKAGED = "packaged"  # the demo's model and scorer, in place of a tiny model and a reward of its letters
CLOCK = ("tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")


def run(folder: Path, name: str) -> None:
    """The command that is given again and again. Round 1 explores, with the dial; dropout is on but in the packaged."""
    if name == PACKAGED:
        packaged.fastest_dtype = lambda: torch.float32  # what a machine measures may differ from start to start
        trainer, *_ = demo.make_trainer(
            "sentiment",
            folder,
            num_rounds=2,
            steps_per_round=3,
            prompts_first_round=64,
            prompts_per_round=24,
            generation_batch_size=8,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            meaning_rows=32,
            logging_steps=1,
            save_strategy="epoch",
        )
        trainer.train()
        trainer.save_model(str(folder / "end"))
        return
    options = {"disable_dropout": False, "lora_dropout": 0.1, "generation_batch_size": 8, "save_strategy": "epoch"}
    options |= {"held_out": ("the sun", "one day", "his dog"), "num_eval_generations": 4}
    trainer = recipe.trainer(folder, recipe.CASES[name], logging_steps=2, num_rounds=3, **options)
    trainer.train()
    trainer.save_model(str(folder / "end"))


def end(folder: Path) -> dict[str, Any]:
    """What a run ends with: hashes of its weights and its pool's rows, and the metrics without the clock's."""
    weights = sorted((folder / "end").glob("*.safetensors"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = json.dumps(Pool.open(folder).to_table().to_pylist())
    return {
        "weights": [hashlib.sha256(path.read_bytes()).hexdigest() for path in weights],
        "pool": hashlib.sha256(rows.encode()).hexdigest(),
        "metrics": [{k: v for k, v in line.items() if k not in CLOCK} for line in lines],
    }


def at_call(owner: Any, name: str, count: int, before: bool = True) -> Callable[[], None]:
    """Makes the process kill itself at, or right after, the count-th call."""

    def arm() -> None:
        original, calls = getattr(owner, name), []

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if before and len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, counted)

    return arm


def torn_line(count: int) -> Callable[[], None]:
    """A kill in the middle of the count-th batch that is kept."""

    def arm() -> None:
        original, calls = PartialRound._add, []

        def half(self: PartialRound, line: dict[str, Any]) -> None:
            calls.append(1)
            if len(calls) == count:
                text = json.dumps(line)
                with self.path.open("a") as file:
                    file.write(text[: len(text) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            original(self, line)

        PartialRound._add = half

    return arm


def aimed(random_numbers: random.Random) -> tuple[str, Callable[[], None]]:
    """(name, how to arm it) of a kill that hits something."""
    count = random_numbers.randint(1, 3)
    return random_numbers.choice(
        [
            (f"generation batch {count}", at_call(HFCompleter, "_complete_batch", count)),
            (f"torn line {count}", torn_line(count)),
            (f"kept batch {count}", at_call(PartialRound, "_add", count, before=False)),
            (f"scores {count}", at_call(PartialRound, "add_scores", count)),
            (f"file in place {count}", at_call(os, "replace", count)),
            (f"after file in place {count}", at_call(os, "replace", count, before=False)),
            (f"round {count}", at_call(Pool, "append", count)),
            (f"quantiles {count}", at_call(QuarkTrainer, "quantize", count)),
            (f"loss {3 * count}", at_call(QuarkTrainer, "compute_loss", 3 * count)),
            (f"metrics line {2 * count}", at_call(MetricsFile, "append", 2 * count)),
            (f"weights of checkpoint {count}", at_call(QuarkTrainer, "save_model", count)),
            (f"checkpoint {count}", at_call(QuarkTrainer, "_save_checkpoint", count, before=False)),
            (f"marker {count}", at_call(run_folder, "write_marker", count)),
            (f"checkpoint in place {count}", at_call(trainer_module, "put_in_place", count, before=False)),
            (f"older checkpoints {count}", at_call(run_folder, "_remove", count, before=False)),
            (f"optimizer {count}", at_call(QuarkTrainer, "_save_optimizer_and_scheduler", count)),
            (f"held-out scores {count + 1}", at_call(exploring, "_held_out_scores", count + 1)),
            (f"end of round {count}", at_call(QuarkTrainer, "finish_round", count)),
        ]
    )


def attempt(folder: Path, name: str, arm: Callable[[], None] | None, seconds: float | None) -> bool:
    """Runs the command in a child, killed by itself (`arm`) or after some seconds; whether it was killed.

    Raises: RuntimeError when it ended otherwise than well or by the kill.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with open(folder.with_suffix(".log"), "a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            if arm is not None:
                arm()
            run(folder, name)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    deadline = time.monotonic() + (seconds if seconds is not None else 1e9)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            deadline = 1e18
        time.sleep(0.002)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status:
        raise RuntimeError(f"failed, not by a kill:\n{folder.with_suffix('.log').read_text()[-3000:]}")
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cases", nargs="+", choices=[*CASES, PACKAGED], default=list(CASES))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a child of fork has none of its parent's threads
    numbers = random.Random(args.seed)
    kills = resumed = equal = runs = 0
    hit: dict[str, int] = {}
    differing: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        whole, took = {}, {}
        for name in args.cases:
            started = time.monotonic()
            attempt(folder / f"whole-{name}", name, None, None)
            took[name] = time.monotonic() - started
            whole[name] = end(folder / f"whole-{name}")
        while kills < args.kills:
            name = args.cases[runs % len(args.cases)]
            here, killed, story = folder / f"run-{runs}", 0, []
            runs += 1
            try:
                while True:
                    # up to four kills in one run, then it may end
                    strikes = kills < args.kills and killed < 4
                    if strikes and numbers.random() < 0.5:
                        seconds = numbers.random() * took[name]
                        what, arm = f"after {seconds:.2f} s", None
                    elif strikes:
                        seconds = None
                        what, arm = aimed(numbers)
                    else:
                        what, arm, seconds = "no kill", None, None
                    if not attempt(here, name, arm, seconds):
                        break
                    kills, killed = kills + 1, killed + 1
                    story.append(what)
                    kind = "a random moment" if arm is None else what.rstrip("0123456789 ")
                    hit[kind] = hit.get(kind, 0) + 1
            except RuntimeError as error:
                differing.append(f"{name}: {', '.join(story)}: {error}")
                if not killed:
                    break  # without a kill it would end so for ever
                resumed += killed - 1  # it did not go on from the last
                continue
            resumed += killed
            found = end(here)
            if found == whole[name]:
                equal += killed
            else:
                differing.append(f"{name}: {', '.join(story)}: {[k for k in found if found[k] != whole[name][k]]}")
    result = {
        "name": args.json.stem if args.json else "kill",
        "kills": kills, "resumed": resumed, "bitwise_equal": equal, "runs": runs, "seed": args.seed,
        "hit": dict(sorted(hit.items())), "differing": differing, "cases": args.cases, "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(bool(differing))


if __name__ == "__main__":
    main()
