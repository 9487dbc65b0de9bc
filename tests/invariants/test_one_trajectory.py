"""One loss trajectory, however a run is made: from scratch, by the trainer, accumulated, resumed, by two processes.

The oracle is examples/quark_from_scratch.py, which shares no code with the library; only the draws and the new rows
are the library's, since both are random.
"""

import copy
import functools
import importlib.util
import os
import random
import subprocess
import sys
from json import loads
from pathlib import Path

import numpy as np
import pytest
import recipe
import torch
from peft import get_peft_model
from recipe import BATCH, CASES, SEED, STEPS_PER_ROUND
from tiny import TINY_MODELS, VOCAB, tiny_tokenizer

from quark_lm import Pool, RewardTokens, quantiles
from quark_lm.exploring import DROPOUT

ROOT = Path(__file__).parents[2]
STOPPED = ["gpt2-untied.stopped", "gpt2-untied.halves.stopped"]
FSDP = ["gpt2-tied.fsdp", "gpt2-untied.fsdp", "llama-tied.fsdp", "gpt2-untied-lora.fsdp", "llama-tied-lora.fsdp"]
FSDP += ["llama-untied.fsdp.parts", "gpt2-untied-lora.fsdp.parts"]
FSDP += ["gpt2-untied.fsdp.stopped", "llama-tied.fsdp.sharded.stopped", "llama-tied-lora.fsdp.stopped"]
FSDP += ["gpt2-untied.fsdp.sharded.halves.stopped"]
FOUR = ["llama-tied.fsdp.parts.few", "gpt2-tied.fsdp.few"]

# eight prompts hold out too few rows to tell, and six steps teach the tokens nothing
pytestmark = pytest.mark.filterwarnings("ignore:Too few samples are held out", "ignore:The reward tokens")


def equal(first, second):
    """Equal but for rounding in float32: 1e-6 of losses around 5 nats, up to ten units in their last place."""
    return len(first) == len(second) and np.allclose(first, second, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By case: (losses, pool, weights) of the plain run, one process and one micro-batch a step."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(name, few=False):
        trainer = recipe.trainer(folder / f"{name}-{few}", CASES[name], **(recipe.FEW if few else {}))
        trainer.train()
        return recipe.losses(trainer), Pool.open(trainer.folder), trainer.model.state_dict()

    return run


@pytest.fixture(scope="module", autouse=True)
def started(tmp_path_factory):
    """Two and four gloo processes that run cases beside the other tests; gives functions that wait for them."""
    waits, processes = {}, []
    for num, names in ((2, [*CASES, *STOPPED, *FSDP]), (4, FOUR)):
        folder = tmp_path_factory.mktemp(f"processes-{num}")
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num}", "--rdzv-backend=c10d"]
        command += ["--rdzv-endpoint=localhost:0", "--local-addr=localhost", recipe.__file__, str(folder), *names]
        with (folder / "log.txt").open("w") as log:
            process = subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT)
        processes.append(process)
        waits[num] = functools.partial(wait, process, folder)
    yield waits
    for process in processes:
        process.terminate()  # not kill, which would leave torchrun's workers behind
        process.wait()


def wait(process, folder):
    assert process.wait(timeout=900) == 0, (folder / "log.txt").read_text()[-6000:]
    return folder


def environment():
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONFAULTHANDLER": "1",  # a rank that aborts says where
        "PYTHONWARNINGS": "ignore",
    }


@functools.cache
def load_scratch():
    spec = importlib.util.spec_from_file_location("quark_from_scratch", ROOT / "examples" / "quark_from_scratch.py")
    scratch = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = scratch  # typing.NamedTuple looks its module up
    spec.loader.exec_module(scratch)
    return scratch


def from_scratch(name, pool):
    """The losses of the oracle on the samples of this pool."""
    scratch, case = load_scratch(), CASES[name]
    config = recipe.config(Path("unused"), case)
    model = TINY_MODELS[case.model]()
    reference = copy.deepcopy(model)  # without new rows: they belong to no softmax
    tokens = RewardTokens.create(
        model, tiny_tokenizer(), num_quantiles=config.num_quantiles, style=case.style, seed=SEED
    )
    if case.lora:
        adapter = recipe.lora_config(case)
        adapter.trainable_token_indices = list(tokens.barred) or None
        torch.manual_seed(SEED)
        model = get_peft_model(model, adapter)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=config.learning_rate, eps=config.adam_epsilon)
    rows = pool.to_table().to_pylist()
    losses = []
    for round in range(recipe.NUM_ROUNDS):
        seen = [row for row in rows if row["round"] <= round]
        quantile = scratch.quantize([row["reward"] for row in seen], config.num_quantiles)
        drawable = [-1 if row["held_out"] else q for row, q in zip(seen, quantile, strict=True)]
        num = STEPS_PER_ROUND * BATCH
        draws = quantiles.draw(drawable, num, SEED, round, config.draw, config.num_quantiles)
        dropped = np.random.default_rng([SEED, round, DROPOUT]).random(num) < config.token_dropout
        batch = []
        for i, drop in zip(draws, dropped, strict=True):
            prompt, token = seen[i]["prompt_ids"], [] if drop else tokens.ids[quantile[i]]
            conditioned = [*token, *prompt] if case.position == "first" else [*prompt, *token]
            batch.append((conditioned, prompt, seen[i]["completion_ids"]))
        for step in range(STEPS_PER_ROUND):
            step_batch = batch[step * BATCH : (step + 1) * BATCH]
            losses.append(scratch.learn(model, reference, optimizer, step_batch, config.beta))
    return losses


@pytest.mark.parametrize("name", CASES)
def test_the_trainer_follows_the_algorithm_from_scratch(name, runs):
    losses, pool, _ = runs(name)
    assert equal(losses, from_scratch(name, pool))
    assert np.ptp(losses) > 0.1  # a trajectory that moves


def test_the_example_learns_by_itself(capsys):
    def starts_low(completion):
        return -float(ord(completion[0])) if completion else -130.0

    random.seed(0)
    options = {"num_quantiles": 3, "num_rounds": 3, "num_generations": 20, "max_completion_length": 2}
    model = TINY_MODELS["llama-tied"]()
    tokens = load_scratch().quark(
        model, tiny_tokenizer(), recipe.PROMPTS, starts_low, steps_per_round=20, learning_rate=1e-2, **options
    )
    means = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(means) == 3
    assert means[-1] > means[0] + 5
    assert tokens == [VOCAB, VOCAB + 1, VOCAB + 2]


@pytest.mark.parametrize("name", CASES)
def test_accumulating_two_halves_is_one_batch(name, runs, tmp_path):
    trainer = recipe.trainer(
        tmp_path, CASES[name], per_device_train_batch_size=BATCH // 2, gradient_accumulation_steps=2
    )
    trainer.train()
    losses, pool, _ = runs(name)
    assert equal(recipe.losses(trainer), losses)
    assert samples(trainer.pool) == samples(pool)


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("gpt2-untied", (2, 5)),  # in both rounds
        ("gpt2-untied", (3,)),  # between the rounds
        ("llama-tied", (2,)),
        ("gpt2-tied-lora", (3,)),
        ("gpt2-tied-lora", (5,)),
    ],
)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(name, stops, tmp_path):
    options = {"disable_dropout": False, "lora_dropout": 0.1}
    whole = recipe.trainer(tmp_path / "whole", CASES[name], **options)
    whole.train()
    for stop in stops:
        part = recipe.trainer(tmp_path / "part", CASES[name], **options)
        part.add_callback(recipe.StopAt(stop))
        with pytest.raises(KeyboardInterrupt):
            part.train()
        assert part.state.global_step == stop
    last = recipe.trainer(tmp_path / "part", CASES[name], **options)
    last.train()
    assert recipe.losses(last) == recipe.losses(whole)  # bit for bit, dropout and all
    assert samples(last.pool) == samples(whole.pool)
    for key, weight in whole.model.state_dict().items():
        assert torch.equal(weight, last.model.state_dict()[key]), key


def test_dropout_was_on_in_the_test_above(runs, tmp_path):
    trainer = recipe.trainer(tmp_path, CASES["gpt2-untied"], disable_dropout=False)
    trainer.train()
    assert not equal(recipe.losses(trainer), runs("gpt2-untied")[0])


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(name, runs, started):
    folder = started[2]()
    told = loads((folder / f"{name}.json").read_text())
    losses, pool, _ = runs(name)
    assert told["processes"] == 2
    assert told["kept"] == 1
    assert equal(told["losses"], losses)
    assert samples(Pool.open(folder / name)) == samples(pool)  # they explored the same, too


@pytest.mark.parametrize("name", STOPPED)
def test_when_one_of_two_processes_is_told_to_stop_both_do_and_the_run_goes_on(name, runs, started):
    told = loads((started[2]() / f"{name}.json").read_text())
    assert equal(told["losses"], runs("gpt2-untied")[0])


@pytest.mark.parametrize(("num", "name"), [(2, name) for name in FSDP] + [(4, name) for name in FOUR])
def test_a_model_in_parts_is_one_model(num, name, runs, started):
    folder = started[num]()
    case, *ways = name.split(".")
    told = loads((folder / f"{name}.json").read_text())
    losses, pool, weights = runs(case, "few" in ways)
    assert told["processes"] == num
    assert told["kept"] < 1.1 / num  # in parts it is, at the end and for the reference, too
    assert told.get("reference_kept", 0) < 1.1 / num
    assert told["explored"] == ["parts" if "parts" in ways else "whole"]
    assert equal(told["losses"], losses)
    assert samples(Pool.open(folder / name)) == samples(pool)
    # what is saved in the end is the whole model, on the first process
    saved = torch.load(folder / f"{name}.pt", weights_only=True)
    assert saved.keys() == weights.keys()
    for key, weight in weights.items():
        assert torch.allclose(saved[key], weight, rtol=0, atol=2e-6), key


def samples(pool):
    return pool.to_table().select(["round", "prompt_ids", "completion_ids", "reward", "held_out"]).to_pylist()
