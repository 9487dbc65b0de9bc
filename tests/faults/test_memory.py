"""Out of memory while sampling: the batch is halved, which holds for the run; a real limit in a real process too."""

import json
import warnings

import pytest
import torch
from faults.processes import Fault, quark, train
from tiny import tiny_gpt2

from quark_lm.errors import ModelError
from quark_lm.generation import GenerationSettings, sample_seeds
from quark_lm.generation.hf import HFCompleter

PROMPTS = [[5, 6, 7], [8, 9], [10]] * 8
SETTINGS = GenerationSettings(max_completion_length=4)


@pytest.fixture
def fails_above(monkeypatch):
    """Makes a batch of more forward rows fail as memory does, and counts the attempts."""
    original, sizes = HFCompleter._complete_batch, []

    def arm(most, error=None):
        def limited(self, batch, prompts, seeds, settings, turns, *args):
            rows = len(batch) * (1 + len(turns))
            sizes.append(rows)
            if rows > most:
                raise error or torch.OutOfMemoryError("CUDA out of memory")
            return original(self, batch, prompts, seeds, settings, turns, *args)

        monkeypatch.setattr(HFCompleter, "_complete_batch", limited)
        return sizes

    return arm


def completed(completer, **options):
    out = {}
    for indices, completions in completer.complete(PROMPTS, sample_seeds(0, num=len(PROMPTS)), SETTINGS, **options):
        out |= dict(zip(indices, completions, strict=True))
    return [out[i] for i in range(len(PROMPTS))]


def test_what_it_goes_on_with_holds_for_the_rest_of_the_run_and_is_told_once(fails_above):
    completer = HFCompleter(tiny_gpt2(), (0,), 16)
    whole = completed(completer)
    sizes = fails_above(5)
    with pytest.warns(UserWarning, match="Out of memory") as told:
        assert completed(completer) == whole
    words = [str(one.message) for one in told]
    assert words == [
        f"Out of memory with {2 * n} completions a batch: going on with {n}, and with no more than {n} forward rows"
        " from here on."
        for n in (8, 4)
    ]
    assert [size for size in sizes if size > 5] == [16, 8]
    sizes.clear()
    completer.batch_rows = 16  # as the trainer sets it back after a round
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert completed(completer) == whole
        contrast = [prompt[::-1] for prompt in PROMPTS]
        completed(completer, dials=[(contrast, 2.0)])  # two forward rows a sample
    assert max(sizes) <= 4
    completer.batch_rows = None
    assert completer.fitting_rows(PROMPTS, SETTINGS) <= 4


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory")])
def test_the_cpus_and_numpys_lack_of_memory_halve_too(error, fails_above):
    completer = HFCompleter(tiny_gpt2(), (0,), 16)
    whole = completed(completer)
    fails_above(8, error)
    with pytest.warns(UserWarning, match="going on with 8"):
        assert completed(completer) == whole


def test_one_sample_that_does_not_fit_is_an_error_and_another_error_is_not_taken_for_it(fails_above, monkeypatch):
    completer = HFCompleter(tiny_gpt2(), (0,), 2)
    fails_above(0)
    with (
        pytest.warns(UserWarning, match="Out of memory"),
        pytest.raises(ModelError, match="Out of memory with one completion a batch"),
    ):
        completed(completer)
    fails_above(0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        completed(completer)


def test_a_real_limit_on_memory_halves_the_batch_of_a_run(things, tmp_path):
    many = {"num_generations": 400, "generation_batch_size": 9600, "prompts_per_round": 1, "num_rounds": 1}
    argv = train(things, tmp_path / "run", eval_prompts=None, eval_reward_funcs=None, reward_batch_size=9600, **many)
    done = quark(argv, Fault("quark_lm.generation.hf:HFCompleter._complete_batch", 1, "memory", str(16 << 20)))
    assert done.code == 0, done.err[-2000:]
    told = [line for line in done.err.splitlines() if "Out of memory with" in line]
    assert told, done.err
    assert told[0].startswith("quark: warning: Out of memory with 9600 completions a batch: going on with 4800")
    assert len(told) < 8
    with (tmp_path / "run" / "metrics.jsonl").open() as file:
        assert json.loads(file.readline())["round"] == 0
