"""Twenty kills by SIGKILL, at random moments and at the worst ones: a run ends as if nobody had killed it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def killed(tmp_path, *argv, timeout=900):
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), *argv, "--json", str(tmp_path / "kill.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads((tmp_path / "kill.json").read_text())


def test_a_run_that_is_killed_twenty_times_ends_as_if_it_had_not_been(tmp_path):
    told = killed(tmp_path, "20")
    assert (told["kills"], told["resumed"], told["bitwise_equal"]) == (20, 20, 20)
    assert len(told["hit"]) > 3  # not only at moments when nothing was under way


@pytest.mark.slow
def test_a_run_of_the_packaged_model_that_is_killed_ends_as_if_it_had_not_been(smollm2_folder, tmp_path):
    told = killed(tmp_path, "6", "--cases", "packaged", timeout=3600)
    assert (told["kills"], told["resumed"], told["bitwise_equal"]) == (6, 6, 6)
