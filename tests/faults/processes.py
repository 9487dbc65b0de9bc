"""`quark` in processes of their own, which something befalls: a signal, a full disk, a limit.

A fork server imports torch once; each command is then a process that starts in milliseconds. What befalls it is armed
before it starts: at the count-th call of a function, an action.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny import USE_CPU

CLOCK = ("tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    "torch datasets peft quark_lm.trainer quark_lm.cli quark_lm.export quark_lm.train_command quark_lm.demo"
    " transformers.models.gpt2.modeling_gpt2".split()
)


@dataclass(frozen=True)
class Fault:
    """What happens: before the count-th call of `where`, such as "quark_lm.pool:Pool.append".

    action: "term", "fill" (the file system that holds `path`), "limit" (no file may grow beyond `path` bytes),
        "memory" (the process may take `path` bytes more, until a call goes well).
    """

    where: str
    count: int = 1
    action: str = "term"
    path: str = ""

    def arm(self) -> None:
        module, names = self.where.split(":")
        *owners, name = names.split(".")
        owner: Any = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        original, calls = getattr(owner, name), []

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == self.count:
                self.happen()
            result = original(*args, **kwargs)
            if self.action == "memory":  # what fits has been found; other libraries reserve much more than they use
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            return result

        setattr(owner, name, counted)

    def happen(self) -> None:
        if self.action == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.action == "fill":
            fill(Path(self.path))
        elif self.action == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(self.path), resource.RLIM_INFINITY))
        elif self.action == "memory":
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + int(self.path)
            resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
        else:
            raise AssertionError(self.action)


def fill(folder: Path) -> None:
    """Leaves no block free; `ballast` is what to delete."""
    with (folder / "ballast").open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                pass


@dataclass(frozen=True)
class Done:
    code: int | None
    out: str
    err: str

    @property
    def last(self) -> str:
        lines = self.err.splitlines()
        return lines[-1] if lines else ""


class Command:
    """`quark` with these arguments on its way; `wait` gives how it ended."""

    def __init__(self, argv: Sequence[str], fault: Fault | None = None, cwd: Path | None = None) -> None:
        # pipes, since a limit on files would meet the logs too
        self._parts: tuple[list[bytes], list[bytes]] = ([], [])
        pipes = [_context.Pipe(duplex=False) for _ in range(2)]
        self.process = _context.Process(target=_run, args=(list(argv), pipes[0][1], pipes[1][1], fault, cwd))
        self.process.start()
        self._readers = []
        for (source, target), parts in zip(pipes, self._parts, strict=True):
            target.close()
            self._readers.append(threading.Thread(target=_read, args=(source, parts), daemon=True))
            self._readers[-1].start()

    @property
    def err(self) -> str:
        """What it has written to stderr so far."""
        return b"".join(self._parts[1]).decode(errors="replace")

    def wait(self, seconds: float = 300) -> Done:
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise AssertionError(f"the command did not end in {seconds} s: {self.err[-2000:]}")
        for reader in self._readers:
            reader.join(10)
        return Done(self.process.exitcode, b"".join(self._parts[0]).decode(), self.err)


def quark(argv: Sequence[str], fault: Fault | None = None, cwd: Path | None = None) -> Done:
    """Runs it to its end."""
    return Command(argv, fault, cwd).wait()


def _read(source: Any, parts: list[bytes]) -> None:
    while part := os.read(source.fileno(), 1 << 16):
        parts.append(part)
    source.close()


def _run(argv: list[str], out: Any, err: Any, fault: Fault | None, cwd: Path | None) -> None:
    code = 99
    try:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        if cwd is not None:
            os.chdir(cwd)
        import torch

        from quark_lm.cli import main

        torch.set_num_threads(1)
        if fault is not None:
            fault.arm()
        code = main(argv)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def train(things: Path, folder: Path, **changes: Any) -> list[str]:
    """The command of the run in this folder."""
    settings = {
        "model_name_or_path": things / "base",
        "reward_funcs": f"{things / 'rewards.py'}:vowels",
        "prompts": things / "prompts.jsonl",
        "eval_prompts": things / "held.jsonl",
        "eval_reward_funcs": f"{things / 'rewards.py'}:held",
        "output_dir": folder,
        "num_rounds": 2,
        "steps_per_round": 2,
        "prompts_first_round": 24,
        "prompts_per_round": 12,
        "num_quantiles": 3,
        "heldout_share": 0.3,
        "num_eval_generations": 1,
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "generation_batch_size": 8,
        "reward_batch_size": 8,
        "reward_retries": 0,
        "early_stop": False,
        "logging_steps": 1,
        "use_cpu": USE_CPU,
        **changes,
    }
    return ["train", *(f"--{name}={value}" for name, value in settings.items() if value is not None)]


def end(folder: Path) -> dict[str, Any]:
    """What a run ends with: its weights, its pool's rows, the metrics without the clock's, the figures."""
    from quark_lm import Pool

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = json.dumps(Pool.open(folder).to_table().to_pylist())
    weights = (folder / "model" / "model.safetensors").read_bytes()
    results = json.loads((folder / "results.json").read_text())
    last = {k: v for k, v in results.pop("last_round").items() if k not in CLOCK}
    return {
        "weights": hashlib.sha256(weights).hexdigest(),
        "pool": hashlib.sha256(rows.encode()).hexdigest(),
        "metrics": [{k: v for k, v in line.items() if k not in CLOCK} for line in lines],
        "results": {**results, "last_round": last},
    }


def one_line(done: Done, code: int = 2) -> str:
    """The line of a command that failed as it should: no traceback, nothing of it on stdout."""
    assert done.code == code, done.err[-2000:]
    assert "Traceback" not in done.err
    assert done.last.startswith("quark: ")
    assert not done.last.startswith("quark: failed")  # what nobody foresaw
    return done.last
