"""SIGTERM in each phase of `quark train`, in real processes: code 130, one message, and the run goes on to its end."""

import os
import signal
import time

from faults.processes import Command, Fault, end, quark, train

# The count-th call after the command was given again.
PHASES = {
    "loading the model": ("quark_lm.packaged:load_model", 1),
    "measuring the base": ("quark_lm.trainer:QuarkTrainer.evaluate_base", 1),
    "scoring the held-out prompts": ("quark_lm.exploring:_held_out_scores", 1),
    "exploring": ("quark_lm.generation.hf:HFCompleter._complete_batch", 3),
    "scoring": ("quark_lm.exploring:_as_json", 2),
    "writing the pool": ("quark_lm.pool:Pool.append", 1),
    "learning": ("quark_lm.trainer:QuarkTrainer.compute_loss", 1),
    "the end of a round": ("quark_lm.trainer:QuarkTrainer.finish_round", 1),
    "saving a checkpoint": ("quark_lm.trainer:QuarkTrainer.save_model", 1),
    "measuring the systems": ("quark_lm.train_command:_held_out", 1),
    "writing the model": ("quark_lm.export:save", 1),
    "writing the results": ("quark_lm.export:_put_in_place", 1),
}


def test_sigterm_in_any_phase_stops_with_its_message_and_the_run_ends_as_if_it_had_not(things, whole_end, tmp_path):
    argv = train(things, tmp_path / "run")
    for phase, (where, count) in PHASES.items():
        done = quark(argv, Fault(where, count))
        assert done.code == 130, (phase, done.code, done.err[-1500:])
        assert done.last.startswith("quark: interrupted."), (phase, done.err)
        assert done.last.endswith("The same command goes on."), (phase, done.err)
        assert "Traceback" not in done.err
        assert done.out == ""
    assert quark(argv).code == 0
    assert end(tmp_path / "run") == whole_end


def test_a_reward_that_hangs_is_left_by_a_second_signal_and_costs_its_chunk_alone(things, whole_end, tmp_path):
    rewards = tmp_path / "rewards.py"
    working = (things / "rewards.py").read_text()
    hanging = (
        "works, calls = vowels, []\ndef vowels(completions, **kwargs):\n    calls.append(1)\n"
        "    if len(calls) == 2:\n        open(__file__ + '.begun', 'w').close()\n        time.sleep(3600)\n"
        "    return works(completions)\n"
    )
    argv = train(things, tmp_path / "run", reward_funcs=f"{rewards}:vowels", eval_prompts=None, eval_reward_funcs=None)
    rewards.write_text(working + hanging)
    command = Command(argv)
    wait_for(lambda: (tmp_path / "rewards.py.begun").exists())
    os.kill(command.process.pid, signal.SIGTERM)
    wait_for(lambda: "Once more stops at once" in command.err)
    assert command.process.is_alive()  # nothing is thrown away that may still come
    os.kill(command.process.pid, signal.SIGTERM)
    done = command.wait(60)
    assert done.code == 130
    assert done.last.startswith("quark: interrupted.")
    kept = (tmp_path / "run" / "pool" / "round-00000.rank-0.partial.jsonl").read_text()
    assert kept.count('"indices"') == 3  # all samples, and the first chunk's rewards
    assert kept.count('"rewards"') == 1
    rewards.write_text(working)
    assert quark(argv).code == 0
    told = end(tmp_path / "run")
    assert (told["weights"], told["pool"]) == (whole_end["weights"], whole_end["pool"])


def test_an_async_reward_that_hangs_is_left_too(things, tmp_path):
    (tmp_path / "hang.py").write_text(
        f"import asyncio\nasync def hang(completions, **kwargs):\n    open({str(tmp_path / 'begun')!r}, 'w').close()\n"
        "    await asyncio.sleep(3600)\n"
    )
    rewards = {"reward_funcs": f"{tmp_path / 'hang.py'}:hang", "eval_prompts": None, "eval_reward_funcs": None}
    command = Command(train(things, tmp_path / "run", **rewards))
    wait_for((tmp_path / "begun").exists)
    os.kill(command.process.pid, signal.SIGINT)
    wait_for(lambda: "Once more stops at once" in command.err)
    os.kill(command.process.pid, signal.SIGINT)
    assert command.wait(60).code == 130


def wait_for(what, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)
