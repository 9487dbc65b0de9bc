"""What a run's folder says when the disk refuses a file, and its metrics."""

import errno
import json

import pytest

from quark_lm.errors import ConfigError, DataError, TrainingError
from quark_lm.pool import PartialRound
from quark_lm.run_folder import MetricsFile, claim, disk_errors


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


def begun(folder):
    """A run's folder that has come to the journal of its first round."""
    claim(folder, {"seed": 0, "learning_rate": 1e-3})
    (folder / "pool").mkdir()
    return PartialRound(folder / "pool", 0, 0, {"samples": 2, "processes": 1, "chunk": 2, "rows": 2})


def test_samples_of_an_unfinished_round_make_a_folder_a_runs(tmp_path):
    journal = begun(tmp_path)
    journal.add_completions([0, 1], [[5], [6]], 0.5)
    content = journal.path.read_bytes()
    with pytest.raises(ConfigError, match=r"another run .*seed: 0 there, 1 here"):
        claim(tmp_path, {"seed": 1, "learning_rate": 2e-3})
    assert journal.path.read_bytes() == content
    claim(tmp_path, {"seed": 0, "learning_rate": 1e-3})
    assert journal.path.read_bytes() == content


def test_samples_of_an_unfinished_round_go_to_a_run_that_would_draw_the_same(tmp_path):
    journal = begun(tmp_path)
    journal.add_completions([0, 1], [[5], [6]], 0.5)
    content = journal.path.read_bytes()
    journal.add_scores(0, {"reward": [0.5, 0.5], "rewards": {}})
    journal.path.write_bytes(journal.path.read_bytes() + b'{"chunk": 1, "rewa')  # torn
    scored = journal.path.read_bytes()
    claim(tmp_path, {"seed": 0, "learning_rate": 2e-3, "scorers": ["a"]})
    assert json.loads((tmp_path / "run.json").read_text())["learning_rate"] == 2e-3
    assert journal.path.read_bytes() == scored  # no setting of learning makes a reward another
    with pytest.warns(UserWarning, match="2 samples that were kept in .* are scored by the other reward"):
        claim(tmp_path, {"seed": 0, "learning_rate": 2e-3, "scorers": ["b"]})
    assert journal.path.read_bytes() == content


@pytest.mark.parametrize("torn", [b"", b'{"indices": [0, 1], "comple'])
def test_a_folder_that_came_to_no_samples_is_given_away(torn, tmp_path):
    path = begun(tmp_path).path
    path.write_bytes(path.read_bytes() + torn)
    claim(tmp_path, {"seed": 0, "learning_rate": 2e-3})
    assert json.loads((tmp_path / "run.json").read_text())["learning_rate"] == 2e-3
    assert not path.exists()
