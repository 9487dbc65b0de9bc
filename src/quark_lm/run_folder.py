"""A run's folder explains itself: settings, versions, metrics, pool, checkpoints; and it takes no other run's files.

config.yaml         every setting
environment.json    versions and hardware
run.json            what makes this run this run: a folder of another is refused
metrics.jsonl       one JSON object a line, with `round` and `step`
pool/               every sample (see pool.py)
checkpoint-N/       resumable; `complete.json` is written last, so a torn one is known
model/              the finished model
results.json        the figures at the end
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout

from .errors import ConfigError
from .pool import written_whole

if TYPE_CHECKING:
    from .config import QuarkConfig

MARKER = "complete.json"
_PACKAGES = ("quark-lm", "torch", "transformers", "accelerate", "peft", "datasets", "numpy", "pyarrow", "tokenizers")


def finite(data: Any) -> Any:
    """The same data with null for what JSON does not know: NaN and the infinities."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    return [finite(value) for value in data] if isinstance(data, (list, tuple)) else data


def write_json(path: Path, data: Any) -> None:
    """Writes strict JSON whole or not at all; a figure that is no number becomes null."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(finite(data), indent=2, default=str, allow_nan=False) + "\n", encoding="utf-8")


# Fields of TrainingArguments that change what a run computes; of Quark's own all count but those below.
_COUNTING = (
    "seed", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args",
    "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "bf16", "fp16",
)  # fmt: skip
_NOT_COUNTING = (
    "preset", "num_rounds", "generation_batch_size", "loss_chunk_elements", "log_completions",
    "num_completions_to_print", "model_init_kwargs", "per_device_train_batch_size", "logging_steps", "save_strategy",
    "save_total_limit", "logging_nan_inf_filter", "remove_unused_columns", "dataloader_pin_memory", "report_to",
    "reward_retries", "max_failed_rewards", "ddp_find_unused_parameters", "eval_every",
    "early_stop", "reward_batch_size",
)  # fmt: skip


def counting_settings(args: QuarkConfig, total_batch: int) -> dict[str, Any]:
    """The settings without which a run would be another run: those that change its samples or its weights.

    total_batch: draws of one step, over ranks and micro-batches.
    """
    from .config import quark_fields

    told = args.to_dict()
    names = [name for name in (*quark_fields(), *_COUNTING) if name not in _NOT_COUNTING]
    out = {name: told[name] for name in dict.fromkeys(names) if name in told} | {"total_batch": total_batch}
    if str(told["lr_scheduler_type"]).split(".")[-1].lower() not in ("constant", "constant_with_warmup"):
        out["num_rounds"] = args.num_rounds  # the schedule ends with the run, so a longer run is another one
    return out


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder for this process. Raises: ConfigError when another process trains in it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"Another process trains in {folder} at this moment, and two would mix their samples. Wait for it, or"
            " choose another output_dir."
        ) from None
    try:
        yield
    finally:
        lock.release()


def claim(folder: Path, identity: dict[str, Any]) -> None:
    """Makes the folder this run's, or finds that it is already.

    A run that came to no samples (its reward failed, it was stopped at once) gives its folder away.

    Raises: ConfigError when the folder holds another run (naming what differs), or files of something else.
    """
    path = folder / "run.json"
    identity = json.loads(json.dumps(identity, default=str))
    if path.is_file():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise ConfigError(
                f"{path} is damaged, so it cannot be told whose run this is. Choose another output_dir."
            ) from None
        # what only one of the two names came with another version, and is no difference
        differing = [key for key in sorted(set(there) & set(identity)) if there[key] != identity[key]]
        if differing and not _has_samples(folder):
            for part in (*(folder / "pool").glob("*.partial.jsonl"), folder / "metrics.jsonl", folder / "train.yaml"):
                part.unlink(missing_ok=True)
            write_json(path, identity)
        elif differing:
            shown = "; ".join(f"{key}: {there.get(key)!r} there, {identity.get(key)!r} here" for key in differing[:3])
            raise ConfigError(
                f"{folder} holds another run ({shown}), whose samples and checkpoints would be mixed with this one's."
                " Choose another output_dir, or give that run's settings to go on with it."
            )
        return
    strangers = [p.name for p in folder.iterdir() if p.name in ("pool", "metrics.jsonl")] if folder.is_dir() else []
    if strangers:
        raise ConfigError(
            f"{folder} holds {strangers[0]}, but no run.json that says whose. Choose an empty output_dir."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, identity)


def _has_samples(folder: Path) -> bool:
    """Whether a folder holds a round or a checkpoint; one that cannot be read counts."""
    try:
        rounds = json.loads((folder / "pool" / "manifest.json").read_text(encoding="utf-8"))["rounds"]
    except FileNotFoundError:
        rounds = []
    except (OSError, ValueError, KeyError, TypeError):
        return True
    return bool(rounds) or last_checkpoint(folder)[0] is not None


def begun_dtype(folder: Path) -> str | None:
    """The dtype of the weights of the run that a folder holds, such as "bfloat16"; None where there is no run yet."""
    try:
        dtype = json.loads((folder / "run.json").read_text(encoding="utf-8")).get("dtype")
    except (OSError, ValueError, AttributeError):  # a damaged one is `claim`'s to report
        return None
    return dtype if isinstance(dtype, str) else None


def describe(folder: Path, config: dict[str, Any]) -> None:
    """Writes config.yaml and environment.json."""
    with written_whole(folder / "config.yaml") as temporary:
        temporary.write_text(
            yaml.safe_dump(json.loads(json.dumps(config, default=str)), sort_keys=False), encoding="utf-8"
        )
    write_json(folder / "environment.json", environment())


def environment() -> dict[str, Any]:
    """Versions of what a run depends on, and the hardware; no user or machine name."""
    import torch

    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": versions,
    }


def last_checkpoint(folder: str | Path) -> tuple[Path | None, list[Path]]:
    """(the newest complete checkpoint or None, the torn ones): a checkpoint is complete when its marker was written."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if path.is_dir() and number.isdigit():
            found.append((int(number), path))
    complete = [path for _, path in sorted(found) if (path / MARKER).is_file()]
    torn = [path for _, path in sorted(found) if not (path / MARKER).is_file()]
    return (complete[-1] if complete else None), torn


class MetricsFile:
    """metrics.jsonl, appended to line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        """Every line; the last one of a killed run may be torn, and is left out."""
        if not self.path.is_file():
            return []
        lines = []
        for text in self.path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
        return [line for line in lines if isinstance(line, dict)]

    def keep_until(self, step: int, before_round: int | None = None, measured: bool = True) -> None:
        """Drops the lines that a run which goes back to the checkpoint of this step writes again.

        Args:
            before_round: the round that begins at this step, if one does; its first line has this step too.
            measured: whether the checkpoint was written after the measurements at the end of the round before.
        """

        def stays(line: dict[str, Any]) -> bool:
            if line.get("untrained"):  # measured before the run began
                return True
            if line.get("step", 0) != step:
                return line.get("step", 0) < step
            if before_round is None:
                return "train_runtime" not in line  # what a stopped run said at its end
            if line.get("round", 0) >= before_round:
                return False
            return measured or "loss" in line

        if self.path.is_file():
            with written_whole(self.path) as temporary:
                kept = [json.dumps(line) for line in self.lines() if stays(line)]
                temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def append(self, metrics: dict[str, Any]) -> None:
        # JSON knows no NaN: a loss that is none becomes null
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(metrics), allow_nan=False) + "\n")
