"""Any bytes in any file that is read give a result or an error of ours in one line; never another exception."""

import json
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from quark_lm import Pool
from quark_lm.errors import DataError, PoolError, QuarkError
from quark_lm.evaluation.completions import CompletionSet, read_completions
from quark_lm.evaluation.passes import _drawn
from quark_lm.export import load, model_card
from quark_lm.files import CHECK, checksum
from quark_lm.pool import Journal, PartialRound, read_initial
from quark_lm.prompts import encode, load_prompts
from quark_lm.reward_tokens import FILE_NAME, RewardTokens
from quark_lm.run_folder import MetricsFile, begun_dtype, claim, last_checkpoint, read_marker, what_is_wrong
from quark_lm.train_command import _is_done, _last_round, read_settings

# the same examples in every run: a new finding comes by a person who raises their number
settings.register_profile(
    "fuzz", derandomize=True, deadline=None, database=None, max_examples=40, suppress_health_check=list(HealthCheck)
)
PROFILE = settings.get_profile("fuzz")
SLOW = settings(PROFILE, max_examples=12)  # `datasets` takes a tenth of a second for a file

ODD = st.sampled_from(
    [None, True, -1, 0, 2**63, 2**70, 1e308, "", "a", "\ud800", "\x00", "\x1b[31m", [], {}, [[]], [{}], {"a": 1}]
)
VALUES = st.recursive(
    ODD | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def mutated(whole: bytes):
    """The file with a part cut, flipped, doubled or put in; and bytes of any kind."""

    @st.composite
    def draw(draw):
        content = bytearray(whole)
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(content)))
            how = draw(st.sampled_from(["flip", "cut", "insert", "double"]))
            if how == "flip" and at < len(content):
                content[at] ^= 1 << draw(st.integers(0, 7))
            elif how == "cut":
                del content[at : at + draw(st.integers(1, 40))]
            elif how == "double":
                content[at:at] = content[at : at + 30]
            else:
                content[at:at] = draw(
                    st.binary(max_size=8)
                    | st.sampled_from([b"\n", b'"', b"{", b"[" * 3000, b"NaN", b"1e999", b"\xff", b"\\ud800"])
                )
        return bytes(content)

    return draw() | st.binary(max_size=60)


def like(record: dict):
    """JSON of the record with some of its values, at any depth, replaced or taken away."""

    @st.composite
    def draw(draw):
        def change(value, depth=0):
            how = draw(st.integers(0, 7))
            if how == 0:
                return draw(VALUES)
            if isinstance(value, dict):
                return {k: change(v, depth + 1) for k, v in value.items() if draw(st.integers(0, 9))}
            if isinstance(value, list):
                return [change(v, depth + 1) for v in value]
            return value

        return change(record)

    return draw()


def told(read, *arguments):
    """Calls it; what it raises must be ours, in one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read(*arguments)
        except QuarkError as error:
            message = str(error)
    assert message
    assert "\n" not in message
    return None


@pytest.fixture(scope="module", autouse=True)
def quiet_datasets(tmp_path_factory):
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = before


def in_folder(check):
    """Gives the test a fresh folder for each example."""

    def run(content):
        with tempfile.TemporaryDirectory() as folder:
            check(Path(folder), content)

    run.__name__, run.__doc__ = check.__name__, check.__doc__
    return run


def lines(*records) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


# -- prompts

ROWS = lines({"prompt": "the cat", "label": 1}, {"prompt": "a dog", "label": 2})
CHAT = lines({"prompt": [{"role": "user", "content": "hi"}]}, {"prompt": [{"role": "user", "content": "ho"}]})


def parquet(columns) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


PROMPT_FILES = {
    "a.jsonl": ROWS,
    "b.jsonl": CHAT,
    "a.json": json.dumps([{"prompt": "a"}, {"prompt": "b"}]).encode(),
    "a.csv": b'prompt,label\nthe cat,1\n"a, dog",2\n',
    "a.tsv": b"prompt\tlabel\nthe cat\t1\n",
    "a.txt": b"the cat\na dog\n",
    "a.parquet": parquet({"prompt": ["a", "b"], "label": [1, 2]}),
}


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_prompts(name):
    @SLOW
    @given(mutated(PROMPT_FILES[name]))
    @in_folder
    def check(folder, content):
        (folder / name).write_bytes(content)
        data = told(load_prompts, folder / name)
        if data is not None:
            told(encode, data, tiny_tokenizer(chat=True))

    check()


@SLOW
@given(st.lists(like({"prompt": [{"role": "user", "content": "hi"}], "label": 1}), min_size=1, max_size=3))
@in_folder
def test_prompts_of_odd_values(folder, content):
    (folder / "a.jsonl").write_bytes(lines(*content))
    data = told(load_prompts, folder / "a.jsonl")
    if data is not None:
        told(encode, data, tiny_tokenizer(chat=True))


# -- scored data and completions

SCORED = [{"prompt": "a", "completion": " b", "reward": 0.5}, {"prompt": "c", "completion": " d", "reward": None}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("read", [read_initial, read_completions])
def test_scored_data_and_completions(name, read):
    whole = lines(*SCORED) if name == "a.jsonl" else parquet({k: [row[k] for row in SCORED] for k in SCORED[0]})

    @PROFILE
    @given(mutated(whole))
    @in_folder
    def check(folder, content):
        (folder / name).write_bytes(content)
        told(read, folder / name)

    check()


@PROFILE
@given(st.lists(like({**SCORED[0], "generations": [{"text": "x"}, "y"], "extra": 1}), min_size=1, max_size=3))
@in_folder
def test_scored_data_and_completions_of_odd_values(folder, content):
    (folder / "a.jsonl").write_bytes(lines(*content))
    for read in (read_initial, read_completions):
        data = told(read, folder / "a.jsonl")
        if isinstance(data, CompletionSet):
            json.dumps(data.prompts).encode()
            assert all(isinstance(text, str) and text.encode() is not None for text in data.completions)


def own_completions(folder: Path) -> Path:
    made = CompletionSet(
        prompts=["a", "b"],
        texts=["a", "b"],
        prompt_of=np.array([0, 0, 1]),
        number=np.array([0, 1, 0]),
        completions=["x", "y", "z"],
        completion_ids=[[1], [2], [3]],
        prompt_ids=[[4], [5]],
        columns={"label": [1, 2]},
        strength=np.ones(3),
        scores={"s": np.array([0.1, np.nan, 0.3])},
        nll=np.ones(3),
        nll_tokens=np.ones(3, dtype=np.int64),
        facts={"made": {"strengths": [1.0]}},
    )
    made.write(folder / "completions.parquet")
    return folder / "completions.parquet"


def test_our_own_completions(tmp_path):
    whole = own_completions(tmp_path).read_bytes()

    @PROFILE
    @given(mutated(whole))
    @in_folder
    def check(folder, content):
        (folder / "completions.parquet").write_bytes(content)
        told(read_completions, folder)

    check()


def test_our_own_completions_with_odd_columns(tmp_path):
    table = pq.read_table(own_completions(tmp_path))
    kinds = [pa.int64(), pa.float64(), pa.string(), pa.list_(pa.int32()), pa.bool_(), pa.null()]

    @PROFILE
    @given(st.sampled_from(table.column_names), st.sampled_from(kinds), st.integers(-2, 2**31), st.binary(max_size=9))
    def check(name, kind, value, metadata):
        arrays = {
            pa.int64(): [value, 0, 1],
            pa.float64(): [0.5, None, 2.0],
            pa.string(): ["a", None, "{"],
            pa.list_(pa.int32()): [[1], None, [-1]],
            pa.bool_(): [True, None, False],
            pa.null(): [None] * 3,
        }[kind]
        changed = table.set_column(table.column_names.index(name), name, pa.array(arrays, kind))
        for one in (changed, changed.drop_columns([name]), table.replace_schema_metadata({b"quark": metadata})):
            with tempfile.TemporaryDirectory() as folder:
                pq.write_table(one, Path(folder) / "completions.parquet")
                told(read_completions, folder)

    check()


# -- the pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    pool = Pool.open(tmp_path_factory.mktemp("run") / "pool", create=True)
    for round in range(2):
        pool.append(
            round,
            {
                "reward": [0.1, None, 0.3],
                "prompt_index": [0, 1, 2],
                "held_out": [False, True, None],
                "prompt": ["a", "b", "c"],
                "completion": ["d", "e", "f"],
                "prompt_ids": [[1], [2], []],
            },
        )
    return pool.folder


def reads_pool(folder):
    pool = Pool.open(folder)
    pool.verify()
    pool.gather(np.arange(len(pool)), ["prompt_ids", "completion"])
    return pool.to_table(), pool.rewards, pool.held_out, pool.metrics(0) if pool.num_rounds else {}


def test_a_pools_manifest(pool):
    @PROFILE
    @given(
        mutated((pool / "manifest.json").read_bytes())
        | like(json.loads((pool / "manifest.json").read_text())).map(lambda data: json.dumps(data).encode())
    )
    @in_folder
    def check(folder, content):
        for path in pool.glob("*.parquet"):
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "manifest.json").write_bytes(content)
        told(reads_pool, folder)

    check()


def test_a_pools_rounds(pool):
    """Also without their hashes, which would find each: a file that whoever made the pool made so."""

    @PROFILE
    @given(mutated((pool / "round-00000.parquet").read_bytes()))
    @in_folder
    def check(folder, content):
        for name in ("manifest.json", "round-00001.parquet"):
            (folder / name).write_bytes((pool / name).read_bytes())
        (folder / "round-00000.parquet").write_bytes(content)
        told(reads_pool, folder)
        told(lambda: Pool.open(folder).to_table())

    check()


@PROFILE
@given(
    st.sampled_from(["reward", "held_out", "prompt_index"]),
    st.sampled_from([["a", "b"], [[1], [2]], [1.5, None], [True, None], [{"a": 1}, None], [None, None]]),
)
def test_a_round_whose_columns_are_of_other_kinds(name, values):
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool.open(folder, create=True)
        pool.append(0, {"reward": [0.1, 0.2], "prompt_index": [0, 1], "held_out": [False, True]})
        path = Path(folder) / "round-00000.parquet"
        table = pq.read_table(path)
        pq.write_table(table.set_column(table.column_names.index(name), name, pa.array(values)), path)
        told(lambda: Pool.open(folder).rewards)
        pq.write_table(table.drop_columns([name]), path)
        with pytest.raises(PoolError, match="cannot be read"):
            Pool.open(folder)


# -- journals


def journal_line(record) -> bytes:
    return json.dumps({**record, CHECK: checksum(record)}).encode() + b"\n"


KEY = {"samples": 4, "rows": 2}
JOURNAL = b"".join(
    map(
        journal_line,
        [
            KEY,
            {"indices": [0, 1], "completions": [[1], [2]], "seconds": 0.1},
            {"chunk": 0, "reward": [1.0], "rewards": {}, "extras": {}, "figures": {}},
        ],
    )
)


@PROFILE
@given(mutated(JOURNAL))
@in_folder
def test_a_journal_keeps_what_is_whole_and_no_more(folder, content):
    path = folder / "round-00000.rank-0.partial.jsonl"
    path.write_bytes(content)
    kept = told(PartialRound, folder, 0, 0, KEY)
    if kept is not None:
        assert kept.completions.items() <= {0: [1], 1: [2]}.items()
        kept.add_completions([3], [[7]], 0.1)
        assert PartialRound(folder, 0, 0, KEY).completions == kept.completions


@PROFILE
@given(
    st.lists(
        like({"indices": [0, 1], "completions": [[1], [2]], "seconds": 0.1, "chunk": 0, "rows": [0], "ids": [[1]]}),
        max_size=3,
    )
)
@in_folder
def test_a_journal_of_odd_values_with_the_right_checksums(folder, content):
    path = folder / "round-00000.rank-0.partial.jsonl"
    path.write_bytes(journal_line(KEY) + b"".join(journal_line(line) for line in content if isinstance(line, dict)))
    told(PartialRound, folder, 0, 0, KEY)
    journal = Journal(path)

    def drawn():
        with journal.reading():
            return _drawn(journal)

    told(drawn)


# -- a run's folder


@PROFILE
@given(mutated(lines({"round": 0, "step": 0, "reward": 0.5}, {"round": 0, "step": 2, "loss": 1.0, "nll": 2.0})))
@in_folder
def test_metrics(folder, content):
    path = folder / "metrics.jsonl"
    path.write_bytes(content)
    told(MetricsFile(path).lines)
    told(MetricsFile(path).keep_until, 2, 1)
    told(_last_round, path)


IDENTITY = {"seed": 0, "dtype": "float32", "reward_funcs": ["a"], "num_rounds": 2}


@PROFILE
@given(mutated(json.dumps(IDENTITY).encode()) | like(IDENTITY).map(lambda data: json.dumps(data).encode()))
@in_folder
def test_what_a_run_is(folder, content):
    (folder / "run.json").write_bytes(content)
    (folder / "pool").mkdir()
    (folder / "pool" / "manifest.json").write_bytes(b"{}")
    assert told(begun_dtype, folder) in (None, "float32", "bfloat16", "float16")
    told(claim, folder, IDENTITY)


MARKER = {
    "step": 2,
    "pool_sha256": ["a"],
    "measured": True,
    "sums": [0.0] * 6,
    "files": {"a.bin": "b"},
    "metrics": [0, "x"],
}


@PROFILE
@given(mutated(json.dumps(MARKER).encode()) | like(MARKER).map(lambda data: json.dumps(data).encode()))
@in_folder
def test_a_checkpoints_marker(folder, content):
    checkpoint = folder / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "complete.json").write_bytes(content)
    read_marker(checkpoint)
    what_is_wrong(checkpoint)
    last_checkpoint(folder)


@PROFILE
@given(
    mutated(b'{"name": "train", "seed": 0, "systems": []}')
    | like({"name": "train", "seed": 0}).map(lambda data: json.dumps(data).encode())
)
@in_folder
def test_results(folder, content):
    (folder / "results.json").write_bytes(content)
    told(_is_done, folder, {"name": "train", "seed": 0})


TOKENS = {"style": "text", "position": "first", "texts": ["bad", "good"], "ids": [[1], [2, 3]], "barred": []}


@PROFILE
@given(mutated(json.dumps(TOKENS).encode()) | like(TOKENS).map(lambda data: json.dumps(data).encode()))
@in_folder
def test_reward_tokens(folder, content):
    (folder / FILE_NAME).write_bytes(content)
    tokens = told(RewardTokens.load, folder)
    if tokens is not None:
        model_card(tokens, {}).encode()


YAML = b"""output_dir: runs/x
num_rounds: 3
reward_funcs: [sentiment, "a:b"]
learning_rate: 1.0e-4
model_init_kwargs: {dtype: float32}
use_peft: yes
reward_token_texts:
  - bad
  - good
"""
TAGS = st.sampled_from(
    [
        b"!!python/object:os.system x",
        b"!!timestamp x",
        b"!!int x",
        b"!!binary %",
        b"!!bool x",
        b"!!float x",
        b"2020-99-99",
        b"&a [*a]",
        b"<<: 3",
        b"? [a]",
        b"!x y",
        b"*a",
        b"0b",
        b"1:99",
        b".nan",
        b"--- a",
    ]
)


@PROFILE
@given(
    mutated(YAML)
    | st.tuples(
        st.sampled_from([b"seed: ", b"output_dir: ", b"reward_funcs: ", b"model_init_kwargs: ", b""]), TAGS
    ).map(b"".join)
)
@in_folder
def test_a_yaml_of_settings(folder, content):
    (folder / "run.yaml").write_bytes(content)
    told(read_settings, folder / "run.yaml", [])


# -- a model's folder, which transformers and peft read


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folder of a tiny adapter, beside that of its base."""
    peft = pytest.importorskip("peft")
    base, folder = (tmp_path_factory.mktemp(name) for name in ("base", "adapter"))
    tiny_llama().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    tiny_tokenizer().save_pretrained(folder)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    model.save_pretrained(folder)
    return folder


def loads_with_any(path):
    """Loads the model of the file's folder with other bytes in its place; then it is as it was."""
    whole = path.read_bytes()
    odd = mutated(whole)
    if path.suffix == ".json":
        odd |= like(json.loads(whole)).map(lambda data: json.dumps(data).encode())

    @SLOW
    @given(odd)
    def check(content):
        path.write_bytes(content)
        told(load, path.parent)

    try:
        check()
    finally:
        path.write_bytes(whole)
    assert load(path.parent)[2] is None


@pytest.mark.parametrize("name", ["adapter_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_an_adapters_files(adapter, name):
    loads_with_any(adapter / name)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_models_files(adapter, name):
    folder = Path(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])
    loads_with_any(folder / name)


# -- with a coverage-guided fuzzer, where there is one


@pytest.mark.slow
def test_the_readers_of_json_by_atheris():
    """A minute of coverage-guided bytes for the readers that need no library."""
    atheris = pytest.importorskip("atheris", reason="atheris is not installed")
    import subprocess
    import sys

    del atheris
    script = """
import atheris, sys, tempfile, warnings
from pathlib import Path
warnings.simplefilter("ignore")
with atheris.instrument_imports(include=["quark_lm"]):
    from quark_lm.errors import QuarkError
    from quark_lm.pool import Pool, PartialRound
    from quark_lm.reward_tokens import FILE_NAME, RewardTokens
    from quark_lm.run_folder import MetricsFile, claim, read_marker
folder = Path(tempfile.mkdtemp())
def one(data):
    for name, read in {"manifest.json": lambda: Pool.open(folder), FILE_NAME: lambda: RewardTokens.load(folder),
                       "round-00000.rank-0.partial.jsonl": lambda: PartialRound(folder, 0, 0, {"rows": 1}),
                       "metrics.jsonl": MetricsFile(folder / "metrics.jsonl").lines,
                       "complete.json": lambda: read_marker(folder)}.items():
        (folder / name).write_bytes(data)
        try:
            read()
        except QuarkError:
            pass
        (folder / name).unlink(missing_ok=True)
atheris.Setup(sys.argv, one)
atheris.Fuzz()
"""
    done = subprocess.run([sys.executable, "-c", script, "-max_total_time=60"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_torn_last_line_is_no_damage_and_another_is(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines({"step": 0}, {"step": 1}) + b'{"step": 2, "lo')
    assert [line["step"] for line in MetricsFile(path).lines()] == [0, 1]
    path.write_bytes(b'{"step": 0, "lo\n' + lines({"step": 1}))
    with pytest.raises(DataError, match=r"metrics.jsonl, line 1, is damaged"):
        MetricsFile(path).lines()


def test_the_checksum_of_a_line_is_that_of_its_json():
    record = {"b": [1, 2.5, None], "a": {"é": "x"}}
    assert checksum(record) == zlib.crc32(json.dumps(record).encode())
    assert checksum(json.loads(json.dumps(record))) == checksum(record)
