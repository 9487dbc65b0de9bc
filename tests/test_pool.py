"""The pool on disk: what goes in comes out, nothing half-written stays, and what is damaged is named."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quark_lm import Pool
from quark_lm.errors import DataError, PoolError
from quark_lm.pool import SCHEMA, PartialRound, read_initial


def columns(num, start=0, **more):
    """A round of `num` rows whose values tell their numbers."""
    numbers = range(start, start + num)
    return {
        "prompt_index": [n % 7 for n in numbers],
        "prompt_ids": [[n, n + 1] for n in numbers],
        "completion_ids": [[n] * (n % 3 + 1) for n in numbers],
        "token_at": [0] * num,
        "prompt": [f"prompt {n}" for n in numbers],
        "completion": [f" completion {n}" for n in numbers],
        "reward": [n / 10 for n in numbers],
        "held_out": [n % 5 == 0 for n in numbers],
        **more,
    }


@pytest.fixture
def pool(tmp_path):
    """Three rounds of 4, 3 and 5 rows."""
    pool = Pool.open(tmp_path / "pool", create=True)
    start = 0
    for round, num in enumerate((4, 3, 5)):
        pool.append(round, columns(num, start))
        start += num
    return pool


def files(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# -- a round that is not finished

KEY = {"samples": 4, "processes": 2, "chunk": 2, "rows": 8}


def begun(folder, rank=0):
    """Two samples of a rank, one chunk of them scored."""
    kept = PartialRound(folder, 3, rank, KEY)
    kept.add_completions([0, 1], [[5], [6]], 0.5)
    kept.add_scores(0, {"reward": [1.0, 2.0], "rewards": {}, "extras": {}, "figures": {}})


def test_the_same_key_finds_what_was_kept_whatever_the_rows_of_a_batch(tmp_path):
    begun(tmp_path)
    kept = PartialRound(tmp_path, 3, 0, {**KEY, "rows": 16})
    assert (kept.completions, list(kept.scores), kept.key) == ({0: [5], 1: [6]}, [0], KEY)


def test_another_chunk_costs_the_scores_alone_and_says_so(tmp_path):
    begun(tmp_path)
    now = {**KEY, "chunk": 4, "rows": 16}
    with pytest.warns(UserWarning, match=r"^2 samples .* round 4 are scored again \(chunk: 2 before, 4 now\)"):
        kept = PartialRound(tmp_path, 3, 0, now)
    assert (kept.completions, kept.scores, kept.seconds) == ({0: [5], 1: [6]}, {}, 0.5)
    assert kept.key == {**now, "rows": 8}  # the batches stay those that it was begun with
    kept.add_scores(0, {"reward": [1.0, 2.0]})
    again = PartialRound(tmp_path, 3, 0, now)
    assert (again.completions, list(again.scores)) == (kept.completions, [0])


def test_another_number_of_processes_samples_again_and_says_how_many(tmp_path):
    begun(tmp_path)
    begun(tmp_path, rank=1)
    with pytest.warns(UserWarning, match=r"^4 samples .* sampled and scored again \(processes: 2 before, 1 now\)"):
        kept = PartialRound(tmp_path, 3, 0, {**KEY, "processes": 1})
    assert (kept.completions, kept.scores, kept.seconds) == ({}, {}, 0.0)
    PartialRound(tmp_path, 3, 0, {**KEY, "processes": 1})  # once is enough


def test_nothing_is_said_of_a_journal_without_samples(tmp_path):
    PartialRound(tmp_path, 3, 0, KEY)
    PartialRound(tmp_path, 3, 0, {**KEY, "chunk": 4})
    PartialRound(tmp_path, 3, 0, {**KEY, "processes": 1})


def test_the_journals_of_all_ranks_of_a_round_are_removed_and_no_others(tmp_path):
    for rank in (0, 1, 11):
        begun(tmp_path, rank)
    PartialRound(tmp_path, 30, 0, KEY)
    PartialRound.remove(tmp_path, 3)
    assert files(tmp_path) == ["round-00030.rank-0.partial.jsonl"]


# -- rounds


def test_what_goes_in_comes_out_also_after_it_was_opened_again(pool):
    for opened in (pool, Pool.open(pool.folder), Pool.open(pool.folder.parent)):
        assert len(opened) == 12
        assert opened.num_rounds == 3
        assert opened.rounds.tolist() == [0] * 4 + [1] * 3 + [2] * 5
        np.testing.assert_array_equal(opened.rewards, np.arange(12) / 10)
        assert opened.held_out.tolist() == [n % 5 == 0 for n in range(12)]
        assert opened.prompt_indices.tolist() == [n % 7 for n in range(12)]
        table = opened.to_table()
        assert table.column("completion_ids").to_pylist() == [[n] * (n % 3 + 1) for n in range(12)]
        assert table.column("round").to_pylist() == opened.rounds.tolist()
        assert set(SCHEMA.names) <= set(table.column_names)


def test_any_parquet_reader_opens_a_round(pool):
    table = pq.read_table(pool.folder / "round-00001.parquet")
    assert table.column("prompt").to_pylist() == ["prompt 4", "prompt 5", "prompt 6"]


def test_chosen_rounds_come_in_the_order_that_was_asked(pool):
    assert pool.to_table([2, 0]).column("round").to_pylist() == [2] * 5 + [0] * 4
    assert pool.to_table([]).num_rows == 0
    for round in (3, -1):
        with pytest.raises(PoolError, match=f"has no round {round}, only 0 to 2"):
            pool.to_table([round])


def test_an_empty_pool_answers_with_nothing(tmp_path):
    pool = Pool.open(tmp_path, create=True)
    assert len(pool) == pool.num_rounds == len(pool.rewards) == pool.to_table().num_rows == 0
    assert not pool.has_round(0)
    assert pool.gather(np.zeros(0, int), ["reward"]) == {"reward": []}


def test_rows_without_a_reward_are_nan_in_memory_and_null_on_disk(tmp_path):
    pool = Pool.open(tmp_path, create=True)
    pool.append(0, columns(3, reward=[0.5, None, 0.25]))
    for opened in (pool, Pool.open(tmp_path)):
        assert np.isnan(opened.rewards).tolist() == [False, True, False]
    assert pool.to_table().column("reward").to_pylist() == [0.5, None, 0.25]


def test_columns_that_are_left_out_have_a_meaning(tmp_path):
    pool = Pool.open(tmp_path, create=True)
    pool.append(0, {"prompt_ids": [[1], [2]], "completion_ids": [[3], [4]], "reward": [None, None]})
    for opened in (pool, Pool.open(tmp_path)):
        assert opened.held_out.tolist() == [False, False]
        assert opened.held_out.dtype == bool
        assert opened.prompt_indices.tolist() == [-1, -1]
        assert np.isnan(opened.rewards).all()


def test_rounds_may_have_columns_of_their_own(tmp_path):
    pool = Pool.open(tmp_path, create=True)
    pool.append(0, columns(2, **{"reward/short": [1.0, None], "extra/note": ["a", "b"]}))
    pool.append(1, columns(1, 2, **{"reward/polite": [3.0]}))
    table = Pool.open(tmp_path).to_table()
    assert table.column("reward/short").to_pylist() == [1.0, None, None]
    assert table.column("extra/note").to_pylist() == ["a", "b", None]
    assert table.column("reward/polite").to_pylist() == [None, None, 3.0]


def test_a_round_follows_the_last_one_and_no_other(pool):
    for round in (0, 2, 4):
        with pytest.raises(PoolError, match=f"Round {round} cannot follow the 3 rounds"):
            pool.append(round, columns(1))
    assert len(pool) == 12


def test_appending_reads_nothing_of_the_rounds_before(pool):
    for path in pool.folder.glob("*.parquet"):
        path.unlink()
    pool.append(3, columns(2, 12))
    np.testing.assert_array_equal(pool.rewards, np.arange(14) / 10)


def test_the_columns_in_memory_are_one_array_that_nobody_can_change(pool):
    for name in ("rewards", "held_out", "prompt_indices"):
        column = getattr(pool, name)
        assert np.shares_memory(column, getattr(pool, name))
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 1


def test_another_process_catches_up_by_the_new_rounds_alone(pool):
    other = Pool.open(pool.folder)
    pool.append(3, columns(2, 12))
    pool.append(4, columns(1, 14))
    (pool.folder / "round-00001.parquet").unlink()  # was read already
    other.catch_up()
    assert (other.num_rounds, len(other)) == (5, 15)
    np.testing.assert_array_equal(other.rewards, np.arange(15) / 10)
    other.catch_up()
    assert other.hashes() == pool.hashes()


def test_a_pool_that_another_run_changed_does_not_catch_up(pool, tmp_path):
    twin = Pool.open(tmp_path / "twin", create=True)
    twin.append(0, columns(9, 50))
    shutil.copy(twin.folder / "manifest.json", pool.folder)
    with pytest.raises(PoolError, match="were changed by another run"):
        pool.catch_up()


# -- gather


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(rows=st.lists(st.integers(0, 11), max_size=30))
def test_gathered_rows_come_in_their_order_and_may_repeat(pool, rows):
    got = pool.gather(np.array(rows, dtype=int), ["prompt", "completion_ids"])
    assert got == {
        "prompt": [f"prompt {n}" for n in rows],
        "completion_ids": [[n] * (n % 3 + 1) for n in rows],
    }


def test_rows_of_a_large_round_are_found_across_its_row_groups(tmp_path):
    num = 40_000
    pool = Pool.open(tmp_path, create=True)
    numbers = list(range(num))
    pool.append(0, {"prompt_index": numbers, "reward": [float(n) for n in numbers], "held_out": [False] * num})
    assert pq.ParquetFile(tmp_path / "round-00000.parquet").num_row_groups > 1
    rows = np.random.default_rng(0).integers(num, size=500)
    assert pool.gather(rows, ["prompt_index"])["prompt_index"] == rows.tolist()


def test_only_the_files_that_hold_the_rows_are_read(pool):
    (pool.folder / "round-00001.parquet").unlink()
    assert pool.gather(np.array([0, 11]), ["prompt"]) == {"prompt": ["prompt 0", "prompt 11"]}
    with pytest.raises(PoolError, match=r"round-00001.parquet \(round 1\) cannot be read"):
        pool.gather(np.array([0, 5]), ["prompt"])


def test_only_the_row_groups_that_hold_the_rows_are_read(tmp_path, monkeypatch):
    num = 40_000
    pool = Pool.open(tmp_path, create=True)
    pool.append(0, {"prompt_index": list(range(num)), "reward": [0.5] * num})
    read, numbers = pq.ParquetFile.read_row_group, []
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda f, i, **k: (numbers.append(i), read(f, i, **k))[1])
    rows = np.array([num - 1, 5, num - 2, 5])
    assert pool.gather(rows, ["prompt_index"])["prompt_index"] == rows.tolist()
    assert numbers == [0, 2]


# Prints the most that gathering 1,000 rows held, in bytes. In a process of its own: what other tests left would be
# freed in between and counted against it.
HELD = """
import sys
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from quark_lm import Pool

rounds = int(sys.argv[1])
pool = Pool.open("pool", create=True)
for round in range(rounds):
    ids = np.random.default_rng(round).integers(0, 49_152, (20_000, 8), dtype=np.int32)
    pool.append(round, {"completion_ids": list(ids), "reward": np.zeros(len(ids))})
pool, read, held = Pool.open("pool"), pq.ParquetFile.read_row_group, []

def watched(file, number, **options):
    group = read(file, number, **options)
    held.append(pa.total_allocated_bytes())
    return group

pq.ParquetFile.read_row_group, before = watched, pa.total_allocated_bytes()
pool.gather(np.random.default_rng(0).integers(0, len(pool), 1000), ["completion_ids"])
assert len(held) == 2 * rounds, held
print(max(held) - before)
"""


def test_the_memory_of_gathering_does_not_grow_with_the_pool(tmp_path):
    def peak(rounds):
        (folder := tmp_path / str(rounds)).mkdir()
        command = [sys.executable, "-c", HELD, str(rounds)]
        return int(subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout)

    one, twelve = peak(1), peak(12)  # a reading thread may still hold a group: up to twice as much was seen
    assert 0 < twelve < 4 * one


@pytest.mark.parametrize("row", [12, -1])
def test_a_row_outside_the_pool_is_refused(pool, row):
    with pytest.raises(PoolError, match=f"Row {row} is outside the pool's 12 rows"):
        pool.gather(np.array([3, row]), ["prompt"])


# -- truncate and verify


def test_verify_passes_what_was_written_and_names_what_was_changed(pool):
    pool.verify()
    path = pool.folder / "round-00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index("reward"), "reward", pa.array([9.0, 9.0, 9.0])), path)
    with pytest.raises(PoolError, match=r"round-00001.parquet is not the file that the run wrote"):
        Pool.open(pool.folder).verify()


def test_the_hashes_name_each_rounds_content(pool, tmp_path):
    twin = Pool.open(tmp_path / "twin", create=True)
    twin.append(0, columns(4))
    twin.append(1, columns(3, 99))
    assert twin.hashes()[0] == pool.hashes()[0]
    assert twin.hashes()[1] != pool.hashes()[1]


# -- a disk that refuses


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("fails", ["the round's file", "the round's place", "the manifest's place"])
def test_a_write_that_fails_leaves_nothing_and_can_be_tried_again(pool, monkeypatch, fails):
    before = files(pool.folder), (pool.folder / "manifest.json").read_text()
    with monkeypatch.context() as patch:
        if fails == "the round's file":
            patch.setattr(pq, "write_table", full)
        else:
            replace, name = os.replace, "manifest" if "manifest" in fails else "round"
            patch.setattr(os, "replace", lambda a, b: full() if name in str(b) else replace(a, b))
        with pytest.raises(PoolError, match=r"Round 3 could not be written .* \(No space left on device\)") as caught:
            pool.append(3, columns(2, 12))
    assert "\n" not in str(caught.value)
    assert (files(pool.folder), (pool.folder / "manifest.json").read_text()) == before
    assert len(pool) == len(pool.rewards) == len(Pool.open(pool.folder)) == 12
    pool.append(3, columns(2, 12))
    assert len(Pool.open(pool.folder)) == 14


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB; skips where it cannot be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if mount is None or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, capture_output=True)


def test_a_full_disk_is_one_clear_error_and_the_pool_goes_on_when_there_is_room(small_disk):
    pool = Pool.open(small_disk, create=True)
    pool.append(0, columns(3))
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while file.write(b"x" * 1024) == 1024 and ballast.stat().st_size < 40_000:
            pass
    rng = np.random.default_rng(0)
    ids = [rng.integers(100_000, size=50).tolist() for _ in range(100)]
    big = columns(100, 3, completion_ids=ids)
    with pytest.raises(PoolError, match=r"Round 1 could not be written .*Make room"):
        pool.append(1, big)
    assert files(small_disk) == ["ballast", "manifest.json", "round-00000.parquet"]
    assert len(Pool.open(small_disk)) == 3
    ballast.unlink()
    pool.append(1, big)
    Pool.open(small_disk).verify()


def test_a_killed_write_leaves_a_partial_file_that_nobody_reads(pool):
    (pool.folder / "round-00003.parquet.partial").write_bytes(b"half")
    (pool.folder / "round-00003.parquet").write_bytes(b"whole, but the manifest was not written any more")
    opened = Pool.open(pool.folder)
    assert opened.num_rounds == 3
    opened.append(3, columns(2, 12))
    Pool.open(pool.folder).verify()
    assert not list(pool.folder.glob("*.partial"))


# -- damage


def test_a_folder_without_a_pool_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(PoolError, match=r"holds no pool \(manifest.json is missing\)"):
            Pool.open(folder)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("damage", ["cut", "emptied", "garbled", "missing", "other rows"])
def test_a_damaged_round_is_named(pool, damage):
    path = pool.folder / "round-00001.parquet"
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "other rows":
        shutil.copy(pool.folder / "round-00002.parquet", path)
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "emptied": b"", "garbled": b"\0" * len(whole)}[damage])
    with pytest.raises(PoolError, match=r"round-00001.parquet \(round 1\) cannot be read") as caught:
        Pool.open(pool.folder)
    assert "\n" not in str(caught.value)


ENTRY = {"round": 0, "file": "round-00000.parquet", "rows": 4, "sha256": "0"}
MANIFESTS = {
    "cut": '{"rounds": [',
    "empty": "",
    "a list": "[]",
    "no rounds": "{}",
    "rounds are a number": '{"rounds": 3}',
    "an entry is a word": '{"rounds": ["round-00000.parquet"]}',
    "an entry lacks its rows": json.dumps({"rounds": [{k: v for k, v in ENTRY.items() if k != "rows"}]}),
    "rows are a word": json.dumps({"rounds": [{**ENTRY, "rows": "many"}]}),
    "out of order": json.dumps({"rounds": [{**ENTRY, "round": 1}]}),
    "a file elsewhere": json.dumps({"rounds": [{**ENTRY, "file": "../../secret.parquet"}]}),
    "not UTF-8": b"\xff\xfe{",
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_damaged_manifest_is_named(pool, kind):
    content = MANIFESTS[kind]
    (pool.folder / "manifest.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PoolError, match=r"manifest.json (is damaged|does not list)") as caught:
        Pool.open(pool.folder)
    assert "\n" not in str(caught.value)


# -- a user's own data

OWN = {"prompt": ["a", "b"], "completion": [" c", " d"], "reward": [0.5, None]}


@pytest.mark.parametrize("form", ["table", "dataset", "jsonl", "parquet"])
def test_scored_data_is_read_from_tables_data_sets_and_files(tmp_path, form):
    source = pa.table(OWN)
    if form == "dataset":
        from datasets import Dataset

        source = Dataset.from_dict(OWN)
    elif form == "jsonl":
        source = tmp_path / "own.jsonl"
        rows = [dict(zip(OWN, values, strict=True)) for values in zip(*OWN.values(), strict=True)]
        source.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif form == "parquet":
        source = tmp_path / "own.parquet"
        pq.write_table(pa.table({**OWN, "more": [1, 2]}), source)
    assert read_initial(source) == OWN


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reward": [0.5, float("nan")]}, "reward of row 1 is nan, which cannot be ranked"),
        ({"reward": ["good", "bad"]}, "reward of row 0 is 'good'"),
        ({"reward": [0.5, float("inf")]}, "reward of row 1 is inf"),
        ({"prompt": [], "completion": [], "reward": []}, "initial_pool has no rows"),
        ({"prompt": ["a", None]}, "prompt of row 1 is None"),
        ({"completion": [None, "b"]}, "completion of row 0 is None"),
        ({"completion": [1, 2]}, "completion of row 0 is 1"),
    ],
)
def test_scored_data_that_cannot_be_used_is_refused(change, words):
    with pytest.raises(DataError, match=words):
        read_initial(pa.table({**OWN, **change}))


@pytest.mark.parametrize("column", OWN)
def test_a_missing_column_of_scored_data_is_named(column):
    with pytest.raises(DataError, match=f"initial_pool has no column {column}"):
        read_initial(pa.table({name: values for name, values in OWN.items() if name != column}))


def test_a_file_of_scored_data_that_is_missing_or_broken_is_named(tmp_path):
    with pytest.raises(DataError, match=r"There is no file .*none.jsonl for initial_pool"):
        read_initial(tmp_path / "none.jsonl")
    for name in ("broken.jsonl", "broken.parquet"):
        (tmp_path / name).write_text('{"prompt": ')
        with pytest.raises(DataError, match=f"{name} could not be read as scored completions") as caught:
            read_initial(tmp_path / name)
        assert "\n" not in str(caught.value)
