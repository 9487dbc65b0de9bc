"""A reward over HTTP: prompts and completions go to a server as JSON, in batches, and numbers come back.

The server gets `POST {"prompts": [...], "completions": [...]}`, both as reward functions get them (text, or lists of
messages), and answers `{"rewards": [...]}`: a number or null for each completion, in their order. It may be slow, busy
or down for a while: what may pass is asked again, and with a cache what was answered is never asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import functools
import hashlib
import json
import math
import re
import sqlite3
import ssl
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import tenacity

from quark_lm.errors import ConfigError, RewardError
from quark_lm.files import first_line
from quark_lm.shown import url_shown

# Seconds before the first retry; each one after it waits twice as long.
_FIRST_PAUSE = 1.0
# Seconds that a server may ask to be left alone; for longer it is better to stop.
_LONGEST_WAIT = 300.0
# Bytes of an answer: thousands of rewards, and no server can fill the memory.
_MOST_BYTES = 1 << 24

Pair = tuple[Any, Any]  # prompt, completion


def http_reward(
    url: str,
    cache: str | Path | None = None,
    batch_size: int = 32,
    concurrency: int = 4,
    requests_per_second: float | None = None,
    timeout: float = 60.0,
    retries: int = 5,
    *,
    trust_env: bool = False,
) -> HttpReward:
    """An async reward function: what the server at `url` answers; any real numbers, higher is better, null is None.

    >>> reward = http_reward("http://127.0.0.1:8000/score")
    >>> asyncio.run(reward(prompts=["The film"], completions=[" was a delight."]))
    [0.98]

    Args:
        url: of the one end point; a user and password in it are sent, and never shown.
        cache: an SQLite file that keeps every answer, whatever happens next. It does not see that the server behind the
            URL scores otherwise than before: delete it then. None keeps nothing.
        batch_size: completions of one request. Equal pairs of prompt and completion are asked once.
        concurrency: requests under way at once.
        requests_per_second: of this process, retries too; None: as fast as the answers come.
        timeout: seconds for one request, from connecting to the last byte.
        retries: how often a request is sent again after a time-out, a lost connection, or a status of 408, 425, 429 or
            500 and above; `Retry-After` is waited for.
        trust_env: proxies and certificates of the environment's variables; False reads none.

    Raises: ConfigError for a URL or number that cannot work; when called, RewardError in one line.
    """
    at_least: dict[str, tuple[Any, float]] = {
        "batch_size": (batch_size, 1),
        "concurrency": (concurrency, 1),
        "retries": (retries, 0),
        "timeout": (timeout, 0.001),
        "requests_per_second": (1 if requests_per_second is None else requests_per_second, 0.001),
    }
    for name, (value, least) in at_least.items():
        kind = int if isinstance(least, int) and name != "requests_per_second" else (int, float)
        if not isinstance(value, kind) or not least <= value < math.inf:
            what = "a whole number" if kind is int else "a number"
            shown = url_shown(str(url))
            raise ConfigError(f"{name}={value!r} of the reward {shown} cannot work. Set {what}, {least} or more.")
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, TypeError) as error:
        # its text may quote the URL
        raise ConfigError(
            f"The reward {url_shown(str(url))!r} is no URL ({type(error).__name__}). Write http://host:port/path."
        ) from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"The reward {url_shown(str(url))!r} is no URL of a web server. Write http://host:port/path.")
    return HttpReward(
        parsed,
        Path(cache).expanduser() if cache is not None else None,
        batch_size,
        concurrency,
        requests_per_second,
        timeout,
        retries,
        trust_env,
    )


class HttpReward:
    """What `http_reward` returns. Attributes: `__name__`, `scorer_name`, `scorer_version`, and `cache_path`."""

    def __init__(
        self,
        url: httpx2.URL,
        cache_path: Path | None,
        batch_size: int,
        concurrency: int,
        requests_per_second: float | None,
        timeout: float,
        retries: int,
        trust_env: bool,
    ) -> None:
        self._url = url
        self.cache_path = cache_path
        self._batch_size, self._concurrency, self._timeout, self._retries = batch_size, concurrency, timeout, retries
        self._gap = 1.0 / requests_per_second if requests_per_second is not None else 0.0
        self._trust_env = trust_env
        self._next_at = 0.0  # time.monotonic() before which no request goes out
        self._shown = url_shown(str(url))
        self.__name__ = re.sub(r"\W+", "_", url.path.rstrip("/").rpartition("/")[2] or url.host).strip("_") or "http"
        self.scorer_name = f"http {self._shown}"
        self.told_as = f"http {url.path}"  # a server may move to another machine or port between parts of a run
        self.told_as_source = url.query.decode() or None  # kept as a hash: it may hold a key
        self.scorer_version = "unpinned"

    async def __call__(
        self, *, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """One reward a completion; other columns are left unread."""
        keys = [self._key(*pair) for pair in zip(prompts, completions, strict=True)]
        pairs = dict(zip(keys, zip(prompts, completions, strict=True), strict=True))
        failures: list[Exception] = []
        with _Cache(self.cache_path) as cache:
            known = cache.read(list(pairs))
            rest = [key for key in pairs if key not in known]
            batches = iter([rest[start : start + self._batch_size] for start in range(0, len(rest), self._batch_size)])

            async def work(client: httpx2.AsyncClient) -> None:
                for batch in batches:
                    try:
                        rewards = await self._asked(client, [pairs[key] for key in batch])
                        answered = dict(zip(batch, rewards, strict=True))
                        cache.write(answered)
                        known.update(answered)
                    except Exception as error:
                        failures.append(error)
                    if failures:  # nothing more is asked, but what is under way is waited for and kept
                        return

            if rest:
                # a client of its own for each call: connections belong to one event loop
                async with httpx2.AsyncClient(
                    verify=self._certificates,
                    trust_env=self._trust_env,
                    timeout=None,
                    limits=httpx2.Limits(max_connections=self._concurrency),
                ) as client:
                    await asyncio.gather(*(work(client) for _ in range(self._concurrency)))
        if failures:
            raise failures[0]
        return [known[key] for key in keys]

    @functools.cached_property
    def _certificates(self) -> ssl.SSLContext | bool:
        """Read once, which takes some tenths of a second, and only where they are looked at."""
        return httpx2.create_ssl_context(trust_env=self._trust_env) if self._url.scheme == "https" else False

    def _key(self, prompt: Any, completion: Any) -> bytes:
        try:
            text = json.dumps([str(self._url), prompt, completion], sort_keys=True)
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"A prompt or completion cannot be sent to {self._shown} as JSON ({error}). Use text, or messages of"
                " text."
            ) from error
        return hashlib.sha256(text.encode()).digest()

    async def _asked(self, client: httpx2.AsyncClient, pairs: list[Pair]) -> list[float | None]:
        """The rewards of one batch, from as many requests as it takes."""
        content = json.dumps({"prompts": [p for p, _ in pairs], "completions": [c for _, c in pairs]}).encode()
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_Unanswered),
            stop=tenacity.stop_after_attempt(self._retries + 1),
            wait=tenacity.wait_exponential(multiplier=_FIRST_PAUSE, max=60.0),
            reraise=True,
        )
        try:
            body: bytes = await retrying(self._post, client, content)
        except _Unanswered as error:
            times = f" ({self._retries + 1} times)" if self._retries else ""
            raise RewardError(f"The reward at {self._shown} {error.what}{times}. {error.advice}") from error
        return _rewards(body, len(pairs), self._shown)

    async def _post(self, client: httpx2.AsyncClient, content: bytes) -> bytes:
        """The body of a good answer. Raises: _Unanswered for what may pass, RewardError for what will not."""
        await self._turn()
        body = bytearray()
        try:
            async with (
                asyncio.timeout(self._timeout),
                client.stream(
                    "POST", self._url, content=content, headers={"Content-Type": "application/json"}
                ) as response,
            ):
                async for part in response.aiter_bytes():
                    body += part
                    if len(body) > _MOST_BYTES:
                        raise RewardError(
                            f"The reward at {self._shown} answered more than {_MOST_BYTES >> 20} MiB, which no batch"
                            ' needs. It has to answer {"rewards": [...]}.'
                        )
        except TimeoutError as error:
            raise _Unanswered(
                f"gave no answer within {self._timeout:g} s", "Raise timeout, or lower batch_size and concurrency."
            ) from error
        except httpx2.DecodingError as error:
            raise RewardError(
                f"The reward at {self._shown} answered what cannot be decoded ({first_line(error)}). Mend the server."
            ) from error
        except httpx2.ConnectError as error:
            raise _Unanswered(
                f"cannot be reached ({first_line(error)})", "Start the server there, or mend the URL."
            ) from error
        except httpx2.RequestError as error:
            raise _Unanswered(f"broke off ({first_line(error)})", "Look at the server's own log.") from error
        status = f"{response.status_code} {response.reason_phrase}".strip()
        if response.is_success:
            return bytes(body)
        if response.status_code >= 500 or response.status_code in (408, 425, 429):
            self._leave_alone(response.headers.get("Retry-After", ""))
            raise _Unanswered(
                f"answered {status}{_excerpt(body)}",
                "Look at the server's own log, or ask for less: requests_per_second, concurrency, batch_size.",
            )
        if response.is_redirect:
            target = response.headers.get("Location", "")[:200]
            raise RewardError(
                f"The reward at {self._shown} answered {status}: it has moved to {target!r}. Give that URL."
            )
        raise RewardError(
            f"The reward at {self._shown} refused the request: {status}{_excerpt(body)}. Mend the URL, or the server,"
            ' which gets {"prompts": [...], "completions": [...]}.'
        )

    async def _turn(self) -> None:
        """Waits until the next request may go out."""
        while (wait := self._next_at - time.monotonic()) > 0:  # a Retry-After may come while it sleeps
            await asyncio.sleep(wait)
        self._next_at = time.monotonic() + self._gap

    def _leave_alone(self, retry_after: str) -> None:
        """Lets no request out, of whichever batch, before the server's Retry-After. Raises: RewardError if too long."""
        seconds = _seconds(retry_after)
        if seconds > _LONGEST_WAIT:
            kept = " What is answered is in the cache." if self.cache_path is not None else ""
            raise RewardError(
                f"The reward at {self._shown} asks to be left alone for {seconds:.0f} s. Start again after that.{kept}"
            )
        self._next_at = max(self._next_at, time.monotonic() + seconds)

    def __repr__(self) -> str:
        return f"<reward {self.__name__}: {self.scorer_name}>"


class _Unanswered(Exception):
    """A request that may go well when it is sent again."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(what)
        self.what, self.advice = what, advice


def _rewards(body: bytes, num_completions: int, shown: str) -> list[float | None]:
    """The rewards of an answer, each checked."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RewardError(
            f'The reward at {shown} answered what is no JSON{_excerpt(body)}. It has to answer {{"rewards": [...]}}.'
        ) from error
    rewards = data.get("rewards") if isinstance(data, dict) else None
    if not isinstance(rewards, list):
        raise RewardError(
            f'The reward at {shown} answered no list of rewards{_excerpt(body)}. It has to answer {{"rewards": [...]}}.'
        )
    if len(rewards) != num_completions:
        raise RewardError(
            f"The reward at {shown} answered {len(rewards)} rewards for {num_completions} completions, so whose they"
            " are is unknown. It has to answer a number or null for each."
        )
    for index, value in enumerate(rewards):
        # a whole number may be too large for a float
        if value is not None and not (isinstance(value, (int, float)) and abs(value) < 1e300):
            raise RewardError(
                f"The reward at {shown} answered {str(value)[:40]!r} at index {index}, which has no rank. It has to"
                " answer a finite number or null."
            )
    return [None if value is None else float(value) for value in rewards]


def _seconds(retry_after: str) -> float:
    """Of a Retry-After header, which holds seconds or a date; 0 when it says neither."""
    with contextlib.suppress(ValueError):
        seconds = float(retry_after)
        return max(0.0, seconds) if not math.isnan(seconds) else 0.0
    with contextlib.suppress(ValueError, TypeError):
        date = email.utils.parsedate_to_datetime(retry_after)
        date = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
        return max(0.0, (date - datetime.now(UTC)).total_seconds())
    return 0.0


def _excerpt(body: bytes | bytearray) -> str:
    """The start of an answer; quoted, so that it can neither break the line nor write to a terminal."""
    text = body[:200].decode(errors="replace").strip()
    return f" ({text[:80]!r})" if text else ""


class _Cache:
    """Answers on disk. Each batch is one transaction, so that a kill loses none that was written."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None

    def __enter__(self) -> _Cache:
        if self._path is not None:
            try:
                with self._errors():
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    # another process of the run may be writing
                    self._connection = sqlite3.connect(self._path, timeout=60.0)
                    with self._connection:
                        self._connection.execute(
                            "CREATE TABLE IF NOT EXISTS rewards (key BLOB PRIMARY KEY, reward REAL) WITHOUT ROWID"
                        )
            except RewardError:
                self.__exit__()
                raise
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._connection is not None:
            self._connection.close()

    def read(self, keys: list[bytes]) -> dict[bytes, float | None]:
        """The answers that there are."""
        known: dict[bytes, float | None] = {}
        if self._connection is not None:
            with self._errors():
                for start in range(0, len(keys), 500):  # SQLite takes some thousands of values at once
                    some = keys[start : start + 500]
                    marks = ", ".join("?" * len(some))
                    known.update(
                        self._connection.execute(f"SELECT key, reward FROM rewards WHERE key IN ({marks})", some)
                    )
        return known

    def write(self, answered: dict[bytes, float | None]) -> None:
        if self._connection is not None:
            with self._errors(), self._connection:
                self._connection.executemany("INSERT OR REPLACE INTO rewards VALUES (?, ?)", answered.items())

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise RewardError(
                f"The cache {self._path} cannot be used ({first_line(error)}). Make room for it, or name another file,"
                " or leave cache out."
            ) from error
