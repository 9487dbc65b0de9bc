"""Reward functions: ours by name, any classifier, any function with TRL's signature. Importing this imports no torch.

A reward function is called with keywords only (`prompts, completions, completion_ids`, every other dataset column,
`trainer_state, log_extra, log_metric`) and returns a float or None for each completion; None is no reward. Calling
them, and what may go wrong then, is runner.py's job.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from quark_lm.errors import ConfigError
from quark_lm.shown import url_shown

__all__ = ["NAMED_REWARDS", "load_reward"]

RewardFunction = Callable[..., Any]

# name: the file of this folder, and the function in it that makes the reward
NAMED_REWARDS = {
    "sentiment": ("sentiment", "sentiment_reward"),
    "sentiment-independent": ("sentiment", "sentiment_independent"),
    "toxicity": ("toxicity", "toxicity_reward"),
    "toxicity-independent": ("toxicity", "toxicity_independent"),
    "repetition": ("repetition", "repetition_reward"),
    "classifier": ("classifier", "classifier_reward"),
    "http": ("http", "http_reward"),
}


def load_reward(spec: str | RewardFunction | Any, *, processing_class: Any = None, **options: Any) -> RewardFunction:
    """The reward function that `spec` names.

    >>> load_reward("sentiment", label="negative")          # one of NAMED_REWARDS
    >>> load_reward("sentiment(label=negative)")            # the same in one string, for YAML and the command line
    >>> load_reward("classifier(model=unitary/toxic-bert, label=toxic, activation=sigmoid, minimize=true)")
    >>> load_reward("http://127.0.0.1:8000/score")          # a server that scores (see http.py)
    >>> load_reward("http(url=http://127.0.0.1:8000/score, cache=scores.sqlite3, timeout=5)")
    >>> load_reward("my_rewards:short")                     # a function of a module, importable from here
    >>> load_reward("rewards/mine.py:short")                # a function of a file
    >>> load_reward("Skywork/Skywork-Reward-V2-Qwen3-0.6B") # a model id or folder: one logit of prompt and completion,
    #                                                         as in TRL
    >>> load_reward(my_function)                            # as it is

    Args:
        spec: as above, or a loaded sequence-classification model.
        processing_class: the tokenizer of a reward model, its own if None; other rewards have none, and it is left
            unread.
        options: arguments of the named reward (see its function), or of `classifier.model_reward`.
    Raises: ConfigError for a name, function or option that does not exist, naming the near one; ModelError, RewardError
        from the reward's own loading.
    """
    if not isinstance(spec, str | Path):
        return _from_object(spec, processing_class, options)
    name, options = _split_options(str(spec).strip(), options)
    if name.startswith(("http://", "https://")):
        name, options = "http", {"url": name, **options}
    if name in NAMED_REWARDS:
        file, function_name = NAMED_REWARDS[name]
        factory = getattr(importlib.import_module(f"{__name__}.{file}"), function_name)
        if name == "classifier" and processing_class is not None:
            options = {"processing_class": processing_class, **options}
        return _made(factory, name, options)
    module, colon, function = name.rpartition(":")
    if colon and not os.path.exists(name):
        if module in NAMED_REWARDS:
            option = "url" if module == "http" else "label"
            raise ConfigError(f"reward {name!r}: options go in brackets. Write {module}({option}={function}).")
        if options:
            raise ConfigError(
                f"reward {name!r} is a function and takes no options. Set {', '.join(options)} inside it."
            )
        return _from_module(module, function)
    if "/" not in name and not os.path.exists(name):
        near = difflib.get_close_matches(name.lower(), NAMED_REWARDS, n=1)
        if near:
            raise ConfigError(
                f"There is no reward named {name!r}. Did you mean {near[0]!r}? "
                "Other rewards are a model id (owner/name) or module:function."
            )
        if not re.fullmatch(r"[\w.-]+", name):
            raise ConfigError(
                f"reward {name!r} is no name, model id or module:function. The names are {', '.join(NAMED_REWARDS)}."
            )
    from quark_lm.rewards.classifier import model_reward

    return _made(model_reward, name, {"model": name, "processing_class": processing_class, **options})


def _from_object(spec: Any, processing_class: Any, options: dict[str, Any]) -> RewardFunction:
    torch = sys.modules.get("torch")  # a model can only be given by who has imported torch
    if torch is not None and isinstance(spec, torch.nn.Module):
        from quark_lm.rewards.classifier import model_reward

        return _made(
            model_reward, type(spec).__name__, {"model": spec, "processing_class": processing_class, **options}
        )
    if not callable(spec):
        raise ConfigError(
            f"A reward is {repr(spec)[:60]}, which cannot be called. "
            f"Give a function, a name ({', '.join(NAMED_REWARDS)}), a model id, or module:function."
        )
    if options:
        raise ConfigError(f"The reward is a function already and takes no options. Set {', '.join(options)} inside it.")
    return spec


def _split_options(spec: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """ "name(key=value, ...)" as name and options; values are Python literals, true, false, none, or else text.

    Quotes hold a value with a comma together.
    """
    # a model's name or folder too: "owner/name(revision=...)"; and a server: "http://host/score(timeout=5)"
    match = re.fullmatch(r"(https?://[^()]+|[\w./~-]+)\((.*)\)", spec)
    if match is None or os.path.exists(spec):
        return spec, dict(options)
    written: dict[str, Any] = {}
    for part in filter(None, map(str.strip, re.findall(r"""(?:[^,'"]|'[^']*'|"[^"]*"|['"])+""", match[2]))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key.isidentifier():
            shown = url_shown(match[1])
            raise ConfigError(
                f"reward {shown!r}: {url_shown(part)!r} sets nothing. Write options as key=value, key=value."
            )
        read = _value(value)
        # a revision "1.0" is no number
        written[key] = value if key in _TEXTS and not isinstance(read, str | None) else read
    return match[1], {**written, **options}


_TEXTS = ("model", "revision", "url", "cache")  # options that are text, whatever it looks like


def _value(text: str) -> Any:
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _made(factory: Callable[..., RewardFunction], name: str, options: dict[str, Any]) -> RewardFunction:
    """The reward that a factory makes with these options, each checked by name."""
    signature = inspect.signature(factory)
    for option in options:
        if option not in signature.parameters:
            near = difflib.get_close_matches(option, signature.parameters, n=1)
            known = ", ".join(signature.parameters) or "none"
            raise ConfigError(
                f"reward {name!r} has no option {option!r}{f', did you mean {near[0]!r}?' if near else '.'} "
                f"It has: {known}."
            )
    missing = [p.name for p in signature.parameters.values() if p.default is p.empty and p.name not in options]
    if missing:
        example = ", ".join(f"{option}=..." for option in missing)
        raise ConfigError(f"reward {name!r} needs {' and '.join(missing)}. Write {name}({example}).")
    return factory(**options)


def _from_module(module_name: str, function_name: str) -> RewardFunction:
    spec = f"{module_name}:{function_name}"
    module = (
        _module_of_file(Path(module_name), spec) if module_name.endswith(".py") else _module_by_name(module_name, spec)
    )
    try:
        function = getattr(module, function_name)
    except AttributeError:
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        near = difflib.get_close_matches(function_name, public, n=1)
        advice = f"Did you mean {near[0]!r}?" if near else f"It has: {', '.join(public) or 'no function'}."
        raise ConfigError(f"reward {spec!r}: {module_name} has no {function_name!r}. {advice}") from None
    if not callable(function):
        raise ConfigError(f"reward {spec!r} is {repr(function)[:60]}, which cannot be called. Name a function.")
    return function


def _module_by_name(name: str, spec: str) -> ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # an installed command does not look where it is called
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"reward {spec!r}: {name} imports {error.name}, which is not installed. Install it."
            ) from error
        raise ConfigError(
            f"reward {spec!r}: there is no module {name}. "
            "Name one that can be imported from here, or a file: path/to/file.py:function."
        ) from error
    except Exception as error:
        raise _failed_import(spec, name, error) from error


def _module_of_file(path: Path, spec: str) -> ModuleType:
    told = path.name  # in a run's records, whatever the folder that it is called from
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ConfigError(
            f"reward {spec!r}: there is no file {path}. Give the path of the Python file that holds the function."
        )
    name = f"_quark_reward_{path.stem}_{zlib.crc32(str(path).encode()):x}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    vars(module)["_quark_file"] = told
    sys.modules[name] = module  # dataclasses and pickles look their module up
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _failed_import(spec, str(path), error) from error
    return module


def _failed_import(spec: str, name: str, error: Exception) -> ConfigError:
    reason = (str(error).strip().splitlines() or ["no message"])[0]
    return ConfigError(f"reward {spec!r}: importing {name} raised {type(error).__name__} ({reason}). Mend it there.")
