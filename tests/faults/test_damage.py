"""Files of a run that were changed, cut, emptied, or are another run's: found, named, never taken."""

import json
import shutil

import pytest
from faults.processes import Fault, end, one_line, quark, train

from quark_lm.cli import main

CHECKPOINT = "checkpoint-2"


@pytest.fixture(scope="module")
def stopped(things, tmp_path_factory):
    """A run that was stopped in its second round: with a checkpoint, a round, half of another."""
    folder = tmp_path_factory.mktemp("stopped")
    fault = Fault("quark_lm.exploring:_as_json", 5)
    done = quark(train(things, folder / "run"), fault)
    assert done.code == 130, done.err
    assert (folder / "run" / CHECKPOINT).is_dir()
    assert (folder / "run" / "pool" / "round-00001.rank-0.partial.jsonl").is_file()
    return folder / "run"


@pytest.fixture
def again(stopped, things, tmp_path):
    """A copy of the stopped run, and what gives its command again."""
    shutil.copytree(stopped, tmp_path / "run")
    return lambda: quark(train(things, tmp_path / "run"))


def damaged(content: bytes, how: str) -> bytes:
    if how == "flipped":  # a digit, so that JSON stays JSON
        at = next(i for i in range(len(content) // 2, len(content)) if content[i : i + 1].isdigit())
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    return {"cut": content[: len(content) // 2], "empty": b"", "garbage": b"\x00\xff[{" * 40}[how]


def test_a_damaged_file_that_is_needed_stops_the_run_and_is_named(again, tmp_path):
    for name, hows in {
        "pool/round-00000.parquet": ["flipped"],
        "pool/manifest.json": ["flipped"],
        "run.json": ["flipped", "cut"],
        "metrics.jsonl": ["flipped", "cut"],
    }.items():
        path = tmp_path / "run" / name
        whole = path.read_bytes()
        for how in hows:
            path.write_bytes(damaged(whole, how))
            assert path.name in (line := one_line(again())) or "holds another run" in line, (name, how)
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["complete.json", "model.safetensors"])
def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_without_it(name, again, whole_end, tmp_path):
    path = tmp_path / "run" / CHECKPOINT / name
    path.write_bytes(damaged(path.read_bytes(), "flipped"))
    done = again()
    assert done.code == 0, done.err
    assert f"{CHECKPOINT} is not whole (its {name} is " in done.err
    assert end(tmp_path / "run") == whole_end


def test_a_checkpoint_that_lacks_a_file_is_not_used(again, whole_end, tmp_path):
    (tmp_path / "run" / CHECKPOINT / "optimizer.pt").unlink()  # Trainer would begin with a fresh one in silence
    done = again()
    assert "its optimizer.pt is gone" in done.err
    assert end(tmp_path / "run") == whole_end


@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_a_damaged_journal_is_made_again_from_the_damage_on(how, again, whole_end, tmp_path):
    (path,) = (tmp_path / "run" / "pool").glob("*.partial.jsonl")
    path.write_bytes(damaged(path.read_bytes(), how))
    done = again()
    assert done.code == 0, done.err
    assert ("is damaged: it is made again" in done.err) == (how == "flipped")
    assert end(tmp_path / "run") == whole_end


def test_damaged_results_are_measured_again(whole, whole_end, things, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "results.json"
    path.write_bytes(damaged(path.read_bytes(), "cut"))
    done = quark(train(things, tmp_path / "run"))
    assert done.code == 0, done.err
    assert "results.json is damaged" in done.err
    assert end(tmp_path / "run")["results"]["systems"] == whole_end["results"]["systems"]


def test_files_of_another_run_are_refused(again, things, tmp_path):
    other = tmp_path / "other"
    done = quark(train(things, other, seed=7), Fault("quark_lm.exploring:_as_json", 5))
    assert done.code == 130
    run = tmp_path / "run"
    words = {
        "run.json": "holds another run (seed: 7 there",
        "metrics.jsonl": "metrics.jsonl is not the file that the run wrote",
    }
    for name, word in words.items():
        whole = (run / name).read_bytes()
        (run / name).write_bytes((other / name).read_bytes())
        assert word in one_line(again()), name
        (run / name).write_bytes(whole)
    shutil.rmtree(run / CHECKPOINT)
    shutil.copytree(other / CHECKPOINT, run / CHECKPOINT)
    assert "saw another pool" in one_line(again())


def test_a_lost_file_of_metrics_is_told_and_the_run_goes_on(again, whole_end, tmp_path):
    (tmp_path / "run" / "metrics.jsonl").unlink()
    done = again()
    assert done.code == 0, done.err
    assert "metrics.jsonl is gone" in done.err
    assert end(tmp_path / "run")["weights"] == whole_end["weights"]


def test_quark_pool_names_a_damaged_round(stopped, tmp_path, capsys):
    shutil.copytree(stopped, tmp_path / "run")
    path = tmp_path / "run" / "pool" / "round-00000.parquet"
    assert main(["pool", str(tmp_path / "run")]) == 0
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    assert main(["pool", str(tmp_path / "run")]) == 2
    assert "round-00000.parquet" in capsys.readouterr().err


def test_a_damaged_evaluation_is_named(whole, things, tmp_path, capsys):
    argv = [
        *("evaluate", str(whole), "--prompts", str(things / "held.jsonl"), "--num-generations", "2", "--json"),
        *("--scorer", f"{things / 'rewards.py'}:held", "--output-dir", str(tmp_path / "out")),
    ]
    assert main(argv) == 0
    first = capsys.readouterr().out
    for name, how in (("evaluation.json", "cut"), ("results.json", "empty"), ("completions.parquet", "garbage")):
        path = tmp_path / "out" / name
        content = path.read_bytes()
        path.write_bytes(damaged(content, how))
        assert main(argv) == 2
        assert f"{name} " in capsys.readouterr().err.splitlines()[-1]
        path.write_bytes(content)
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(first)
