"""No pickle is loaded but as tensors alone; a checkpoint, a pool or a YAML file that carries code runs none."""

import ast
import contextlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as parts
from test_trainer import lora, make, stopped_at
from tiny import tiny_gpt2, tiny_tokenizer

from quark_lm import Pool, export
from quark_lm.cli import main
from quark_lm.errors import ModelError, QuarkError
from quark_lm.evaluation.completions import read_completions
from quark_lm.pool import read_initial
from quark_lm.prompts import load_prompts
from quark_lm.resuming import check_sharded_files, no_pickles
from quark_lm.run_folder import file_digests, last_checkpoint, read_marker, write_marker

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("src", "scorers", "benchmarks", "experiments", "examples", "recipes", "baselines")
           for path in sorted((ROOT / folder).rglob("*.py"))]  # fmt: skip
LOADERS = {
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "shelve",
    "marshal",
    "jsonpickle",
    "pd",
    "pandas",
}


def unsafe_calls(source: str) -> list[str]:
    """Calls that can run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        owner, _, last = name.rpartition(".")
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        unsafe = (
            (owner in LOADERS and last in ("load", "loads", "Unpickler", "open", "read_pickle")),
            (owner == "torch" and last == "load" and given.get("weights_only") != "True"),
            (owner in ("np", "numpy") and last == "load" and given.get("allow_pickle", "False") != "False"),
            (owner == "yaml" and last in ("load", "unsafe_load", "full_load", "load_all")),
            name in ("eval", "exec", "os.system"),
            given.get("shell") == "True",
            given.get("trust_remote_code") == "True",
            given.get("weights_only") == "False",
        )
        if any(unsafe):
            found.append(name)
    return found


def test_no_source_loads_a_pickle_or_runs_text():
    assert len(SOURCES) > 40
    assert {str(path): unsafe_calls(path.read_text()) for path in SOURCES if unsafe_calls(path.read_text())} == {}


@pytest.mark.parametrize(
    "line",
    ["pickle.loads(b)", "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)",
     "yaml.load(f, Loader)", "eval(text)", "from_pretrained(n, trust_remote_code=True)", "run(c, shell=True)"],
)  # fmt: skip
def test_the_search_finds_what_it_is_for(line):
    assert unsafe_calls(line)


class Payload:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def trace(tmp_path):
    """What a payload would leave behind; the test fails when it is there at its end."""
    path = tmp_path / "trace-of-a-payload"
    yield path
    assert not path.exists()


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "made")))
    assert (tmp_path / "made").is_dir()


def run(folder, adapter=False):
    given = {"peft_config": lora(fan_in_fan_out=True)} if adapter else {}
    return make(folder, model=tiny_gpt2(), given=given, save_strategy="epoch")


@pytest.fixture(scope="module", params=["whole model", "adapter"])
def stopped(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    trainer = run(folder, request.param == "adapter")
    trainer.add_callback(stopped_at(1))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return folder, request.param == "adapter"


def test_a_resumed_run_unpickles_nothing_but_tensors(stopped, tmp_path, monkeypatch):
    folder, adapter = stopped
    shutil.copytree(folder, tmp_path / "run")
    asked, original = [], torch.load

    def load(*args, **kwargs):
        asked.append(kwargs.get("weights_only"))
        return original(*args, **kwargs)

    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    trainer = run(tmp_path / "run", adapter)
    monkeypatch.setattr(torch, "load", load)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    trainer.train()
    assert trainer.state.global_step == 4
    assert len(asked) >= 3  # optimizer, scheduler, random numbers
    assert set(asked) == {True}


HOSTILE = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "weights"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_runs_nothing(name, stopped, tmp_path, trace):
    folder, adapter = stopped
    shutil.copytree(folder, tmp_path / "run")
    checkpoint, _ = last_checkpoint(tmp_path / "run")
    if name == "weights":  # pickled ones, which transformers takes where there are no others
        for path in checkpoint.glob("*.safetensors"):
            path.unlink()
        name = "adapter_model.bin" if adapter else "pytorch_model.bin"
    torch.save({"a": Payload(trace)}, checkpoint / name)
    marker = read_marker(checkpoint)
    write_marker(checkpoint, {**marker, "files": file_digests(checkpoint)})  # whoever made it made its hashes too
    trainer = run(tmp_path / "run", adapter)
    if name == "training_args.bin":  # nobody reads it
        trainer.train()
        return
    with pytest.raises(ModelError, match=r"was not loaded \(.*\): unpickling can run a stranger's code") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)


def test_a_changed_checkpoint_is_not_even_opened(stopped, tmp_path, trace):
    folder, adapter = stopped
    shutil.copytree(folder, tmp_path / "run")
    checkpoint, _ = last_checkpoint(tmp_path / "run")
    torch.save({"a": Payload(trace)}, checkpoint / "optimizer.pt")
    with pytest.warns(
        UserWarning, match=r"is not whole \(its optimizer.pt is not what the run wrote\), and is not used"
    ):
        run(tmp_path / "run", adapter).train()


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint in parts, as accelerate writes an optimizer: tensors, and settings that are none."""
    state = {"state": {"w": {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3, dtype=torch.bfloat16)}}}
    state["param_groups"] = [{"lr": 0.1, "betas": (0.9, 0.999), "foreach": None, "params": ["w"]}]
    with pytest.warns(UserWarning, match="intent is to save in a single process"):
        parts.save({"optimizer": state}, storage_writer=parts.FileSystemWriter(tmp_path / "optimizer_0"), no_dist=True)
    return tmp_path


def refused(checkpoint):
    with (
        pytest.raises(ModelError, match=r"was not loaded \(.*\): unpickling can run a stranger's code") as caught,
        no_pickles(str(checkpoint)),
    ):
        check_sharded_files(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_in_parts_is_read_before_torch_unpickles_it(sharded):
    kinds = pickle.loads((sharded / "optimizer_0" / ".metadata").read_bytes()).state_dict_metadata.values()
    assert {type(kind).__name__ for kind in kinds} == {"TensorStorageMetadata", "BytesStorageMetadata"}
    check_sharded_files(sharded)


@pytest.mark.parametrize("name", [".metadata", "__0.metadata"])  # torch takes a process's own where there is no other
@pytest.mark.parametrize("kind", ["a payload alone", "a payload within", "a function of torch", "garbage", "empty"])
def test_hostile_metadata_of_a_checkpoint_in_parts_runs_nothing(kind, name, sharded, trace):
    path = sharded / "optimizer_0" / ".metadata"
    metadata = pickle.loads(path.read_bytes())  # our own
    metadata.planner_data = Payload(trace) if kind == "a payload within" else torch.hub.load
    content = {"a payload alone": pickle.dumps(Payload(trace)), "garbage": b"\x80\x04}.", "empty": b""}
    path.rename(path.with_name(name))
    path.with_name(name).write_bytes(content.get(kind, pickle.dumps(metadata)))
    refused(sharded)


def test_a_link_in_a_checkpoint_in_parts_is_not_followed(sharded, tmp_path_factory, trace):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / ".metadata").write_bytes(pickle.dumps(Payload(trace)))
    shutil.rmtree(sharded / "optimizer_0")
    (sharded / "optimizer_0").symlink_to(elsewhere)
    refused(sharded)


@pytest.mark.parametrize("packed", [False, True])
def test_a_hostile_setting_in_a_part_of_a_checkpoint_runs_nothing(packed, sharded, trace):
    """torch loads what is no tensor with weights_only=False."""
    path = sharded / "optimizer_0" / ".metadata"
    metadata = pickle.loads(path.read_bytes())  # our own
    index = next(index for index in metadata.storage_data if index.fqn.endswith(".lr"))
    payload = io.BytesIO()
    torch.save(0.1 if packed else Payload(trace), payload)
    place = metadata.storage_data[index]
    (path.parent / "other.distcp").write_bytes(payload.getvalue())
    place.relative_path, place.offset, place.length = "other.distcp", 0, len(payload.getvalue())
    place.transform_descriptors = ["stream.zstd"] if packed else None
    path.write_bytes(pickle.dumps(metadata))
    refused(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_a_folder_of_pickled_weights_is_not_loaded_as_a_model(name, tmp_path, trace):
    tiny_gpt2().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if name == "adapter_model.bin":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    torch.save({"a": Payload(trace)}, tmp_path / name)
    with pytest.raises(ModelError):
        export.load(tmp_path)


@pytest.mark.parametrize(
    "config",
    ["", "[]", "{}", '{"peft_type": "NO_SUCH", "base_model_name_or_path": "x"}', '{"peft_type": "LORA"}',
     '{"peft_type": "LORA", "base_model_name_or_path": "../../../etc"}',
     '{"peft_type": "LORA", "base_model_name_or_path": "x", "auto_mapping": {"parent_library": "os"}}'],
)  # fmt: skip
def test_a_hostile_adapter_config_is_one_error(config, tmp_path):
    (tmp_path / "adapter_config.json").write_text(config)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(ModelError) as caught:
        export.load(tmp_path)
    assert "\n" not in str(caught.value)


def hostile_parquet(path: Path, columns: dict, trace: Path) -> None:
    """A file whose schema names pyarrow's pickled extension type, and carries odd metadata besides."""
    payload = pickle.dumps(Payload(trace))
    table = pa.table(columns)
    fields = [
        field.with_metadata({"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": payload})
        for field in table.schema
    ]
    odd = {
        b"pandas": payload,
        b"huggingface": b'{"info": {"features": {"a": {"_type": "os.system"}}}}',
        b"quark": payload,
    }
    pq.write_table(table.cast(pa.schema(fields, metadata=odd)), path)


def test_a_hostile_parquet_file_runs_nothing(tmp_path, trace, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "hostile.parquet"
    columns = {"prompt": ["a", "b"], "completion": [" c", " d"], "reward": [0.0, 1.0]}
    hostile_parquet(path, columns, trace)
    for read in (read_initial, load_prompts, read_completions):
        with contextlib.suppress(QuarkError):
            assert len(read(path))
    pool = Pool.open(tmp_path / "pool", create=True)
    pool.append(0, {"reward": [0.0, 1.0], "prompt_index": [0, 1], "held_out": [False, True]})
    table = pool.to_table()
    hostile_parquet(pool.folder / "round-00000.parquet", {n: table.column(n) for n in table.column_names}, trace)
    with contextlib.suppress(QuarkError):
        Pool.open(pool.folder).to_table()
    with pytest.raises(QuarkError, match=r"round-00000.parquet is not the file that the run wrote"):
        Pool.open(pool.folder).verify()


@pytest.mark.parametrize(
    "text",
    [
        "output_dir: !!python/object/apply:os.mkdir [{trace}]",
        "!!python/object/new:os.system [mkdir {trace}]",
        "reward_funcs: !!python/name:os.system",
        "seed: !!python/object:builtins.object {{}}",
        "? !!python/object/apply:os.mkdir [{trace}]\n: 1",
    ],
)
def test_a_hostile_yaml_is_one_line(text, tmp_path, trace, capsys):
    (tmp_path / "run.yaml").write_text(text.format(trace=trace))
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_aliases_that_grow_without_end_are_refused_at_once(tmp_path, capsys):
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    for text in ("\n".join(["a0: &a0 [x]", *levels]), "reward_funcs: &a [*a]"):
        (tmp_path / "run.yaml").write_text(text)
        assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
        assert "more than 100,000 values" in capsys.readouterr().err
