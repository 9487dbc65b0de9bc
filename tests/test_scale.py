"""benchmarks/scale.py: docs/scale.md holds its tables, and where something was measured the formula meets it."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MEASURED = json.loads((ROOT / "docs" / "results" / "performance.json").read_text(encoding="utf-8"))["runs"]


@pytest.fixture(scope="module")
def scale():
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks" / "scale.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scale"]


def test_the_page_holds_what_the_script_writes(scale, tmp_path, monkeypatch):
    page = ROOT / "docs" / "scale.md"
    copy = tmp_path / "scale.md"
    copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["scale.py", "--write", str(copy)])
    scale.main()
    assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")


def test_the_shapes_give_the_models_sizes(scale):
    sizes = {"SmolLM2-135M": 134.5e6, "SmolLM2-1.7B": 1.71e9, "Qwen2.5-7B": 7.62e9, "Qwen2.5-32B": 32.8e9}
    for model in scale.MODELS:
        assert model.parameters == pytest.approx(sizes.get(model.name, 70.6e9), rel=0.005)


def test_the_formula_meets_the_step_that_was_measured(scale):
    """Draws of 8 + 16 tokens with a tag of 7, an adapter, two cores; the formula's constants are of an older run."""
    of = MEASURED["learn_step"]
    assert [of["settings"][name] for name in ("prompt", "completion", "batch")] == [8, 16, 32]
    work = replace(scale.Round(), prompt=8, tag=7, completion=16, batch=32, steps=1)
    seconds, bound, moved = scale.learn_seconds(scale.MODELS[0], work, scale.DEVICES[0], adapter=True, sharded=False)
    assert seconds == pytest.approx(of["median_seconds"]["quark"], rel=0.2)
    assert (bound, moved) == ("FLOP", 0)


def test_the_formula_meets_the_sampling_that_was_measured(scale):
    """128 rows of 8 + 16 tokens, two cores."""
    of = MEASURED["explore"]
    assert [of["settings"][name] for name in ("batch", "tokens")] == [128, 16]
    work = replace(scale.Round(), prompt=8, tag=0, completion=16, samples=1280)
    seconds, bound, rows = scale.explore_seconds(scale.MODELS[0], work, scale.DEVICES[0], vllm=False)
    assert (rows, bound) == (128, "FLOP")
    assert 1280 * 16 / seconds == pytest.approx(of["tokens_per_second"]["quark"], rel=0.4)


def test_a_model_that_does_not_fit_is_sharded_or_left_out(scale):
    small, large = scale.MODELS[0], scale.MODELS[-1]
    one, eight = scale.DEVICES[1], scale.DEVICES[2]
    assert scale.placement(small, scale.Round(), one, False)[1] is False
    assert scale.placement(large, scale.Round(), one, True) is None
    assert scale.placement(large, scale.Round(), eight, True)[1] is True
