"""Calls reward functions exactly as TRL's GRPOTrainer does, checks what they return, and adds it up.

Source: trl 1.16, `GRPOTrainer._calculate_rewards`: keywords only; async functions run together in one event loop; None
is no reward and is left out of the weighted sum; a completion for which all functions return None is dropped.
Here: whatever cannot be ranked is an error of one line that names the function, where TRL would train on it or stop in
a tensor.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import inspect
import math
import numbers
import threading
import weakref
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quark_lm.errors import ConfigError, DataError, QuarkError, RewardError

_OURS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_NOT_PASSED = ("prompt", "completion", "completion_ids")  # columns that TRL leaves out


@dataclass
class RewardBatch:
    """The rewards of N completions."""

    total: NDArray[np.float64]  # (N,), the weighted sum; NaN where every function returned None: to be dropped
    per_function: dict[str, NDArray[np.float64]]  # name: (N,), unweighted; NaN for None
    extra: dict[str, list[Any]] = field(default_factory=dict)  # what the functions gave to log_extra: column: N values
    metrics: dict[str, float] = field(default_factory=dict)  # what they gave to log_metric: name: mean of its values

    @property
    def num_dropped(self) -> int:
        return int(np.isnan(self.total).sum())


class RewardRunner:
    """One or several reward functions with weights, called as one.

    >>> def short(completions, **kwargs):
    ...     return [1.0 / len(completion) for completion in completions]
    >>> RewardRunner(short).score(["Hello"], [" you"], [[5]], {}).total
    array([0.25])

    Args:
        reward_funcs: functions, or anything that `load_reward` takes; one or a list.
        reward_weights: one a function; None: 1 each.
        names: one a function; None: `__name__`, as TRL has it, made unique by a number.
    """

    def __init__(
        self,
        reward_funcs: Any,
        reward_weights: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        from quark_lm.rewards import load_reward

        specs = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        if not specs:
            raise ConfigError("There is no reward function, and Quark learns from rewards alone. Give at least one.")
        self.functions = [load_reward(spec) for spec in specs]
        for what, given in (("reward_weights", reward_weights), ("names", names)):
            if given is not None and len(given) != len(specs):
                raise ConfigError(f"{what} has {len(given)} entries for {len(specs)} reward functions. Give one each.")
        self.weights = np.array([1.0] * len(specs) if reward_weights is None else reward_weights, dtype=np.float64)
        if not np.isfinite(self.weights).all():
            raise ConfigError(
                f"reward_weights={list(self.weights)} are not all finite, and a sum needs that. Mend them."
            )
        self.names = _unique([_name(function) for function in self.functions] if names is None else list(names))
        self._loop: asyncio.AbstractEventLoop | None = None

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: dict[str, list[Any]],
        trainer_state: Any = None,
    ) -> RewardBatch:
        """The rewards of N completions, one prompt each (repeated for each of its completions).

        Args:
            prompts, completions: text, or messages (a completion then is `[{"role": "assistant", "content": ...}]`).
            completion_ids: the token ids of each completion.
            columns: the other columns of the data set, N values each; they reach the functions by their names.
            trainer_state: `Trainer.state`, which a function may read for the step.
        Raises: RewardError when a function raises, or returns another number of rewards, NaN, an infinity or what is no
            number. DataError for a column named like one of the arguments.
        """
        num_completions = len(completions)
        columns = {name: values for name, values in columns.items() if name not in _NOT_PASSED}
        self._check_columns(num_completions, prompts, completion_ids, columns)
        extra: dict[str, list[Any]] = {}
        metric_values: dict[str, list[float]] = defaultdict(list)
        pending: list[tuple[int, Awaitable[Any]]] = []
        rewards = np.full((num_completions, len(self.functions)), np.nan)
        try:
            if num_completions:
                for number, (function, name) in enumerate(zip(self.functions, self.names, strict=True)):
                    arguments = {
                        "prompts": prompts,
                        "completions": completions,
                        "completion_ids": completion_ids,
                        **columns,
                        "trainer_state": trainer_state,
                        "log_extra": functools.partial(_log_extra, name, extra),
                        "log_metric": functools.partial(_log_metric, name, metric_values),
                    }
                    _check_keywords(function, name, arguments, columns)
                    try:
                        result = function(**arguments)
                    except Exception as error:
                        raise _failure(name, error) from error
                    if inspect.isawaitable(result):
                        pending.append((number, result))
                    else:
                        rewards[:, number] = _checked(result, name, num_completions)
            for (number, _), result in zip(pending, self._gathered([one for _, one in pending]), strict=True):
                if isinstance(result, BaseException):
                    raise _failure(self.names[number], result) from result
                rewards[:, number] = _checked(result, self.names[number], num_completions)
        finally:
            for _, one in pending:  # a function that failed leaves those after it unstarted
                if inspect.iscoroutine(one) and inspect.getcoroutinestate(one) == inspect.CORO_CREATED:
                    one.close()
        for column, values in extra.items():
            if len(values) != num_completions:
                raise RewardError(
                    f"log_extra({column!r}) got {len(values)} values for {num_completions} completions, so they fit no "
                    "table. Log one value for each completion."
                )
        return RewardBatch(
            total=np.where(np.isnan(rewards).all(axis=1), np.nan, np.nansum(rewards * self.weights, axis=1)),
            per_function={name: rewards[:, number] for number, name in enumerate(self.names)},
            extra=extra,
            metrics={name: sum(values) / len(values) for name, values in metric_values.items()},
        )

    def _check_columns(
        self,
        num_completions: int,
        prompts: Sequence[Any],
        completion_ids: Sequence[Any],
        columns: dict[str, list[Any]],
    ) -> None:
        lengths = {"prompts": len(prompts), "completion_ids": len(completion_ids)}
        lengths.update({f"column {name!r}": len(values) for name, values in columns.items()})
        for what, length in lengths.items():
            if length != num_completions:
                raise DataError(f"{what} has {length} rows for {num_completions} completions. Give one a completion.")
        taken = [name for name in columns if name in _OURS]
        if taken:
            raise DataError(
                f"The data set has a column {taken[0]!r}, which is an argument of every reward function. "
                "Rename the column."
            )

    def _gathered(self, awaitables: list[Awaitable[Any]]) -> list[Any]:
        """What each gives or raises, all run together.

        The loop outlives the call, since a client's connections belong to one loop.
        """
        if not awaitables:
            return []
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            thread = threading.Thread(target=_run_loop, args=(self._loop,), name="quark-rewards", daemon=True)
            thread.start()
            weakref.finalize(self, _stop_loop, self._loop, thread)

        async def outcome(awaitable: Awaitable[Any]) -> Any:
            try:
                return await awaitable
            except BaseException as error:  # also SystemExit, which would end the loop and leave us waiting
                return error

        async def gather() -> list[Any]:
            return await asyncio.gather(*map(outcome, awaitables))

        future = asyncio.run_coroutine_threadsafe(gather(), self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C: nothing is left running
            future.cancel()
            raise


# What a function is called with


def _check_keywords(
    function: Callable[..., Any], name: str, arguments: dict[str, Any], columns: dict[str, list[Any]]
) -> None:
    """Names the keywords that the function would refuse or miss, before Python does so in its own words."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have none
        return
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    missing = [p.name for p in parameters if p.name in named and p.default is p.empty and p.name not in arguments]
    if missing:
        known = ", ".join(columns) or "none"
        near = difflib.get_close_matches(missing[0], arguments, n=1, cutoff=0.8)
        advice = f"Did you mean {near[0]!r}?" if near else "Add the column, or give the parameter a default."
        raise RewardError(
            f"Reward function {name} needs {_listed(missing)}, which the data set does not have (its other columns: "
            f"{known}). {advice}"
        )
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    refused = [keyword for keyword in arguments if keyword not in named]
    if refused and not takes_all:
        raise RewardError(
            f"Reward function {name} does not take {_listed(refused)}, and every reward function is called with all "
            "keywords. Add **kwargs to its parameters."
        )


def _log_extra(name: str, extra: dict[str, list[Any]], column: str, values: Sequence[Any]) -> None:
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise RewardError(
            f"Reward function {name} gave log_extra({column!r}) {repr(values)[:60]}, which is no list. "
            "Log one value for each completion."
        )
    extra.setdefault(column, []).extend(values)


def _log_metric(name: str, metric_values: dict[str, list[float]], metric: str, value: Any) -> None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RewardError(
            f"Reward function {name} gave log_metric({metric!r}) {repr(value)[:60]}, which is no number. Log a float."
        ) from None
    metric_values[metric].append(number)


# What a function returns


def _checked(result: Any, name: str, num_completions: int) -> NDArray[np.float64]:
    """The rewards as float64 (N,), None as NaN."""
    if isinstance(result, str | bytes | dict | set) or not hasattr(result, "__iter__"):
        raise RewardError(
            f"Reward function {name} returned {_shown(result)}, not a list. "
            "Return one float or None for each completion."
        )
    # a tensor or array whole, not element by element, which is slow
    values = result.tolist() if hasattr(result, "tolist") else list(result)
    if not isinstance(values, list):
        raise RewardError(
            f"Reward function {name} returned one number, {_shown(values)}. Return one for each completion."
        )
    if len(values) != num_completions:
        raise RewardError(
            f"Reward function {name} returned {len(values)} rewards for {num_completions} completions, so whose they "
            "are is unknown. Return one float or None for each completion."
        )
    rewards = np.empty(num_completions)
    for index, value in enumerate(values):
        if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # a numpy or torch scalar
            value = value.item()
        if value is None:
            rewards[index] = np.nan
            continue
        if not isinstance(value, numbers.Real | np.bool_):
            raise RewardError(
                f"Reward function {name} returned {_shown(value)} at index {index}, which is no number. "
                "Return a float, or None for no reward."
            )
        rewards[index] = float(value)
        if not math.isfinite(rewards[index]):
            raise RewardError(
                f"Reward function {name} returned {rewards[index]} at index {index}, which has no rank. "
                "Return a finite number, or None for no reward."
            )
    return rewards


def _failure(name: str, error: BaseException) -> QuarkError:
    if isinstance(error, QuarkError):
        return error  # ours, and says what to do
    reason = (str(error).strip().splitlines() or ["no message"])[0]
    return RewardError(
        f"Reward function {name} raised {type(error).__name__}: {reason}. "
        "Mend it, or return None where there is no reward."
    )


# Names


def _name(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _unique(names: list[str]) -> list[str]:
    unique: list[str] = []
    for name in names:
        candidate, number = name, 2
        while candidate in unique:
            candidate, number = f"{name}_{number}", number + 1
        unique.append(candidate)
    return unique


def _listed(names: list[str]) -> str:
    quoted = [repr(name) for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def _shown(value: Any) -> str:
    return f"{repr(value)[:60]} ({type(value).__name__})" if value is not None else "None"


# The event loop of async functions


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
    loop.close()


def _stop_loop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    if thread is not threading.current_thread():
        thread.join(timeout=1)
