"""A run's folder explains itself: settings, versions, metrics, pool, checkpoints; and it takes no other run's files.

config.yaml         every setting
environment.json    versions and hardware
run.json            what makes this run this run: a folder of another is refused
metrics.jsonl       one JSON object a line, with `round` and `step`
pool/               every sample (see pool.py)
held-out.partial/   what is measured of held-out prompts, until a checkpoint holds their figures
checkpoint-N/       resumable; written in checkpoint.partial/, marked by `complete.json`, and only then put here
model/              the finished model
results.json        the figures at the end
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from .errors import ConfigError, DataError, QuarkError, TrainingError
from .files import CHECK, append_line, checksum, first_line, parsed, sha256, written_whole

if TYPE_CHECKING:
    from .config import QuarkConfig

MARKER = "complete.json"
HELD_OUT = "held-out.partial"  # the folder in which held-out prompts are kept while they are measured
UNFINISHED = "checkpoint.partial"  # the folder in which a checkpoint is written
# Errors by which torch and safetensors, which know no OSError, tell that a file could not be written.
_REFUSED = ("No space left", "File too large", "quota exceeded", "file write failed", "Read-only file system",
            "PytorchStreamWriter failed", "unexpected pos", "Input/output error")  # fmt: skip
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# may be told of a file that is only read
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)
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
    "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "bf16", "fp16", "neftune_noise_alpha",
)  # fmt: skip
_NOT_COUNTING = (
    "preset", "num_rounds", "generation_batch_size", "loss_chunk_elements", "log_completions",
    "num_completions_to_print", "model_init_kwargs", "per_device_train_batch_size", "logging_steps", "save_strategy",
    "save_total_limit", "logging_nan_inf_filter", "remove_unused_columns", "dataloader_pin_memory", "report_to",
    "reward_retries", "max_failed_rewards", "ddp_find_unused_parameters", "eval_every",
    "early_stop", "reward_batch_size", "vllm_mode", "vllm_server_base_url", "vllm_server_timeout", "vllm_group_port",
    "vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "vllm_max_model_length", "vllm_enable_sleep_mode",
)  # fmt: skip

# What round 0's completions, which the model draws as it came, do not depend on.
_AFTER_SAMPLING = {
    *_COUNTING, "reward_funcs", "scorers", "reward_weights", "eval_prompts", "eval_reward_funcs", "eval_scorers",
    "num_eval_generations", "total_batch", "num_rounds", "steps_per_round", "prompts_per_round", "explore_strength",
    "explore_token", "quantile_scope", "pool_window", "draw", "best_share", "heldout_share", "meaning_rows",
    "token_dropout", "beta", "kl_direction", "entropy_coef", "mask_reward_tokens",
} - {"seed", "bf16", "fp16"}  # fmt: skip
_SCORING = {"reward_funcs", "scorers", "reward_weights"}


def counting_settings(args: QuarkConfig, total_batch: int) -> dict[str, Any]:
    """The settings without which a run would be another run: those that change its samples or its weights.

    total_batch: draws of one step, over ranks and micro-batches.
    """
    from .config import quark_fields

    told = args.to_dict()
    names = [name for name in (*quark_fields(), *_COUNTING) if name not in _NOT_COUNTING]
    out = {name: told[name] for name in dict.fromkeys(names) if name in told} | {"total_batch": total_batch}
    if args.draw != "ends":
        out.pop("best_share", None)  # it draws nothing
    if str(told["lr_scheduler_type"]).split(".")[-1].lower() not in ("constant", "constant_with_warmup"):
        out["num_rounds"] = args.num_rounds  # the schedule ends with the run, so a longer run is another one
    return out


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Within it, a disk that refuses a file is one clear error. Raises: TrainingError."""
    try:
        yield
    except QuarkError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = refusal(error, folder)
        if reason is None:
            raise
        outside = _outside(error, folder)
        what = f"{outside} could not be written" if outside else f"A file could not be written to {folder}"
        raise TrainingError(
            f"{what} ({reason}). Make room or mend the folder's rights and"
            " give the same command again: it goes on from what is saved, and nothing half-written is used."
        ) from error


def refusal(error: OSError | RuntimeError | SafetensorError, folder: Path) -> str | None:
    """How a disk refused to write a file of the folder, or any file where there is no room; None for another error."""
    if isinstance(error, OSError):
        outside = _outside(error, folder)
        if outside is None:
            is_ours = error.filename is not None
        else:  # a folder above it may be what refuses
            is_ours = Path(os.path.abspath(folder)).is_relative_to(outside)
        by_the_disk = error.errno in _FULL or (error.errno in _CLOSED and is_ours)
    else:
        by_the_disk = any(words in str(error) for words in _REFUSED)
    if not by_the_disk:
        return None
    # torch tells of bytes and positions in its own code
    return "the disk is full, or refuses it" if "enforce fail" in str(error) else first_line(error)


def _outside(error: Exception, folder: Path) -> str | None:
    """The file that an error names, when it lies outside the folder."""
    name = getattr(error, "filename", None)
    if not isinstance(name, (str, bytes, os.PathLike)):
        return None
    path = Path(os.path.abspath(os.fsdecode(name)))
    return None if path.is_relative_to(os.path.abspath(folder)) else str(path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder for this process, which may hold it already.

    Raises: ConfigError when another process trains in it.
    """
    lock = FileLock(folder.absolute() / ".lock", timeout=0, is_singleton=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"Another process trains in {folder} at this moment, and two would mix their samples. Wait for it, or"
            " choose another output_dir."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"Nothing can be written in {folder} ({first_line(error)}), and a run keeps its files there. Mend that, or"
            " choose another output_dir."
        ) from error
    try:
        yield
    finally:
        lock.release()


def claim(folder: Path, identity: dict[str, Any]) -> None:
    """Makes the folder this run's, or finds that it is already.

    A run that came to no samples (it was stopped at once) gives its folder away; one that came to no round (its reward
    failed) too, with its samples, to a run that would draw the same ones.

    Raises: ConfigError when the folder holds another run (naming what differs), or files of something else.
    """
    from .pool import PartialRound

    path = folder / "run.json"
    identity = json.loads(json.dumps(identity, default=str))
    if path.is_file():
        try:
            there = parsed(path.read_bytes())
            if not isinstance(there, dict) or not set(there) & set(identity):
                raise ValueError
        except (OSError, ValueError):
            raise ConfigError(
                f"{path} is damaged, so it cannot be told whose run this is. Restore it from a copy, or choose another"
                " output_dir."
            ) from None
        if there.get("explore_token") == "<EXPLORE_TOKEN>":
            there["explore_token"] = identity.get("explore_token")  # it was hidden, as if it were a secret
        if there.get("draw") == "ends":
            there.setdefault("best_share", 0.5)  # before there was such a field
        # what only one of the two names came with another version, and is no difference
        differing = [key for key in sorted(set(there) & set(identity)) if there[key] != identity[key]]
        begun = _begun(folder)
        if differing and not has_round(folder) and (not begun or set(differing) <= _AFTER_SAMPLING):
            for part in (folder / "metrics.jsonl", folder / "train.yaml"):
                part.unlink(missing_ok=True)
            shutil.rmtree(folder / HELD_OUT, ignore_errors=True)
            for journal in (folder / "pool").glob("*.partial.jsonl"):
                if not begun:
                    journal.unlink()
                elif _SCORING & set(differing) and (num := PartialRound.forget_scores(journal)):
                    warnings.warn(
                        f"{num:,} samples that were kept in {folder} are scored by the other reward.", stacklevel=4
                    )
            measured = {key: there[key] for key in ("generation_rows", "scorer_dtypes") if begun and key in there}
            write_json(path, {**measured, **identity})
        elif differing:
            shown = "; ".join(f"{key}: {there.get(key)!r} there, {identity.get(key)!r} here" for key in differing[:3])
            raise ConfigError(
                f"{folder} holds another run ({shown}), whose samples and checkpoints would be mixed with this one's."
                " Choose another output_dir, or give that run's settings to go on with it."
            )
        return
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    strangers = [name for name in ("pool", "metrics.jsonl", HELD_OUT) if name in there]
    if strangers:
        raise ConfigError(
            f"{folder} holds {strangers[0]}, but no run.json that says whose. Choose an empty output_dir."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, identity)


def _begun(folder: Path) -> bool:
    """Whether a folder holds samples of a round that is not finished."""
    journals = (folder / "pool").glob("*.partial.jsonl")
    return any(path.read_bytes().count(b"\n") > 1 for path in journals)  # the first line holds no sample


def _has_scores(folder: Path) -> bool:
    """Whether a folder holds rewards of a round that is not finished."""
    return any(b'"rewards"' in path.read_bytes() for path in (folder / "pool").glob("*.partial.jsonl"))


def has_round(folder: Path) -> bool:
    """Whether a folder holds a round or a checkpoint; what cannot be read counts."""
    try:
        rounds = parsed((folder / "pool" / "manifest.json").read_bytes())["rounds"]
    except FileNotFoundError:
        rounds = []
    except (OSError, ValueError, KeyError, TypeError):
        return True
    return bool(rounds) or last_checkpoint(folder)[0] is not None


def fixed_rows(folder: Path, fitting: int) -> int:
    """Rows of a generation batch for the whole run that a folder holds: those that fitted when it was begun."""
    return _fixed(folder, "generation_rows", lambda there: there if type(there) is int and there >= 1 else fitting)


def fixed_dtypes(folder: Path, measured: dict[str, str]) -> dict[str, str]:
    """In what each scorer computes for the whole run that a folder holds: what was faster when it was begun."""

    def dtypes(there: Any) -> dict[str, str]:
        known = there if isinstance(there, dict) else {}
        return {n: known[n] if known.get(n) in ("float32", "bfloat16") else measured[n] for n in measured}

    return _fixed(folder, "scorer_dtypes", dtypes)


def _fixed(folder: Path, key: str, choose: Callable[[Any], Any]) -> Any:
    """What run.json keeps for the whole run: `choose` gets what is there, None the first time."""
    path = folder / "run.json"
    told = parsed(path.read_bytes())
    chosen = choose(told.get(key))
    if chosen != told.get(key):
        write_json(path, {**told, key: chosen})
    return chosen


def warn_of_other_sources(folder: Path, sources: dict[str, str | None]) -> None:
    """Keeps how each reward function is written, and warns of one that was written otherwise when the run began.

    It is the same run all the same: a mended function goes on with what was scored before.
    """
    path = folder / "run.json"
    told = parsed(path.read_bytes())
    there = told.get("reward_sources")
    if not isinstance(there, dict) or not (has_round(folder) or _has_scores(folder)):
        write_json(path, {**told, "reward_sources": sources})
        return
    changed = [name for name, source in sources.items() if there.get(name, source) != source]
    if changed:
        warnings.warn(
            f"{', '.join(changed)} is written otherwise, or given other values, than when the run in {folder} began,"
            " whose samples keep the rewards that they got. For a run by the new one choose another output_dir.",
            stacklevel=4,
        )


def check_folder(folder: Path) -> None:
    """Raises: ConfigError when a run cannot be written there; makes nothing."""
    # os.path: a Path's own raises where a folder above may not be entered
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    if not above.is_dir():
        what = "is a file" if above == folder.absolute() else f"lies in {above}, which is a file"
        raise ConfigError(f"output_dir={folder} {what}, and results need a folder of their own. Name another one.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir={folder}: nothing may be written in {above}. Name another folder, or mend that.")


def begun_dtype(folder: Path) -> str | None:
    """The dtype of the weights of the run that a folder holds, such as "bfloat16"; None where there is no run yet."""
    dtype = _recorded(folder, "dtype")
    return dtype if dtype in ("bfloat16", "float32", "float16") else None


def begun_revision(folder: Path) -> str | None:
    """Of the model that the run of a folder began with; None where none was named, or there is no run."""
    revision = _recorded(folder, "revision")
    return revision if isinstance(revision, str) else None


def _recorded(folder: Path, name: str) -> Any:
    try:
        return parsed((folder / "run.json").read_bytes()).get(name)
    except (OSError, ValueError, AttributeError):  # a damaged one is `claim`'s to report
        return None


def describe(folder: Path, config: dict[str, Any]) -> None:
    """Writes config.yaml and environment.json."""
    with written_whole(folder / "config.yaml") as temporary:
        temporary.write_text(
            yaml.safe_dump(without_secrets(json.loads(json.dumps(config, default=str))), sort_keys=False),
            encoding="utf-8",
        )
    write_json(folder / "environment.json", environment())


def without_secrets(config: Any) -> Any:
    """The settings, but for what a key that ends with `token` holds: `model_init_kwargs` may name a hub's."""
    if isinstance(config, list):
        return [without_secrets(value) for value in config]
    if not isinstance(config, dict):
        return config
    secret = {key for key in config if str(key).endswith("token")} - {"explore_token"}  # a choice of two words
    return {
        key: "(hidden)" if key in secret and isinstance(value, str) else without_secrets(value)
        for key, value in config.items()
    }


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
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": versions,
    }


def hardware() -> str:
    """The GPU's name, else the processor's."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "") or (
        platform.processor() or platform.machine()
    )


def write_marker(checkpoint: Path, marker: dict[str, Any]) -> None:
    """Writes `complete.json`, which says that all else is there."""
    marker = finite(marker)
    write_json(checkpoint / MARKER, {**marker, CHECK: checksum(marker)})


def read_marker(checkpoint: Path) -> dict[str, Any] | None:
    """What `complete.json` holds; None when it was not written, or is damaged."""
    try:
        marker = parsed((checkpoint / MARKER).read_bytes())
        check = marker.pop(CHECK, None)
        kinds = {"pool_sha256": list, "step": int, "files": dict, "metrics": list, "sums": list}
        is_whole = all(isinstance(marker[key], kind) for key, kind in kinds.items() if key in marker or key == "step")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return marker if is_whole and check in (None, checksum(marker)) else None


def put_in_place(written: Path, path: Path, marker: dict[str, Any]) -> None:
    """Marks a checkpoint that lies written beside its place, and renames it to `path`."""
    digests = file_digests(written)
    for name in digests:
        with (written / name).open("rb") as file:
            os.fsync(file.fileno())  # older ones are deleted next
    write_marker(written, {**marker, "files": digests})
    if path.exists():  # a torn or damaged one, or one of the steps that the run has gone back on
        _remove(path)
    os.replace(written, path)
    with suppress(OSError):  # something else may lie in it
        written.parent.rmdir()


def rotate(folder: Path, limit: int | None, kept: Sequence[str]) -> None:
    """Deletes torn checkpoints, and of the whole ones above the limit the oldest whose names are not in `kept`."""
    if limit is None or limit <= 0:
        return
    torn = last_checkpoint(folder)[1]
    whole = [path for path in _checkpoints(folder) if path not in torn]
    spare = [path for path in whole if path.name not in kept]
    for path in [*torn, *spare[: max(0, len(whole) - limit)]]:
        _remove(path)


def _remove(checkpoint: Path) -> None:
    (checkpoint / MARKER).unlink(missing_ok=True)  # first: what a kill leaves of it must not pass for whole
    shutil.rmtree(checkpoint, ignore_errors=True)


def file_digests(checkpoint: Path) -> dict[str, str]:
    """The SHA-256 of each file of a checkpoint but its marker."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path != checkpoint / MARKER]
    return {path.relative_to(checkpoint).as_posix(): sha256(path) for path in files}


def what_is_wrong(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be gone on with, or None: each of its files is as the run wrote it."""
    marker = read_marker(checkpoint)
    if marker is None:
        damaged = (checkpoint / MARKER).is_file()
        return f"is not whole (its {MARKER} is damaged)" if damaged else "was not finished when its run stopped"
    written = marker.get("files", {})  # an older version wrote none
    there = file_digests(checkpoint) if written else {}
    for name, digest in written.items():
        if there.get(name) != digest:
            return f"is not whole (its {name} is {'not what the run wrote' if name in there else 'gone'})"
    return None


def last_whole_checkpoint(folder: str | Path) -> tuple[Path | None, dict[Path, str]]:
    """(the newest checkpoint whose files are as they were written or None, why each newer or torn one is not it)."""
    wrong = {path: what_is_wrong(path) or "" for path in last_checkpoint(folder)[1]}
    for path in _checkpoints(Path(folder) / UNFINISHED):
        wrong[path] = what_is_wrong(path) or "was not put in its place when its run stopped"
    for path in reversed(_checkpoints(folder)):
        if path not in wrong:
            reason = what_is_wrong(path)
            if reason is None:
                return path, wrong
            wrong[path] = reason
    return None, wrong


def last_checkpoint(folder: str | Path) -> tuple[Path | None, list[Path]]:
    """(the newest complete checkpoint or None, the torn ones): a checkpoint is complete when its marker was written."""
    found = _checkpoints(folder)
    complete = [path for path in found if read_marker(path) is not None]
    return (complete[-1] if complete else None), [path for path in found if path not in complete]


def _checkpoints(folder: str | Path) -> list[Path]:
    """By their steps."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if path.is_dir() and number.isdigit():
            found.append((int(number), path))
    return [path for _, path in sorted(found)]


class MetricsFile:
    """metrics.jsonl, appended to line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        """Every line; the last one of a killed run may be torn, and is left out. Raises: DataError for another."""
        if not self.path.is_file():
            return []
        lines = []
        whole = self.path.read_bytes().split(b"\n")
        for number, text in enumerate(whole, 1):
            if not text.strip():
                continue
            try:
                line = parsed(text)
                if not isinstance(line, dict):
                    raise ValueError
                if not all(isinstance(line.get(name, 0), int) for name in ("round", "step")):
                    raise ValueError
                lines.append(line)
            except ValueError:
                if number < len(whole):
                    raise DataError(
                        f"{self.path}, line {number}, is damaged. Restore the file from a copy; or delete it: the run"
                        " then goes on, without the figures of what is done."
                    ) from None
        return lines

    def kept(self, step: int, before_round: int | None = None, measured: bool = True) -> str:
        """The lines that stay when a run goes back to the checkpoint of this step; it writes the others again.

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

        return "".join(f"{json.dumps(line)}\n" for line in self.lines() if stays(line))

    def keep_until(
        self, step: int, before_round: int | None = None, measured: bool = True, digest: Sequence[Any] | None = None
    ) -> None:
        """Drops what `kept` leaves out.

        digest: as `kept_digest` gave it when the checkpoint was written; lines may have followed.
        Raises: DataError when it is another one.
        """
        if not self.path.is_file():
            if digest is not None:
                warnings.warn(
                    f"{self.path} is gone: the run goes on without the figures of what is done.", stacklevel=3
                )
            return
        kept = self.kept(step, before_round, measured)
        if digest is not None and digest[1] != hashlib.sha256(kept[: digest[0]].encode()).hexdigest():
            raise DataError(
                f"{self.path} is not the file that the run wrote up to step {step} (its hash differs). Restore it from"
                " a copy; or delete it: the run then goes on, without the figures of what is done."
            )
        with written_whole(self.path) as temporary:
            temporary.write_text(kept, encoding="utf-8")

    def kept_digest(self, step: int, before_round: int | None = None, measured: bool = True) -> tuple[int, str]:
        """(the length, the SHA-256) of `kept`."""
        kept = self.kept(step, before_round, measured)
        return len(kept), hashlib.sha256(kept.encode()).hexdigest()

    def append(self, metrics: dict[str, Any]) -> None:
        # JSON knows no NaN: a loss that is none becomes null
        append_line(self.path, json.dumps(finite(metrics), allow_nan=False))
