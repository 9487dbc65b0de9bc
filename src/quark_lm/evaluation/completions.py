"""The completions that an evaluation measures, and the files that hold them: `completions.parquet`, other people's, and
the journal of what is done so far.

Who makes and who scores them is passes.py's job.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..errors import DataError
from ..files import first_line, numbered_lines, parsed, written_whole
from ..prompts import flat, is_conversational

_METADATA = b"quark"


@dataclass
class CompletionSet:
    """N completions of P prompts; a prompt may have any number of them.

    Attributes:
        prompts: P texts or conversations; texts: what the model reads of each, as text.
        prompt_of: int (N,), the prompt of each completion. number: int (N,), which of its prompt's completions it is.
        completion_ids, prompt_ids: as the model drew and read them, without a reward token; None where nobody knows.
        columns: the data set's other columns, P values each.
        strength: float (N,), of the dial that drew it; None where nobody knows.
        scores: for each scorer float (N,), NaN where it gave none.
        nll, nll_tokens: (N,), under the evaluator: the total in nats, NaN without a value; of how many tokens.
        facts: what is known of how they came about: `made` (the settings), `scorers`, `evaluator`.
    """

    prompts: list[Any]
    texts: list[str]
    prompt_of: NDArray[np.int64]
    number: NDArray[np.int64]
    completions: list[str]
    completion_ids: list[list[int]] | None = None
    prompt_ids: list[list[int]] | None = None
    columns: dict[str, list[Any]] = field(default_factory=dict)
    strength: NDArray[np.float64] | None = None
    scores: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    nll: NDArray[np.float64] | None = None
    nll_tokens: NDArray[np.int64] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.completions)

    def groups(self, keep: NDArray[np.bool_] | None = None) -> list[NDArray[np.int64]]:
        """For each prompt the rows of its completions, those of `keep` alone."""
        rows = np.arange(len(self)) if keep is None else np.flatnonzero(keep)
        order = rows[np.argsort(self.prompt_of[rows], kind="stable")]
        ends = np.cumsum(np.bincount(self.prompt_of[rows], minlength=len(self.prompts)))
        return np.split(order, ends[:-1])

    def write(self, path: Path) -> None:
        """Writes `completions.parquet`, whole or not at all; `pandas.read_parquet` reads it.

        Columns: prompt_index, generation, strength, prompt, completion, prompt_ids, completion_ids, `score/<scorer>`,
        nll, nll_tokens, `column/<other column of the prompts>`, and `messages` for conversations.
        """
        of = self.prompt_of.tolist()
        data: dict[str, Any] = {
            "prompt_index": pa.array(of, pa.int32()),
            "generation": pa.array(self.number, pa.int32()),
            "prompt": [self.texts[p] for p in of],
            "completion": self.completions,
        }
        if self.strength is not None:
            data["strength"] = pa.array(self.strength, pa.float64())
        if any(map(is_conversational, self.prompts)):
            # text, so that one type serves plain prompts among them too
            messages = [json.dumps(p) if is_conversational(p) else None for p in self.prompts]
            data["messages"] = [messages[p] for p in of]
        if self.prompt_ids is not None:
            data["prompt_ids"] = pa.array([self.prompt_ids[p] for p in of], pa.list_(pa.int32()))
        if self.completion_ids is not None:
            data["completion_ids"] = pa.array(self.completion_ids, pa.list_(pa.int32()))
        for name, values in self.scores.items():
            data[f"score/{name}"] = pa.array(values, from_pandas=True)  # NaN becomes null
        if self.nll is not None and self.nll_tokens is not None:
            data["nll"] = pa.array(self.nll, from_pandas=True)
            data["nll_tokens"] = pa.array(self.nll_tokens, pa.int32())
        for name, column in self.columns.items():
            data[f"column/{name}"] = [column[p] for p in of]
        table = pa.table(data).replace_schema_metadata({_METADATA: json.dumps(self.facts, default=str).encode()})
        with written_whole(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")


# Reading


def read_completions(path: str | Path) -> CompletionSet:
    """Completions from a file: our `completions.parquet`, or those of others.

    Others' are JSONL or Parquet, a row of `prompt` and `completion` each, or as RealToxicityPrompts and DExperts have
    them: `{"prompt": {"text": ...}, "generations": [{"text": ...}, ...]}`. Rows with the same prompt go together; other
    columns reach the scorers, but for those that differ from one completion of a prompt to the next.
    Raises: DataError, naming the line, for what is neither.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / "completions.parquet"
    if not path.is_file():
        raise DataError(
            f"There is no file {path}. Give completions.parquet of an evaluation, or a JSONL of completions."
        )
    ending = path.suffix.lower()
    if ending == ".parquet":
        try:
            table = pq.read_table(path)
            table.validate(full=True)
            rows = None if _METADATA in (table.schema.metadata or {}) else table.to_pylist()
        except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
            raise DataError(f"{path} cannot be read ({first_line(error)}). Copy or make it again.") from error
        return _own(table, path) if rows is None else _others(enumerate(rows, 1), path, "row")
    if ending == ".jsonl":
        return _others(json_lines(path), path, "line")
    if ending == ".json":
        raise DataError(
            f"{path} is no table of completions: results.json holds figures alone. Give completions.parquet beside it,"
            " or a file that ends with .jsonl."
        )
    raise DataError(f"{path} ends with neither .parquet nor .jsonl, so its format is unknown. Rename or convert it.")


def _own(table: pa.Table, path: Path) -> CompletionSet:
    try:
        data = {name: table.column(name).to_pylist() for name in table.column_names}
        prompt_of = np.array(data["prompt_index"], dtype=np.int64)
        num_prompts = int(prompt_of.max()) + 1 if len(prompt_of) else 0
        first = np.full(num_prompts, -1)
        first[prompt_of[::-1]] = np.arange(len(prompt_of))[::-1]  # the first row of each prompt
        if (first < 0).any():
            raise ValueError(f"prompt {int(np.argmin(first))} has no row")
        if (prompt_of < 0).any():
            raise ValueError("a prompt's number is below 0")
        if not all(isinstance(text, str) for name in ("prompt", "completion") for text in data[name]):
            raise ValueError("a text is missing")
        facts = parsed(table.schema.metadata[_METADATA])
        if not isinstance(facts, dict) or not isinstance(facts.get("made", {}), dict):
            raise ValueError("its settings are no settings")
        texts = [data["prompt"][row] for row in first]
        messages = data.get("messages")
        return CompletionSet(
            prompts=[
                texts[p] if messages is None or messages[row] is None else parsed(messages[row])
                for p, row in enumerate(first)
            ],
            texts=texts,
            prompt_of=prompt_of,
            number=np.array(data["generation"], dtype=np.int64),
            completions=data["completion"],
            completion_ids=data.get("completion_ids"),
            prompt_ids=[data["prompt_ids"][row] for row in first] if "prompt_ids" in data else None,
            columns={
                name.removeprefix("column/"): [values[row] for row in first]
                for name, values in data.items()
                if name.startswith("column/")
            },
            strength=np.array(data["strength"], dtype=np.float64) if "strength" in data else None,
            scores={
                name.removeprefix("score/"): np.array(values, dtype=np.float64)
                for name, values in data.items()
                if name.startswith("score/")
            },
            nll=np.array(data["nll"], dtype=np.float64) if "nll" in data else None,
            nll_tokens=np.array(data["nll_tokens"], dtype=np.int64) if "nll_tokens" in data else None,
            facts=facts,
        )
    except (KeyError, IndexError, ValueError, TypeError, OverflowError, MemoryError, pa.ArrowException) as error:
        raise DataError(f"{path} is damaged ({first_line(error)}). Copy it again, or evaluate again.") from error


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        lines = numbered_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}). Give a JSONL file in UTF-8.") from error
    for number, line in lines:
        try:
            yield number, parsed(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}, is no JSON ({error}). Mend it, or leave it out.") from error


# What is read of a row of others, and our own columns, which a copy without our metadata has. Others are the prompt's.
_READ = (
    "prompt", "completion", "completion_ids", "generations",
    "prompt_index", "generation", "strength", "messages", "prompt_ids", "nll", "nll_tokens",
)  # fmt: skip


def _others(rows: Iterator[tuple[int, Any]] | Any, path: Path, unit: str) -> CompletionSet:
    """Rows of others, in the order in which the prompts come up."""
    places: dict[str, int] = {}
    prompts: list[Any] = []
    columns: dict[str, list[Any]] = {}
    found: list[tuple[int, str]] = []  # (prompt, completion)
    repeated = without = 0
    differing: set[str] = set()
    for line, row in rows:
        prompt, completions = _prompt_and_completions(row, f"{path}, {unit} {line}")
        if not completions:
            without += 1
            continue
        place = places.setdefault(repr(prompt), len(prompts))
        others = {name: value for name, value in row.items() if name not in _READ and "/" not in name}
        if place == len(prompts):
            prompts.append(prompt)
            for name, value in others.items():
                columns.setdefault(name, [None] * (len(prompts) - 1)).append(value)
            for values in columns.values():
                values.extend([None] * (len(prompts) - len(values)))
        else:
            repeated += "generations" in row
            differing |= {n for n, value in others.items() if n not in columns or columns[n][place] != value}
        found += [(place, text) for text in completions]
    if not found:
        raise DataError(f"{path} holds no completion, so there is nothing to measure. Give at least one.")
    if repeated:
        warnings.warn(
            f"{path}: {repeated} prompts come again, and their completions are taken together, so a maximum is over"
            " more of them.",
            stacklevel=2,
        )
    if without:
        warnings.warn(f"{path}: left out {without} prompts without a completion.", stacklevel=2)
    if differing:
        warnings.warn(
            f"{path}: {', '.join(sorted(differing))} differ between completions of one prompt, so they tell nothing of"
            " the prompt, and no scorer gets them.",
            stacklevel=2,
        )
    columns = {name: values for name, values in columns.items() if name not in differing}
    for name, values in columns.items():
        try:
            pa.array(values)
        except pa.ArrowException as error:
            raise DataError(
                f"{path}: {name} has values of several types ({first_line(error)}), which no table of completions"
                " holds. Write all alike, or leave it out."
            ) from error
    order = sorted(range(len(found)), key=lambda i: found[i][0])  # stable: a prompt's stay in their order
    prompt_of = np.array([found[i][0] for i in order], dtype=np.int64)
    starts = np.searchsorted(prompt_of, np.arange(len(prompts)))
    return CompletionSet(
        prompts=prompts,
        texts=[p if isinstance(p, str) else "\n".join(str(m.get("content", "")) for m in p) for p in prompts],
        prompt_of=prompt_of,
        number=np.arange(len(found)) - starts[prompt_of],
        completions=[found[i][1] for i in order],
        columns=columns,
    )


def _prompt_and_completions(row: Any, where: str) -> tuple[Any, list[str]]:
    if not isinstance(row, dict) or "prompt" not in row or not ("completion" in row or "generations" in row):
        raise DataError(
            f"{where}, has no prompt with a completion or generations. Write"
            ' {"prompt": "...", "completion": "..."} or {"prompt": "...", "generations": ["...", ...]}.'
        )
    prompt = flat(row["prompt"])
    if not _can_be_written(prompt):
        prompt = None  # half a character, which no model reads
    if not (isinstance(prompt, str) or (is_conversational(prompt) and all(isinstance(m, dict) for m in prompt))):
        raise DataError(f"{where}, has a prompt that is neither text nor messages ({prompt!r:.60}). Mend it.")
    given = row["generations"] if "generations" in row else [row["completion"]]
    texts = [_text(one) for one in given] if isinstance(given, list) else [None]
    if any(text is None for text in texts):
        raise DataError(f"{where}, has a completion that is no text ({given!r:.60}). Mend it, or leave it out.")
    return prompt, [text for text in texts if text is not None]


def _text(completion: Any) -> str | None:
    if is_conversational(completion):
        completion = completion[-1].get("content") if completion and isinstance(completion[-1], dict) else None
    elif isinstance(completion, dict):
        completion = completion.get("text")
    return completion if isinstance(completion, str) and _can_be_written(completion) else None


def _can_be_written(data: Any) -> bool:
    """Whether no text in it has half of a pair of code units, which UTF-8 knows not."""
    try:
        json.dumps(data, ensure_ascii=False, default=str).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


# What is done so far


def finite_or_none(values: Sequence[float] | NDArray[Any]) -> list[float | None]:
    """The values for JSON, which knows no NaN."""
    return [float(value) if np.isfinite(value) else None for value in values]
