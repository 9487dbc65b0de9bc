"""What only a GPU can show: `pytest -m gpu tests/invariants/test_gpu.py`.

`QUARK_TEST_CUDA=1 pytest` runs the trainers of the other tests on the GPU too.
"""

import pytest
import torch
from test_processes import flags, save_inputs, start, told
from transformers import LlamaConfig, LlamaForCausalLM

from quark_lm.generation import GenerationSettings, complete_all, sample_seeds
from quark_lm.generation.hf import HFCompleter
from quark_lm.policy import free_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture
def model():
    """SmolLM2-135M's shape in bfloat16, with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()


@torch.no_grad()
def completed(model, number=256, length=24):
    settings = GenerationSettings(max_completion_length=length, min_completion_length=length, top_p=0.95)
    prompts = [[1 + i, 2, 3 + i % 7, 4] for i in range(number)]
    batches = HFCompleter(model, [0]).complete(prompts, sample_seeds(0, num=number), settings)
    return complete_all(batches, number)


def test_memory_that_runs_out_halves_the_batch_and_every_prompt_gets_its_completion(model):
    completed(model)
    taken, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    share = (taken + 0.3 * (peak - taken)) / torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(share)
        with pytest.warns(UserWarning, match="Out of memory with 256 completions a batch: going on with 128"):
            assert all(len(ids) == 24 for ids in completed(model))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_what_torch_holds_unused_counts_as_free():
    before = free_memory(torch.device("cuda", 0))
    block = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    assert before - free_memory(torch.device("cuda", 0)) >= 2**30 - 2**26
    del block  # torch keeps it for itself
    assert torch.cuda.memory_reserved() >= 2**30
    assert before - free_memory(torch.device("cuda", 0)) < 2**28


WAYS = {
    "plain": (False, []),
    "bf16": (False, ["--bf16", "true"]),
    "lora": (False, ["--use_peft", "true"]),
    "ddp": (True, []),
    "fsdp2": (True, ["--fsdp", "true"]),
    "fsdp2-bf16": (True, ["--fsdp", "true", "--bf16", "true"]),
    "fsdp2-lora": (True, ["--fsdp", "true", "--use_peft", "true"]),
}


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Of `quark train` on the GPU, in one process; with NCCL where torchrun starts it."""
    folder = tmp_path_factory.mktemp("gpu")
    save_inputs(folder)

    def of(name):
        several, more = WAYS[name]
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m"] if several else []
        own = ["--use_cpu", "false", "--reward_funcs", "recipe:reward", *more]
        process = start(folder, name, [*launcher, "quark_lm.cli", "train", *flags(folder, name, 4), *own])
        assert process.wait(timeout=900) == 0, (folder / f"{name}.txt").read_text()[-2000:]
        return told(folder / name)["loss"]

    return {name: of(name) for name in WAYS}


@pytest.mark.parametrize(
    ("name", "other", "rel"),
    [
        ("ddp", "plain", 1e-5),
        ("fsdp2", "plain", 1e-5),
        ("bf16", "plain", 0.02),
        ("fsdp2-bf16", "plain", 0.02),
        ("fsdp2-lora", "lora", 1e-5),
    ],
)
def test_the_ways_to_run_on_a_gpu_learn_alike(losses, name, other, rel):
    assert len(losses[name]) == 6
    # the first round's: a word that is drawn otherwise after rounding changes what later rounds learn from
    assert losses[name][:3] == pytest.approx(losses[other][:3], rel=rel)
