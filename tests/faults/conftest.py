"""A tiny run on disk: its model, prompts, rewards, settings; and how it ends when nothing befalls it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from faults.processes import end, quark, train
from tiny import tiny_gpt2, tiny_tokenizer

REWARDS = """
import os, sys, time
from pathlib import Path

def vowels(completions, **kwargs):
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) + len(text) / 1000 for text in completions]

def held(completions, **kwargs):
    return [len(text) / 10 for text in completions]
"""


@pytest.fixture(scope="session")
def things(tmp_path_factory) -> Path:
    """A folder with `base`, prompts.jsonl, rewards.py."""
    folder = tmp_path_factory.mktemp("things")
    tiny_gpt2().save_pretrained(folder / "base")
    tiny_tokenizer(pad=False).save_pretrained(folder / "base")
    (folder / "rewards.py").write_text(REWARDS)
    prompts = [f"the {word} is {n}" for word in ("cat", "sun", "rain") for n in range(8)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    (folder / "held.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("a dog", "the end")))
    return folder


@pytest.fixture(scope="session")
def whole(things, tmp_path_factory):
    """The folder of the run that nothing befell."""
    folder = tmp_path_factory.mktemp("whole")
    done = quark(train(things, folder / "run"))
    assert done.code == 0, done.err
    return folder / "run"


@pytest.fixture(scope="session")
def whole_end(whole):
    return end(whole)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB; skips where it cannot be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if mount is None or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs; the same faults by a limit on files run everywhere")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)
