"""Calls reward functions exactly as TRL's GRPOTrainer does, checks what they return, and adds it up.

Source: trl 1.16, `GRPOTrainer._calculate_rewards`: keywords only; async functions run together in one event loop; None
is no reward and is left out of the weighted sum; a completion for which all functions return None is dropped.
Here: whatever cannot be ranked is an error of one line that names the function, where TRL would train on it or stop in
a tensor; and a function that raises, as one that asks a server may, is called again before that.

What a function gives to `log_metric` is named `rewards/<metric>` from here on, so that it can be none of our own.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import hashlib
import inspect
import math
import numbers
import sys
import threading
import warnings
import weakref
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tenacity
from numpy.typing import NDArray

from quark_lm.errors import ConfigError, DataError, QuarkError, RewardError

_OURS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_NOT_PASSED = ("prompt", "completion", "completion_ids")  # columns that TRL leaves out
_LONGEST_PAUSE = 60.0  # seconds


@dataclass(frozen=True)
class Failure:
    """A function that raised to the end."""

    function: str
    reason: str
    count: int  # of the completions that it left without a reward


@dataclass
class RewardBatch:
    """The rewards of N completions."""

    total: NDArray[np.float64]  # (N,), the weighted sum; NaN where there is none: to be dropped
    per_function: dict[str, NDArray[np.float64]]  # name: (N,), unweighted; NaN for None
    extra: dict[str, list[Any]] = field(default_factory=dict)  # what the functions gave to log_extra: column: N values
    # what they gave to log_metric: "rewards/<metric>": (sum, count), which add up over batches and processes
    metric_sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        """The mean of each metric."""
        return {name: total / count for name, (total, count) in self.metric_sums.items()}

    @property
    def num_dropped(self) -> int:
        return int(np.isnan(self.total).sum())

    @property
    def num_failed(self) -> int:
        """Completions that have no reward because a function failed."""
        return max((failure.count for failure in self.failures), default=0)


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
        taken: names that others have, which none of these gets.
        retries: how often a function that raises is called again with the same batch. Not so for an error of ours,
            which says what to mend; KeyboardInterrupt passes at once.
        may_fail: a function that raises to the end leaves its batch without a reward, the reason in
            `RewardBatch.failures`; False: that is a RewardError.
        pause: seconds before the first retry; each one after it waits twice as long, a minute at most.
    """

    def __init__(
        self,
        reward_funcs: Any,
        reward_weights: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
        *,
        taken: Collection[str] = (),
        retries: int = 0,
        may_fail: bool = False,
        pause: float = 1.0,
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
        self.names = _unique([_name(f) for f in self.functions] if names is None else list(names), taken)
        self.retries = retries
        self.may_fail = may_fail
        # without jitter, whose random numbers a reward function that draws some would miss
        self._retrying: dict[str, Any] = {
            "retry": tenacity.retry_if_exception(_may_pass),
            "stop": tenacity.stop_after_attempt(retries + 1),
            "wait": tenacity.wait_exponential(multiplier=pause, max=_LONGEST_PAUSE),
            "reraise": True,
        }
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def told(self) -> list[str]:
        """Which scorer each function is, the same in every process and on every machine.

        Of a function of the user's own that is its place and not its text: a mended one is the same.
        """
        return [_told(function) for function in self.functions]

    @property
    def sources(self) -> dict[str, str | None]:
        """By name a digest of how each function is written; None where its source is not at hand."""
        return {name: _source(function) for name, function in zip(self.names, self.functions, strict=True)}

    @property
    def measuring(self) -> dict[str, Any]:
        """By name the scorers that chose their `dtype` by what is fast on this machine."""
        scorers: list[Any] = [getattr(_without_partial(function), "scorer", None) for function in self.functions]
        return {n: s for n, s in zip(self.names, scorers, strict=True) if getattr(s, "measures_dtype", False)}

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
            trainer_state: `Trainer.state`, which a function may read for the step; None: that of a run at its start.
        Returns: a batch in which no completion has a total where a function failed (`may_fail`): a sum without its part
            cannot be ranked among the others.
        Raises: RewardError when a function raises, unless it may fail, or returns another number of rewards, NaN, an
            infinity or what is no number. DataError for a column named like one of the arguments.
        """
        num_completions = len(completions)
        columns = {name: values for name, values in columns.items() if name not in _NOT_PASSED}
        self._check_columns(num_completions, prompts, completion_ids, columns)
        rewards = np.full((num_completions, len(self.functions)), np.nan)
        given = {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": completion_ids,
            **columns,
            "trainer_state": trainer_state if trainer_state is not None else _state_at_start(),
        }
        calls = [_Call(function, name, given) for function, name in zip(self.functions, self.names, strict=True)]
        for call in calls:
            _check_keywords(call.function, call.name, call.arguments(), columns)
        batch = RewardBatch(np.full(num_completions, np.nan), {})
        for number, outcome in enumerate(self._outcomes(calls, num_completions) if num_completions else ()):
            if isinstance(outcome, Failure):
                batch.failures.append(outcome)
                continue
            rewards[:, number] = _checked(outcome, calls[number].name, num_completions)
            for column, values in calls[number].extra.items():
                batch.extra.setdefault(column, []).extend(values)
            for metric, values in calls[number].metric_values.items():
                total, count = batch.metric_sums.get(metric, (0.0, 0))
                batch.metric_sums[metric] = (total + sum(values), count + len(values))
        for column, values in batch.extra.items():
            if len(values) != num_completions:
                raise RewardError(
                    f"log_extra({column!r}) got {len(values)} values for {num_completions} completions, so they fit no "
                    "table. Log one value for each completion."
                )
        batch.per_function = {name: rewards[:, number] for number, name in enumerate(self.names)}
        # a sum that lacks the part of a function that failed would be ranked among sums that have it
        if not batch.failures:
            batch.total = np.where(np.isnan(rewards).all(axis=1), np.nan, np.nansum(rewards * self.weights, axis=1))
        return batch

    def _outcomes(self, calls: list[_Call], num_completions: int) -> list[Any]:
        """What each call returns, or its Failure; the async ones run together, after the others.

        Raises: RewardError when a call raises, unless that may be.
        """

        def failure(call: _Call, error: BaseException) -> Failure:
            if isinstance(error, KeyboardInterrupt):
                raise error
            told = _failure(call.name, error, self.retries)
            if self.may_fail and isinstance(error, Exception) and isinstance(told, RewardError):
                return Failure(call.name, _reason(error), num_completions)
            raise told from error

        outcomes: list[Any] = []
        pending: dict[int, Awaitable[Any]] = {}
        try:
            for number, call in enumerate(calls):
                try:
                    outcomes.append(tenacity.Retrying(**self._retrying, before_sleep=call.tell)(call))
                except (Exception, SystemExit) as error:  # which would end the run without a word
                    outcomes.append(failure(call, error))
                if inspect.isawaitable(outcomes[number]):
                    pending[number] = outcomes[number]
            retried = [functools.partial(self._awaited, calls[number], one) for number, one in pending.items()]
            for number, outcome in zip(pending, self._gathered(retried), strict=True):
                outcomes[number] = failure(calls[number], outcome) if isinstance(outcome, BaseException) else outcome
        finally:
            for one in pending.values():  # a function that failed leaves those after it unstarted
                if inspect.iscoroutine(one) and inspect.getcoroutinestate(one) == inspect.CORO_CREATED:
                    one.close()
        return outcomes

    async def _awaited(self, call: _Call, first: Awaitable[Any]) -> Any:
        """What an async call gives; where it raises, the function is called anew."""
        unused = [first]

        async def once() -> Any:
            return await (unused.pop() if unused else call())

        return await tenacity.AsyncRetrying(**self._retrying, before_sleep=call.tell)(once)

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

    def _gathered(self, functions: Sequence[Callable[[], Awaitable[Any]]]) -> list[Any]:
        """What each async function gives or raises, all run together.

        The loop outlives the call, since a client's connections belong to one loop.
        """
        if not functions:
            return []
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            thread = threading.Thread(target=_run_loop, args=(self._loop,), name="quark-rewards", daemon=True)
            thread.start()
            weakref.finalize(self, _stop_loop, self._loop, thread)

        async def outcome(function: Callable[[], Awaitable[Any]]) -> Any:
            try:
                return await function()
            except BaseException as error:  # also SystemExit, which would end the loop and leave us waiting
                return error

        async def gather() -> list[Any]:
            return await asyncio.gather(*map(outcome, functions))

        future = asyncio.run_coroutine_threadsafe(gather(), self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C: nothing is left running
            future.cancel()
            raise


# What a function is called with


class _Call:
    """One function and the batch that it gets. Each call logs anew, so that a retry counts nothing twice."""

    def __init__(self, function: Callable[..., Any], name: str, given: dict[str, Any]) -> None:
        self.function, self.name, self._given = function, name, given
        self.extra: dict[str, list[Any]] = {}
        self.metric_values: dict[str, list[float]] = {}

    def arguments(self) -> dict[str, Any]:
        self.extra, self.metric_values = {}, {}
        return {
            **self._given,
            "log_extra": functools.partial(_log_extra, self.name, self.extra),
            "log_metric": functools.partial(_log_metric, self.name, self.metric_values),
        }

    def __call__(self) -> Any:
        return self.function(**self.arguments())

    def tell(self, state: tenacity.RetryCallState) -> None:
        """Says that there will be another call: the pause would look like a hang."""
        error = state.outcome.exception() if state.outcome is not None else None
        seconds = state.next_action.sleep if state.next_action is not None else 0.0
        reason = _reason(error) if error is not None else "nothing"
        warnings.warn(
            f"Reward function {self.name} raised {reason}. It is called again in {seconds:.1f} s.", stacklevel=2
        )


def _may_pass(error: BaseException) -> bool:
    """Whether another call may go well. An error of ours says what to mend, and has tried again where that helps."""
    return isinstance(error, Exception) and not isinstance(error, QuarkError)


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
    metric_values.setdefault(f"rewards/{metric}", []).append(number)


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
        try:
            rewards[index] = float(value)
        except OverflowError:  # a whole number of hundreds of digits
            rewards[index] = math.inf
        if not math.isfinite(rewards[index]):
            raise RewardError(
                f"Reward function {name} returned {rewards[index]} at index {index}, which has no rank. "
                "Return a finite number, or None for no reward."
            )
    return rewards


def _failure(name: str, error: BaseException, retries: int) -> QuarkError:
    if isinstance(error, QuarkError):
        return error  # ours, and says what to do
    each = f" at each of {retries + 1} calls" if retries and _may_pass(error) else ""
    return RewardError(
        f"Reward function {name} raised {_reason(error)}{each}. Mend it, or return None where there is no reward."
    )


def _reason(error: BaseException) -> str:
    """One line."""
    text = (str(error).strip().splitlines() or ["no message"])[0]
    return text if isinstance(error, QuarkError) else f"{type(error).__name__}: {text}"


def _state_at_start() -> Any:
    from transformers import TrainerState

    return TrainerState()


# Names

_PLAIN = (str, int, float, bool, type(None))


def _without_partial(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _name(function: Callable[..., Any]) -> str:
    function = _without_partial(function)
    return getattr(function, "__name__", type(function).__name__)


def _told(function: Callable[..., Any]) -> str:
    function = _without_partial(function)
    name = getattr(function, "told_as", None) or getattr(function, "scorer_name", None)
    if name is not None:
        return f"{name} {getattr(function, 'scorer_version', '')}".strip()
    named = function if hasattr(function, "__qualname__") else type(function)  # an object's repr may tell its address
    module = str(getattr(named, "__module__", None))
    return f"{getattr(sys.modules.get(module), '_quark_file', module)}:{named.__qualname__}"


def _source(function: Callable[..., Any]) -> str | None:
    plain = _without_partial(function)
    if (source := getattr(plain, "told_as_source", None)) is None:
        try:
            source = inspect.getsource(inspect.unwrap(plain))
        except (OSError, TypeError):  # typed into an interpreter, or an object
            return None
    while isinstance(function, functools.partial):  # what it fixes; an object's repr may tell its address
        fixed: list[tuple[Any, Any]] = [*enumerate(function.args), *sorted(function.keywords.items())]
        told = [one for one in fixed if isinstance(one[1], _PLAIN)]
        source += repr(told) if told else ""
        function = function.func
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def _unique(names: list[str], taken: Collection[str]) -> list[str]:
    unique: list[str] = []
    for name in names:
        candidate, number = name, 2
        while candidate in unique or candidate in taken:
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
