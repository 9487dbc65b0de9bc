"""A run of several processes: check that it can work, start them on this machine, agree with them, leave together.

Which of them explores what is exploring.py's job, how a sharded model goes forward policy.py's.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from .errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped]

    from .config import QuarkConfig

T = TypeVar("T")

CONFIGS = ("ddp", "fsdp2")


def launch(accelerate: str, num_processes: int | None, arguments: Sequence[str]) -> int:
    """Runs `quark ARGUMENTS` in several processes by `accelerate launch`, and gives their exit code.

    Args:
        accelerate: a config that ships here (`CONFIGS`), or a file of `accelerate config`.
        num_processes: None: one a GPU, or what the file says.

    Raises: ConfigError when there is no such config, or nothing to run several processes on.
    """
    if "LOCAL_RANK" in os.environ:
        raise ConfigError(
            "--accelerate starts processes, and this is one of several already (torchrun or accelerate launch). Leave"
            " --accelerate out there."
        )
    config = _config(accelerate)
    if accelerate in CONFIGS and num_processes is None:
        import torch

        num_processes = torch.cuda.device_count()
        if num_processes < 2:
            raise ConfigError(
                f"--accelerate {accelerate} is for several processes, one a GPU, and this machine has {num_processes}"
                " GPUs. Leave it out, or give --num_processes."
            )
    if num_processes is not None and num_processes < 2:
        raise ConfigError(f"--num_processes {num_processes} is no number of several processes. Give 2 or more.")
    from accelerate.commands.launch import launch_command, launch_command_parser  # type: ignore[import-untyped]
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    count = [] if num_processes is None else ["--num_processes", str(num_processes)]
    flags = ["--config_file", str(config), *count, *_port(config), "-m", "quark_lm.cli", *arguments]
    # it tells at length what each process has told in a line
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args(flags))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return int(failure.exitcode)
        raise RuntimeError(
            f"process {rank} was killed by {signal.Signals(-failure.exitcode).name}, so the others were stopped. Look"
            " for what killed it (memory?); the same command goes on."
        ) from None
    except subprocess.CalledProcessError as error:  # a file for one process
        if error.returncode > 0:  # which has told why in a line
            return int(error.returncode)
        raise RuntimeError(
            f"the process was killed by {signal.Signals(-error.returncode).name}. Look for what killed it (memory?);"
            " the same command goes on."
        ) from None
    except SignalException:  # each process was told, and has saved what was under way
        return 130
    except ValueError as error:
        raise ConfigError(f"--accelerate {accelerate} does not work: {error}") from error
    return 0


def _port(config: Path) -> list[str]:
    """The flag that takes a free port; none where all machines must know one, or the file names its own."""
    from accelerate.commands.config.config_args import load_config_from_file  # type: ignore[import-untyped]

    told = load_config_from_file(str(config))
    is_free = told.num_machines in (None, 1) and getattr(told, "main_process_port", None) is None
    return ["--main_process_port", "0"] if is_free else []


def _config(accelerate: str) -> Path:
    if accelerate.startswith("zero"):
        raise ConfigError(
            f"--accelerate {accelerate}: DeepSpeed is not supported. Use --accelerate fsdp2, which splits the same"
            " (weights, gradients, optimizer)."
        )
    if accelerate in CONFIGS:
        return Path(str(resources.files("quark_lm").joinpath(f"accelerate_configs/{accelerate}.yaml")))
    if not Path(accelerate).is_file():
        raise ConfigError(
            f"--accelerate {accelerate} is neither a file of `accelerate config` nor one of {', '.join(CONFIGS)}."
            " Choose one of them."
        )
    import yaml
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        load_config_from_file(accelerate)
    # what it says of a file that is no YAML, no mapping, or one without what it needs
    except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"--accelerate {accelerate} is no file of `accelerate config`: {error}. Let `accelerate config` write it,"
            f" or choose one of {', '.join(CONFIGS)}."
        ) from error
    return Path(accelerate)


def shard_on_cpu(accelerator: Accelerator, named: dict[str, Any] | None) -> None:
    """Makes FSDP work on CPUs when it was asked for: Accelerate 1.15 shards on GPUs only, and runs DDP in silence.

    named: the plugin's arguments; None: the environment says what accelerate launch was told.
    """
    from accelerate import PartialState
    from accelerate.utils import (  # type: ignore[import-untyped]
        DistributedType,
        FullyShardedDataParallelPlugin,
    )

    asked = named is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not asked or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin(**(named or {}))
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


def first_tells(find: Callable[[], T]) -> T:
    """What the function gives on the first process, for all of them: the others may see a file, or a clock, otherwise.

    Every process must call it.
    """
    import torch.distributed
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    is_initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not is_initialized and "LOCAL_RANK" not in os.environ:
        return find()
    state = PartialState()  # makes the group, where torchrun has started us and nothing has made it yet
    if state.num_processes == 1:
        return find()
    found: list[T | None] = [find() if state.is_main_process else None]
    broadcast_object_list(found)
    return found[0]  # type: ignore[return-value]


def leave() -> None:
    """Waits for all processes of the run and ends their group: one that left early would break a wait of another."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def end_after(run: Callable[[], int]) -> NoReturn:
    """Ends one of several processes with the code that the function gives, as sys.exit does, but leaves Python up.

    torch would abort one now and then, when all is done: a gloo thread that still frees the
    tensors of the last collective asks a Python that ends for its lock, which ends the thread within a destructor.
    """
    codes: list[int] = []

    def leave_at_once() -> None:
        if codes:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(codes[0])

    atexit.register(leave_at_once)  # the first one runs last: threads and the others' handlers have ended by then
    codes.append(run())
    sys.exit(codes[0])


def check_hardware(args: QuarkConfig) -> None:
    """Refuses what would go wrong in silence. Raises: ConfigError."""
    if args.n_gpu > 1:
        # DataParallel would run the loss on the first model and its own part of the batch
        args._n_gpu = 1
        warnings.warn(
            "Several GPUs are here, and one process uses the first alone. Start it with torchrun or accelerate launch"
            " to use all.",
            stacklevel=3,
        )
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ConfigError(
            "DeepSpeed is not supported: Quark's loss reads the head's weights in chunks, which ZeRO-3 takes apart. Use"
            " FSDP2, which splits weights, gradients and optimizer alike (--accelerate fsdp2)."
        )
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        _check_fsdp(args.fsdp_plugin_args or {})
        if args.parallel_mode.value != "distributed":
            raise ConfigError(
                "FSDP splits a model between processes, and this process is alone. Start several by --accelerate fsdp2"
                " or by torchrun, or leave fsdp out."
            )


def _check_fsdp(named: dict[str, Any]) -> None:
    """named: what fsdp_config says; the rest stands in the environment, where accelerate launch puts its own."""

    def told(name: str, default: str) -> str:
        return str(named.get(name, os.environ.get(f"FSDP_{name.removeprefix('fsdp_')}".upper(), default))).lower()

    if told("fsdp_version", "1") != "2":
        raise ConfigError("FSDP1 is not supported. Set fsdp_version: 2, or use --accelerate fsdp2.")
    if "true" in (told("cpu_offload", "false"), told("offload_params", "false")):
        raise ConfigError(
            "FSDP would keep the weights on the CPU, where Quark would look for the model. Set fsdp_offload_params:"
            " false; with an adapter (use_peft) less memory is needed."
        )
    if told("cpu_ram_efficient_loading", "false") == "true":
        raise ConfigError(
            "FSDP would load the weights on the first process alone, and Quark looks at them on each. Set"
            " fsdp_cpu_ram_efficient_loading: false."
        )
