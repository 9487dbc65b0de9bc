"""The pool: every sample of every round on disk, append-only Parquet, one file a round, and a small manifest.

No torch here. A round's file is written whole beside its place and renamed into it: it is there whole or not at all.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import DataError, PoolError, QuarkError
from .files import CHECK, append_line, checksum, first_line, numbered_lines, parsed, sha256, written_whole

# Columns that every round has; a round may have more: `reward/<function>`, and what a reward function logged as
# `extra/<name>`.
SCHEMA = pa.schema(
    [
        pa.field("round", pa.int32()),
        pa.field("prompt_index", pa.int64()),  # which training prompt; below -1: none of them
        pa.field("prompt_ids", pa.list_(pa.int32())),
        pa.field("completion_ids", pa.list_(pa.int32())),  # as sampled, with the end-of-text token when it came
        pa.field("token_at", pa.int32()),  # where in prompt_ids a reward token goes
        pa.field("prompt", pa.string()),
        pa.field("completion", pa.string()),
        pa.field("reward", pa.float64()),  # null: the reward functions gave none, and the row is never drawn
        pa.field("explored_with", pa.int16()),  # the quantile that was asked for (`RewardTokens.code`); null: none
        pa.field("strength", pa.float32()),  # of the dial
        pa.field("held_out", pa.bool_()),  # never drawn: measures whether the tokens mean anything
        pa.field("reference_nll", pa.float64()),  # nats a token under the original model; measured for some rows only
    ]
)
_MANIFEST = "manifest.json"
_SMALL = ("reward", "held_out", "prompt_index")  # columns that are kept in memory


class Pool:
    """All samples of a run.

    Example:
        ```python
        pool = Pool.open("runs/demo/pool")
        table = pool.to_table()  # pyarrow; also: pandas.read_parquet("runs/demo/pool/round-00000.parquet")
        ```
    """

    def __init__(self, folder: Path, manifest: list[dict[str, Any]]) -> None:
        self.folder = folder
        self._manifest = manifest
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in _SMALL}  # parts, joined when asked for
        for entry in manifest:
            self._keep(self._read_small(entry))

    @classmethod
    def open(cls, folder: str | Path, *, create: bool = False) -> Pool:
        """The pool in a folder: `<run>/pool`, or the run's own folder.

        Raises: PoolError if there is none (unless `create`), or a file is missing, damaged or not of this pool.
        """
        folder = Path(folder)
        if not (folder / _MANIFEST).exists() and (folder / "pool" / _MANIFEST).exists():
            folder = folder / "pool"
        path = folder / _MANIFEST
        if not path.exists():
            if not create:
                raise PoolError(
                    f"{folder} holds no pool ({_MANIFEST} is missing). Give the folder of a run, or its pool folder."
                )
            folder.mkdir(parents=True, exist_ok=True)
            return cls(folder, [])
        return cls(folder, _read_manifest(path))

    def catch_up(self) -> None:
        """Reads the rounds that another process has added since, and no other.

        Raises: PoolError as `open`, and when the rounds that are known are not those on disk any more.
        """
        manifest = _read_manifest(self.folder / _MANIFEST)
        known = [m["sha256"] for m in manifest[: self.num_rounds]]
        if known != self.hashes():
            raise PoolError(f"The rounds in {self.folder} were changed by another run. Stop it and start again.")
        for entry in manifest[self.num_rounds :]:
            self._keep(self._read_small(entry))
            self._manifest.append(entry)

    # -- rounds

    @property
    def num_rounds(self) -> int:
        return len(self._manifest)

    def __len__(self) -> int:
        return sum(m["rows"] for m in self._manifest)

    def has_round(self, round: int) -> bool:
        return round < self.num_rounds

    def hashes(self) -> list[str]:
        """The SHA-256 of each round's file: what a checkpoint names to say which rounds it saw."""
        return [m["sha256"] for m in self._manifest]

    def metrics(self, round: int) -> dict[str, float]:
        """The figures of a round that are not in its rows, as `append` was given them."""
        return dict(self._manifest[round]["metrics"])

    def append(
        self, round: int, columns: Mapping[str, Sequence[Any]], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Adds the next round.

        Args:
            columns: those of `SCHEMA` (one that is missing is null) and any more; all of one length.
            metrics: figures of the round that its rows do not tell, kept in the manifest.

        Raises: PoolError when it is not the next round, or the disk refuses it: then nothing of it stays.
        """
        if round != self.num_rounds:
            raise PoolError(
                f"Round {round} cannot follow the {self.num_rounds} rounds that the pool in {self.folder} has."
            )
        rows = len(columns["reward"])
        arrays = {"round": pa.array([round] * rows, pa.int32())}
        for f in SCHEMA:
            if f.name != "round":
                arrays[f.name] = pa.array(columns.get(f.name, [None] * rows), f.type)
        for name, values in columns.items():
            if name not in arrays:
                arrays[name] = pa.array(values, pa.float64() if name.startswith("reward/") else pa.string())
        table = pa.table(arrays)
        path = self.folder / _file_name(round)
        try:
            with written_whole(path) as temporary:
                pq.write_table(table, temporary, compression="zstd", row_group_size=16_384)
                digest = sha256(temporary)
            entry = {"round": round, "file": path.name, "rows": rows, "sha256": digest, "metrics": dict(metrics or {})}
            rounds = [*self._manifest, entry]
            with written_whole(self.folder / _MANIFEST) as temporary:
                temporary.write_text(
                    json.dumps({"rounds": rounds, CHECK: checksum({"rounds": rounds})}, indent=1) + "\n",
                    encoding="utf-8",
                )
        except OSError as error:
            path.unlink(missing_ok=True)  # a file that the manifest does not name
            raise PoolError(
                f"Round {round} could not be written to {self.folder} ({error.strerror or error}). Make room or mend"
                " the folder's rights and give the same command again: nothing half-written stays."
            ) from error
        self._manifest.append(entry)
        self._keep(self._small(table))

    # -- one number a row, in memory: what ranking and drawing need

    def _keep(self, columns: dict[str, np.ndarray]) -> None:
        for name, values in columns.items():
            self._columns[name].append(values)

    def _column(self, name: str, dtype: Any) -> np.ndarray:
        """A read-only array: it is the pool's own, since a copy for each reader would cost what the pool holds."""
        parts = self._columns[name]
        if len(parts) != 1:
            parts[:] = [np.concatenate(parts) if parts else np.zeros(0, dtype)]
        column = parts[0].view()
        column.flags.writeable = False
        return column

    @property
    def rewards(self) -> np.ndarray:
        """float64 (rows,), read-only; NaN where the reward functions gave none."""
        return self._column("reward", np.float64)

    @property
    def rounds(self) -> np.ndarray:
        """int32 (rows,)."""
        return np.repeat(np.arange(self.num_rounds, dtype=np.int32), [m["rows"] for m in self._manifest])

    @property
    def held_out(self) -> np.ndarray:
        """bool (rows,), read-only."""
        return self._column("held_out", bool)

    @property
    def prompt_indices(self) -> np.ndarray:
        """int64 (rows,), read-only: equal for samples of one prompt."""
        return self._column("prompt_index", np.int64)

    # -- rows

    def gather(self, rows: np.ndarray, columns: Sequence[str]) -> dict[str, list[Any]]:
        """The columns of these rows, in their order (a row may repeat), in one pass over the files that hold them.

        One group of 16,384 rows is in memory at a time; groups without a row of these are not read.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            wrong = rows.min() if rows.min() < 0 else rows.max()
            raise PoolError(f"Row {wrong} is outside the pool's {len(self)} rows.")
        order = np.argsort(rows, kind="stable")
        ranked = rows[order]
        out: dict[str, list[Any]] = {name: [None] * len(rows) for name in columns}
        ends = np.cumsum([m["rows"] for m in self._manifest])
        for round in np.unique(np.searchsorted(ends, ranked, side="right")):
            entry = self._manifest[round]
            start = ends[round] - entry["rows"]
            inside = slice(*np.searchsorted(ranked, (start, ends[round])))
            for taken, places in self._taken(entry, ranked[inside] - start, list(columns)):
                for name in columns:
                    for i, value in zip(order[inside][places], taken.column(name).to_pylist(), strict=True):
                        out[name][i] = value
        return out

    def to_table(self, rounds: Sequence[int] | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """The samples as a pyarrow table.

        Args: rounds: only these; None: all. columns: only these; None: all, at least those of `SCHEMA`.
        """
        wanted = range(self.num_rounds) if rounds is None else rounds
        for round in wanted:
            if not 0 <= round < self.num_rounds:
                raise PoolError(f"The pool in {self.folder} has no round {round}, only 0 to {self.num_rounds - 1}.")
        tables = [self._read(self._manifest[r], list(columns) if columns is not None else None) for r in wanted]
        return pa.concat_tables(tables, promote_options="default") if tables else SCHEMA.empty_table()

    def verify(self) -> None:
        """Compares every file with its hash. Raises: PoolError that names the first damaged one."""
        for entry in self._manifest:
            path = self.folder / entry["file"]
            if not path.is_file() or sha256(path) != entry["sha256"]:
                raise PoolError(
                    f"{path} is not the file that the run wrote (its hash differs). Restore it from a copy, or start"
                    " the run anew."
                )

    def _taken(self, entry: dict[str, Any], rows: np.ndarray, columns: list[str]) -> Iterator[tuple[pa.Table, slice]]:
        """(the columns of some of a round's rows, which of `rows` they are), row group by row group; rows: sorted."""
        with self._reading(entry):
            file = pq.ParquetFile(self.folder / entry["file"])
            start = 0
            for number in range(file.num_row_groups):
                end = start + file.metadata.row_group(number).num_rows
                places = slice(*np.searchsorted(rows, (start, end)))
                if places.start < places.stop:
                    group = file.read_row_group(number, columns=columns)
                    group.validate(full=True)  # a text that is none would fail far from here
                    yield group.take(pa.array(rows[places] - start)), places
                start = end
            if start != entry["rows"]:
                raise pa.ArrowInvalid(f"{start} rows in place of {entry['rows']}")

    def _read(self, entry: dict[str, Any], columns: list[str] | None) -> pa.Table:
        with self._reading(entry):
            table = pq.ParquetFile(self.folder / entry["file"]).read(columns=columns)
            table.validate(full=True)
            if table.num_rows != entry["rows"]:
                raise pa.ArrowInvalid(f"{table.num_rows} rows in place of {entry['rows']}")
            return table

    def _read_small(self, entry: dict[str, Any]) -> dict[str, np.ndarray]:
        table = self._read(entry, list(_SMALL))
        with self._reading(entry):
            for name in _SMALL:
                if table.column(name).type != SCHEMA.field(name).type:
                    raise pa.ArrowInvalid(f"{name} is of type {table.column(name).type}")
            return self._small(table)

    @staticmethod
    def _small(table: pa.Table) -> dict[str, np.ndarray]:
        return {
            "reward": table.column("reward").to_numpy(),
            "held_out": table.column("held_out").fill_null(False).to_numpy(),
            "prompt_index": table.column("prompt_index").fill_null(-1).to_numpy(),
        }

    @contextmanager
    def _reading(self, entry: dict[str, Any]) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException, KeyError, ValueError, OverflowError) as error:
            raise PoolError(
                f"{self.folder / entry['file']} (round {entry['round']}) cannot be read ({first_line(error)})."
                " Restore it from a copy, or start the run anew."
            ) from error


class Journal:
    """What a pass has finished, a line on disk for each batch: a stop or a kill loses one batch at most.

    Args:
        begun_with: told when the file is new; `begun` then holds what it was begun with, now or by an earlier call.
        error: raised when the disk refuses a line.
    """

    def __init__(
        self,
        path: Path,
        begun_with: Callable[[], dict[str, Any]] = dict,
        error: type[QuarkError] = DataError,
    ) -> None:
        self.path = path
        self.error = error
        self.lines: list[dict[str, Any]] = []
        kept = 0
        whole = path.read_bytes() if path.is_file() else b""
        for line in whole.splitlines(keepends=True):
            told = _checked_line(line)
            if told is None:
                break
            self.lines.append(told)
            kept += len(line)
        if b"\n" in whole[kept:].rstrip(b"\n"):  # a kill tears the last line alone
            warnings.warn(
                f"{path}, line {len(self.lines) + 1}, is damaged: it is made again, and so is what follows it.",
                stacklevel=3,
            )
        if kept < len(whole):  # the next line must not be joined to a torn one
            with written_whole(path) as temporary:
                temporary.write_bytes(whole[:kept])
        if self.lines:
            self.begun = self.lines.pop(0)
        else:
            self.begun = begun_with()
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(self.begun)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within it, what a line lacks is one clear error."""
        try:
            yield
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise self.error(
                f"{self.path} is not what was written there ({error!r:.80}). Delete it: what it holds is made again."
            ) from error

    def add(self, **line: Any) -> None:
        """Keeps one batch; it is on the disk when this returns. Raises: `error` when the disk refuses it."""
        self._write(line)
        self.lines.append(line)

    def _write(self, line: dict[str, Any]) -> None:
        try:
            append_line(self.path, _line(line))
        except OSError as error:
            raise self.error(
                f"A batch could not be kept in {self.path} ({error.strerror or error}). Make room or mend the folder's"
                " rights and give the same command again: it goes on from the last batch that was kept."
            ) from error


class PartialRound:
    """What one rank has explored of a round that is not finished, batch by batch on disk; or of held-out prompts.

    Args:
        round: its number; or that of the step at which held-out prompts are measured, `of` the base or of that step.
        key: what the batches depend on; what is on disk under another key is forgotten, which a warning tells. Under
            another "chunk" or "reward_sources" alone the completions stay, and only their scores go.
    """

    def __init__(self, folder: Path, round: int, rank: int, key: Mapping[str, Any], of: str = "round") -> None:
        self.path = partial_path(folder, round, rank, of)
        self.completions: dict[int, list[int]] = {}  # by the sample's index
        self.scores: dict[int, dict[str, Any]] = {}  # by the number of the chunk
        self.seconds = 0.0  # of sampling
        self._journal = Journal(self.path, lambda: dict(key), PoolError)
        with self._journal.reading():
            self._follow(key, round, rank, of)
        self.key = self._journal.begun  # with the rows of a batch that it was begun with
        with self._journal.reading():
            for line in self._journal.lines:
                if "indices" in line:
                    self.completions |= dict(zip(line["indices"], line["completions"], strict=True))
                    self.seconds += float(line["seconds"])
                else:
                    self.scores[int(line["chunk"])] = line

    def _follow(self, key: Mapping[str, Any], round: int, rank: int, of: str) -> None:
        """Makes the journal that of the key, and tells what is lost by it."""
        begun, lines = self._journal.begun, self._journal.lines
        differing = [name for name in sorted({*begun, *key} - {"rows"}) if begun.get(name) != key.get(name)]
        if not differing:
            return
        samples = [line for line in lines if "indices" in line]
        if set(differing) <= {"chunk", "reward_sources"}:
            again, num = "scored", sum(len(line["reward"]) for line in lines if "indices" not in line)
            whole = [{**key, "rows": begun["rows"]}, *samples]
        else:
            again, num = "sampled and scored", sum(len(line["indices"]) for line in samples)
            if rank == 0:  # for a rank that is there no more nobody else tells it
                num += sum(_num_samples(path) for path in _partials(self.path.parent, round, key["processes"], of))
            whole = [dict(key)]
        if num:
            changes = ", ".join(f"{name}: {begun.get(name)} before, {key.get(name)} now" for name in differing)
            held_out = {"base": "the base on held-out prompts", "step": f"held-out prompts at step {round}"}
            what = held_out.get(of, f"round {round + 1}")
            warnings.warn(f"{num:,} samples that were kept of {what} are {again} again ({changes}).", stacklevel=4)
        with written_whole(self.path) as temporary:  # a kill must not lose what stays
            temporary.write_text("".join(f"{_line(line)}\n" for line in whole), encoding="utf-8")
        self._journal = Journal(self.path, lambda: dict(key), PoolError)

    def _add(self, line: dict[str, Any]) -> None:
        self._journal.add(**line)

    def add_completions(self, indices: Sequence[int], completions: Sequence[list[int]], seconds: float) -> None:
        self._add({"indices": list(indices), "completions": list(completions), "seconds": seconds})
        self.completions |= dict(zip(indices, completions, strict=True))
        self.seconds += seconds

    def add_scores(self, chunk: int, scores: dict[str, Any]) -> None:
        self.scores[chunk] = {"chunk": chunk, **scores}
        self._add(self.scores[chunk])

    @staticmethod
    def remove(pool: Path, round: int) -> None:
        """Of all ranks, those too that an earlier part of the run had more."""
        for path in _partials(pool, round):
            path.unlink(missing_ok=True)

    @staticmethod
    def forget_scores(path: Path) -> int:
        """Keeps a journal's completions alone: their rewards cannot be used, and a mended reward gives others.

        Returns: how many had a reward.
        """
        told = [_checked_line(line) for line in path.read_bytes().splitlines(keepends=True)]
        lines = [line for line in itertools.takewhile(lambda line: line is not None, told) if line is not None]
        with written_whole(path) as temporary:
            temporary.write_text(
                "".join(f"{_line(line)}\n" for line in lines if "rewards" not in line), encoding="utf-8"
            )
        return sum(len(line["reward"]) for line in lines if "rewards" in line)


def partial_path(folder: Path, round: int, rank: int | str, of: str = "round") -> Path:
    """Where a rank keeps a round that is not finished, or held-out prompts that are not measured."""
    return folder / f"{of}-{round:05d}.rank-{rank}.partial.jsonl"


def _partials(folder: Path, round: int, first: int = 0, of: str = "round") -> list[Path]:
    """Those of the ranks from `first` on."""
    there = folder.glob(partial_path(folder, round, "*", of).name)
    ranks = [path.name.split(".")[1].removeprefix("rank-") for path in there]
    return [partial_path(folder, round, int(rank), of) for rank in ranks if rank.isdecimal() and int(rank) >= first]


def _num_samples(path: Path) -> int:
    lines = map(_checked_line, path.read_bytes().splitlines(keepends=True))
    return sum(len(line["indices"]) for line in lines if line and "indices" in line)


def read_initial(source: str | Path | pa.Table | Any) -> dict[str, list[Any]]:
    """A user's own scored data for round 0: columns `prompt`, `completion` and `reward` of a file, data set or table.

    Raises: DataError when a column is missing, a reward is no number, or there are no rows.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.is_file():
            raise DataError(
                f"There is no file {path} for initial_pool. Give a Parquet or JSONL file of scored completions."
            )
        try:
            if path.suffix == ".parquet":
                table = pq.read_table(path)
            else:
                table = pa.Table.from_pylist([parsed(line) for _, line in numbered_lines(path)])
        except (ValueError, TypeError, AttributeError, OverflowError, OSError, pa.ArrowException) as error:
            raise DataError(
                f"{path} could not be read as scored completions ({first_line(error)}). Give Parquet, or JSONL"
                " of lines with prompt, completion and reward."
            ) from error
    else:
        path = Path("initial_pool")
        table = source if isinstance(source, pa.Table) else pa.Table.from_pydict(source.to_dict())
    missing = {"prompt", "completion", "reward"} - set(table.column_names)
    if missing:
        raise DataError(
            f"initial_pool has no column {', '.join(sorted(missing))}. It needs prompt, completion and reward."
        )
    if not table.num_rows:
        raise DataError("initial_pool has no rows, so round 0 would be empty. Leave it out to sample round 0.")
    try:
        table.validate(full=True)
        data = {name: table.column(name).to_pylist() for name in ("prompt", "completion", "reward")}
    except (ValueError, OverflowError, pa.ArrowException) as error:
        raise DataError(f"{path} holds what cannot be read ({first_line(error)}). Mend the row.") from error
    for name, kinds in (("prompt", (str, list)), ("completion", (str,))):
        for number, value in enumerate(data[name]):
            if not isinstance(value, kinds):
                shown = str(value)[:40]
                raise DataError(f"initial_pool: the {name} of row {number} is {shown}, which is no text. Mend the row.")
    for number, reward in enumerate(data["reward"]):
        if reward is not None and (not isinstance(reward, (int, float)) or not np.isfinite(reward)):
            raise DataError(
                f"initial_pool: the reward of row {number} is {reward!r}, which cannot be ranked. Give a finite number."
            )
    return data


def _line(told: Mapping[str, Any]) -> str:
    """A journal's line, with its checksum."""
    return json.dumps({**told, CHECK: checksum(told)}, allow_nan=False)


def _checked_line(line: bytes) -> dict[str, Any] | None:
    """What a journal's line holds; None when it is torn or changed."""
    try:
        told = parsed(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return told if isinstance(told, dict) and told.pop(CHECK, None) == checksum(told) else None


def _read_manifest(path: Path) -> list[dict[str, Any]]:
    try:
        data = parsed(path.read_bytes())
        rounds = data["rounds"]
        if data.get(CHECK) not in (None, checksum({"rounds": rounds})):
            raise ValueError("its checksum differs")
        manifest = [
            {
                "round": int(m["round"]),
                "file": str(m["file"]),
                "rows": int(m["rows"]),
                "sha256": str(m["sha256"]),
                "metrics": dict(m.get("metrics", {})),
            }
            for m in rounds
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise PoolError(
            f"{path} is damaged ({error!r:.200}). Restore it from a copy, or start the run anew."
        ) from error
    for number, entry in enumerate(manifest):
        if entry["round"] != number or entry["file"] != _file_name(number):
            raise PoolError(f"{path} does not list the rounds 0, 1, 2 ... in order. Restore it from a copy.")
    return manifest


def _file_name(round: int) -> str:
    return f"round-{round:05d}.parquet"
