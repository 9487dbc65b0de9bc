"""What a run's folder says when the disk refuses a file, and its metrics."""

import errno

import pytest

from quark_lm.errors import DataError, TrainingError
from quark_lm.run_folder import MetricsFile, disk_errors


def told(folder, number, path=None):
    with pytest.raises((TrainingError, OSError)) as caught, disk_errors(folder):
        raise OSError(number, "it refuses", *([str(path)] if path else []))
    return caught.value


def test_a_refused_file_is_told_with_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "a"
    for inside in (run / "x", "runs/a/x"):
        assert f"A file could not be written to {run} (" in str(told(run, errno.EACCES, inside))
    assert f"A file could not be written to {run} (" in str(told(run, errno.ENOSPC))
    elsewhere = told(run, errno.ENOSPC, "/elsewhere/x")
    assert isinstance(elsewhere, TrainingError)
    assert str(elsewhere).startswith("/elsewhere/x could not be written (")


def test_a_closed_file_elsewhere_is_not_the_runs(tmp_path):
    for path in (tmp_path / "ab" / "x", None):
        assert type(told(tmp_path / "a", errno.EACCES, path)) is PermissionError
    assert isinstance(told(tmp_path / "a" / "b", errno.EACCES, tmp_path / "a"), TrainingError)


def test_blank_lines_of_the_metrics_are_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 0}\n\n{"round": 1}\n')
    assert MetricsFile(path).lines() == [{"round": 0}, {"round": 1}]
    path.write_text('{"round": 0}\n\n{"round"\n{"round": 1}\n')
    with pytest.raises(DataError, match="line 3, is damaged"):
        MetricsFile(path).lines()
