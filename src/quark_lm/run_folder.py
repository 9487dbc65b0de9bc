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

import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError
from .pool import written_whole

MARKER = "complete.json"
_PACKAGES = ("quark-lm", "torch", "transformers", "accelerate", "peft", "datasets", "numpy", "pyarrow", "tokenizers")


def write_json(path: Path, data: Any) -> None:
    """Writes JSON whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")


def claim(folder: Path, identity: dict[str, Any]) -> None:
    """Makes the folder this run's, or finds that it is already.

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
        differing = [key for key in sorted(set(there) | set(identity)) if there.get(key) != identity.get(key)]
        if differing:
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

    def keep_until(self, step: int, before_round: int | None = None) -> None:
        """Drops the lines that a run which goes back to the checkpoint of this step writes again.

        before_round: the round that begins at this step, if one does; its first line has this step too.
        """
        if not self.path.is_file():
            return
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                told = json.loads(line)
                begins = before_round is not None and told.get("round", 0) >= before_round
                if told.get("step", 0) < step or (told.get("step", 0) == step and not begins):
                    lines.append(line)
            except ValueError:
                continue  # the last line of a killed run may be torn
        with written_whole(self.path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def append(self, metrics: dict[str, Any]) -> None:
        # JSON knows no NaN: a loss that is none becomes null
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")
