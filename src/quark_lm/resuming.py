"""How a run goes on: what makes it this run, the checkpoint that fits it, and the figures where that one left them."""

from __future__ import annotations

import contextlib
import io
import pickle
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from . import loading
from .errors import ConfigError, ModelError, PoolError
from .files import checksum, first_line, parsed
from .packaged import base_name
from .policy import causal_lm
from .processes import first_tells
from .run_folder import counting_settings, read_marker

if TYPE_CHECKING:
    from .trainer import QuarkTrainer


def identity(trainer: QuarkTrainer) -> dict[str, Any]:
    """What makes this run this run."""

    def told(texts: Sequence[str], columns: dict[str, list[Any]] | None = None) -> str:
        crc = 0
        for text in (*texts, repr(sorted((columns or {}).items()))):  # the rewards may read the other columns
            crc = zlib.crc32(text.encode(), crc)
        return f"{len(texts)}, crc {crc}"

    held_out, options = trainer.eval_prompts, trainer.args.model_init_kwargs
    return {
        **counting_settings(trainer.args, trainer.get_total_train_batch_size(trainer.args)),
        "model": base_name(trainer.model),
        "revision": options.get("revision") if isinstance(options, dict) else None,
        "dtype": str(causal_lm(trainer.model).dtype).removeprefix("torch."),
        "adapter": loading.adapter_identity(trainer.model),
        "reward_tokens": list(trainer.reward_tokens.texts),
        "reward_funcs": trainer.rewards.names,
        "scorers": trainer.rewards.told,  # a name does not say which server, file or activation it is
        "prompts": told(trainer.prompts.texts, trainer.prompts.columns),
        "eval_prompts": told(held_out.texts, held_out.columns) if held_out else None,
        "eval_reward_funcs": trainer.eval_rewards.names if trainer.eval_rewards else [],
        "eval_scorers": trainer.eval_rewards.told if trainer.eval_rewards else [],
        "initial_pool": told(trainer.initial_pool.told) if trainer.initial_pool is not None else None,
    }


def digest(trainer: QuarkTrainer) -> int:
    """Of what run.json says and of the samples: two runs that had one folder after another differ in it."""
    told = parsed((trainer.folder / "run.json").read_bytes())
    return checksum({"run": told, "pool": trainer.open_pool().hashes()})


def check_sharding(trainer: QuarkTrainer, checkpoint: Path) -> None:
    """Raises: ConfigError for a checkpoint whose optimizer only the other kind of run can read."""
    sharded = any(checkpoint.glob("pytorch_model_fsdp*"))
    if sharded != trainer.is_fsdp_enabled:
        raise ConfigError(
            f"{checkpoint} was written {'with' if sharded else 'without'} FSDP, and this run goes"
            f" {'without' if sharded else 'with'} it, so that it could not read the optimizer's state. Go on as the"
            " run was begun."
        )


def check_pool(trainer: QuarkTrainer, checkpoint: str | Literal[False]) -> None:
    """Raises: PoolError when the pool on disk is not as the run wrote it, or not the one of the checkpoint."""
    pool = trainer.open_pool()
    if trainer.is_world_process_zero():
        pool.verify()
    marker = read_marker(Path(checkpoint)) if checkpoint else None
    if marker is not None:
        saw = marker.get("pool_sha256", [])
        if pool.hashes()[: len(saw)] != saw:
            raise PoolError(
                f"{checkpoint} saw another pool than the one in {pool.folder}, so its next losses would be of other"
                " samples. Give a checkpoint of this run, or put its pool back."
            )


def go_on_from(trainer: QuarkTrainer, checkpoint: str | Literal[False]) -> None:
    """Takes up the figures where the checkpoint was written, and says so."""
    args = trainer.args
    marker: dict[str, Any] = {"step": -1}
    if checkpoint:
        told = read_marker(Path(checkpoint))
        assert told is not None  # `train` takes no other checkpoint
        marker = told
    step, measured = marker["step"], marker.get("measured", True)
    trainer._saved_at = step
    round, inside = divmod(step, args.steps_per_round)
    trainer._owed = round - 1 if checkpoint and not inside and not measured else None
    trainer._sums.zero_()
    if trainer.is_world_process_zero():
        trainer._sums += torch.tensor(marker.get("sums", [0.0] * 6), dtype=torch.float64)
        before = None if inside else round
        trainer.metrics_file.keep_until(step, before, measured or bool(inside), marker.get("metrics"))
    else:  # the steps are counted by each rank, the rest was summed up over all
        trainer._sums[5] = marker.get("sums", [0.0] * 6)[5]
    if checkpoint:
        max_steps = args.num_rounds * args.steps_per_round
        lines = first_tells(trainer.metrics_file.lines)  # which rank 0 has just cut
        last = {k: v for line in lines if line.get("round") == round - 1 for k, v in line.items()}
        stopped_early = args.early_stop and marker.get("stops_early")
        if stopped_early or (trainer._owed is not None and trainer._nothing_new(last)):
            max_steps = step  # the run ended here: what is left is to measure it
            args.num_train_epochs = round
        elif step > max_steps:
            raise ConfigError(
                f"num_rounds={args.num_rounds} ends at step {max_steps}, but the run in {trainer.folder} is at step"
                f" {step} already."
                f" Give num_rounds={-(-step // args.steps_per_round)} or more, or another output_dir."
            )
        trainer._is_finished = step >= max_steps and trainer._owed is None
        what = "is finished" if trainer._is_finished else f"goes on in round {min(round + 1, args.num_rounds)}"
        trainer.display.line(
            f"The run in {trainer.folder} {what}: {Path(checkpoint).name} holds step {step} of {max_steps}."
        )


@contextlib.contextmanager
def no_pickles(checkpoint: str | Literal[False]) -> Iterator[None]:
    """Within it, a checkpoint that holds more than tensors is one clear error. Raises: ModelError."""
    try:
        yield
    except pickle.UnpicklingError as error:
        if not checkpoint:  # somebody else's, such as a callback's
            raise
        raise ModelError(
            f"A file in {checkpoint} is damaged or holds other things than tensors, and was not loaded"
            f" ({first_line(error)}): unpickling can run a stranger's code. Delete that checkpoint: the run goes on"
            " from the one before."
        ) from error


# All that a `.metadata` of torch.distributed.checkpoint names, beside the dtypes. None of it does more than hold values
_METADATA = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}  # fmt: skip


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if is_dtype or (module, name) in _METADATA:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint's metadata")


def check_sharded_files(checkpoint: Path) -> None:
    """Finds in a checkpoint in parts what torch.distributed.checkpoint would unpickle without a look at it.

    That is each `.metadata`, and what is no tensor in the files that it lists, such as the optimizer's settings.

    Raises: pickle.UnpicklingError when they hold anything else than plain values.
    """
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

    for path in sorted(checkpoint.rglob("*")):
        if path.is_symlink():  # what it leads to would be read, and is not looked at here
            raise pickle.UnpicklingError(f"{path} is a link")
        if not path.name.endswith(".metadata"):
            continue
        try:
            metadata = _Metadata(io.BytesIO(path.read_bytes())).load()
            kinds = [type(part) for part in (metadata, metadata.state_dict_metadata, metadata.storage_data)]
            if kinds != [Metadata, dict, dict]:  # others could show torch something else than this loop
                raise TypeError(f"its parts are {kinds}")
            for name, kind in metadata.state_dict_metadata.items():
                if not isinstance(kind, BytesStorageMetadata):
                    continue  # a tensor, which torch loads as one
                place = metadata.storage_data[MetadataIndex(name)]
                if place.transform_descriptors:  # what is unpacked would not be what is looked at here
                    raise ValueError(f"{name} is packed")
                with (path.parent / place.relative_path).open("rb") as file:
                    file.seek(place.offset)
                    torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
        except Exception as error:  # bytes that are no such pickle raise anything
            raise pickle.UnpicklingError(f"{path}: {error}") from error


def random_state() -> tuple[Any, ...]:
    """Of the random numbers that a checkpoint holds."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda  # noqa: NPY002


def set_random_state(state: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
