"""A full disk, in real processes: on a small file system, and by a limit on the size of files.

One run meets a full disk at one place after another; each time room is made and the same command is given again.
"""

import json
import os
import subprocess

import pytest
from faults.processes import Fault, end, one_line, quark, train

from quark_lm.run_folder import last_checkpoint, what_is_wrong

# Where it becomes full: the count-th call after the command was given again; words of the one line that comes of it.
PLACES = {
    "the claim": ("quark_lm.trainer:claim", 1, "run.json|could not be written"),
    "the metrics' first line": ("quark_lm.run_folder:MetricsFile.append", 1, "could not be written"),
    "the journal of a round": ("quark_lm.pool:Journal.__init__", 1, "could not be kept|could not be written"),
    "a round of the pool": ("quark_lm.pool:Pool.append", 1, "Round 0 could not be written"),
    "the weights of a checkpoint": ("quark_lm.trainer:QuarkTrainer.save_model", 1, "could not be written"),
    "the optimizer of a checkpoint": (
        "quark_lm.trainer:QuarkTrainer._save_optimizer_and_scheduler",
        1,
        "could not be written",
    ),
    "the marker of a checkpoint": ("quark_lm.run_folder:write_marker", 1, "could not be written"),
    "another round of the pool": ("quark_lm.pool:Pool.append", 1, "Round 1 could not be written"),
    "the finished model": ("quark_lm.export:save", 1, "model could not be written"),
}


def test_a_small_file_system_that_fills_up_stops_the_run_which_goes_on_with_room(
    things, whole_end, small_disk, tmp_path
):
    argv = train(things, small_disk / "run")
    for place, (where, count, words) in PLACES.items():
        done = quark(argv, Fault(where, count, "fill", str(small_disk)))
        line = one_line(done)
        assert any(word in line for word in words.split("|")), (place, line)
        assert "No space left on device" in line or "the disk is full" in line, (place, line)
        assert "give the same command again" in line, (place, line)
        nothing_half_written(small_disk / "run")
        (small_disk / "ballast").unlink()
    assert quark(argv).code == 0
    assert end(small_disk / "run") == whole_end


def nothing_half_written(folder):
    """No file that is read is torn: each is as the run wrote it, or is known not to be."""
    for path in (folder / "metrics.jsonl", *folder.glob("pool/*.jsonl")):
        if path.is_file():
            text = path.read_text()
            assert not text or text.endswith("\n"), path
            for line in text.splitlines():
                json.loads(line)
    newest, _ = last_checkpoint(folder)
    assert newest is None or what_is_wrong(newest) is None
    assert not (folder / "model" / "model.safetensors").exists() or (folder / "results.json").exists()


# Bytes that a file may have, and where that begins.
LIMITS = {
    "a line of the journal": ("quark_lm.pool:PartialRound.add_completions", 2, "700"),
    "a line of the metrics": ("quark_lm.run_folder:MetricsFile.append", 4, "1000"),
    "the weights": ("quark_lm.trainer:QuarkTrainer.save_model", 1, "50000"),
    "the results": ("quark_lm.run_folder:write_json", 2, "300"),
}


def test_files_that_may_not_grow_stop_the_run_which_goes_on_when_they_may(things, whole_end, tmp_path):
    argv = train(things, tmp_path / "run")
    stopped = 0
    for place, (where, count, size) in LIMITS.items():
        done = quark(argv, Fault(where, count, "limit", size))
        line = one_line(done)
        assert "give the same command again" in line, (place, line)
        nothing_half_written(tmp_path / "run")
        stopped += 1
    assert stopped == len(LIMITS)
    assert quark(argv).code == 0
    assert end(tmp_path / "run") == whole_end


def test_an_evaluation_stops_on_a_full_disk_and_goes_on_with_room(things, whole, small_disk, tmp_path):
    def argv(folder):
        return [
            *("evaluate", str(whole), "--prompts", str(things / "prompts.jsonl"), "--num-generations", "2"),
            *("--scorer", f"{things / 'rewards.py'}:held", "--output-dir", str(folder), "--json"),
            *("--max-completion-length", "6", "--batch-rows", "8"),
        ]

    where = "quark_lm.evaluation.completions:CompletionSet.write"
    done = quark(argv(small_disk / "out"), Fault(where, 1, "fill", str(small_disk)))
    assert "give the same command again" in one_line(done)
    (small_disk / "ballast").unlink()
    done = quark(argv(small_disk / "out"))
    assert done.code == 0, done.err
    straight = quark(argv(tmp_path / "straight"))
    told, other = json.loads(done.out), json.loads(straight.out)
    assert {**told, "command": ""} == {**other, "command": ""}


def test_a_folder_that_may_only_be_read_is_one_line(things, whole, small_disk, tmp_path):
    done = quark(train(things, small_disk / "run"), Fault("quark_lm.trainer:Pool.append"))
    assert done.code == 130
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    before = sorted(os.walk(small_disk))
    assert "nothing may be written" in one_line(quark(train(things, small_disk / "run")))
    out = small_disk / "evaluation"
    argv = ["evaluate", str(whole), "--prompts", str(things / "held.jsonl"), "--output-dir", str(out)]
    assert "nothing may be written" in one_line(quark([*argv, "--num-generations", "1"]))
    assert sorted(os.walk(small_disk)) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_another_user_is_one_line(things, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "nothing may be written" in one_line(quark(train(things, tmp_path / "closed" / "run")))
