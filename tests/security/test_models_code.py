"""A model's own code runs only where its own setting says so, as its revision is its own: policy, reward, evaluator."""

import pytest
import transformers
from tiny import tiny_gpt2, tiny_tokenizer
from transformers import GPT2Config, GPT2ForSequenceClassification

from quark_lm import QuarkConfig, QuarkTrainer, export
from quark_lm.cli import main
from quark_lm.errors import ConfigError, ModelError
from quark_lm.packaged import load_model
from quark_lm.rewards import load_reward
from quark_lm.rewards.classifier import classifier_reward, model_reward


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_gpt2().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorer")
    tokenizer = tiny_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, num_labels=1, pad_token_id=1)
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


HUB = {}  # name: the folder that stands for it


@pytest.fixture
def asked(monkeypatch):
    """(kind, name, trust_remote_code, revision) of everything that is loaded by name."""
    calls = []
    for kind in ("AutoModelForCausalLM", "AutoTokenizer", "AutoModelForSequenceClassification"):
        original = getattr(transformers, kind).from_pretrained

        def from_pretrained(name, *args, kind=kind, original=original, **options):
            calls.append((kind, str(name), options.get("trust_remote_code", "asks"), options.get("revision")))
            return original(HUB.get(str(name), name), *args, **options)

        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", from_pretrained)
    return calls


def test_by_default_no_path_runs_a_models_code(base, scorer, asked, tmp_path):
    load_model(str(base))
    export.load(base)
    model_reward(str(scorer))
    classifier_reward(str(scorer), 0, activation="none")
    load_reward(str(scorer))
    args = QuarkConfig(str(tmp_path), report_to="none", use_cpu=True)
    QuarkTrainer(str(base), load_reward(str(scorer)), args, ["the cat", "a dog"])
    assert {name for _, name, _, _ in asked} == {str(base), str(scorer)}
    # never left out: transformers would then ask on the terminal
    assert {trust for _, _, trust, _ in asked} == {False}
    assert {revision for *_, revision in asked} == {None}


def test_the_policys_settings_are_the_policys_alone(base, scorer, asked, tmp_path):
    options = {"trust_remote_code": True, "revision": "main"}
    args = QuarkConfig(str(tmp_path), report_to="none", use_cpu=True, model_init_kwargs=options)
    QuarkTrainer(str(base), str(scorer), args, ["the cat", "a dog"])
    for kind, name, trust, revision in asked:
        assert (trust, revision) == ((True, "main") if name == str(base) else (False, None)), (kind, name)


@pytest.mark.parametrize("form", ["classifier(model={}, label=0, activation=none, {})", "{}({})"])
def test_a_rewards_settings_are_the_rewards_alone(form, scorer, asked):
    load_reward(form.format(scorer, "trust_remote_code=true, revision=main"))
    assert {call[2:] for call in asked} == {(True, "main")}
    asked.clear()
    load_reward(form.format(scorer, "revision=main"))
    assert {call[2:] for call in asked} == {(False, "main")}


def test_the_evaluated_model_and_the_evaluator_have_revisions_of_their_own(base, tmp_path, asked):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}\n')
    tiny_gpt2(seed=1).save_pretrained(tmp_path / "evaluator")
    tiny_tokenizer().save_pretrained(tmp_path / "evaluator")
    HUB.update({"somebody/base": base, "somebody/evaluator": tmp_path / "evaluator"})
    argv = ["evaluate", "somebody/base", "--prompts", str(tmp_path / "prompts.jsonl"), "--num-generations", "1"]
    argv += ["--evaluator", "somebody/evaluator", "--revision", "one", "--evaluator-revision", "two"]
    assert main([*argv, "--output-dir", str(tmp_path / "out")]) == 0
    assert {call[1:] for call in asked} == {("somebody/base", False, "one"), ("somebody/evaluator", False, "two")}
    with pytest.raises(ConfigError, match="would run a stranger's code"):
        export.load(base, trust_remote_code=True)


def test_a_model_that_generates_or_tries_a_reward_has_its_own_revision(base, tmp_path, asked):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}\n')
    HUB["somebody/base"] = base
    assert main(["generate", "somebody/base", "the cat", "--revision", "one"]) == 0
    assert {call[1:] for call in asked} == {("somebody/base", False, "one")}
    asked.clear()
    argv = ["check-reward", "repetition", "--revision", "two", "--num", "32"]
    assert main([*argv, "--prompts", str(tmp_path / "prompts.jsonl"), "--model", "somebody/base"]) == 0
    assert {call[1:] for call in asked} == {("somebody/base", False, "two")}
    (tmp_path / "texts.jsonl").write_text('{"completion": "a b"}\n' * 40)
    assert main([*argv, "--completions", str(tmp_path / "texts.jsonl")]) == 2


CODE = "import pathlib\npathlib.Path({!r}).touch()\nfrom transformers import GPT2LMHeadModel as M, GPT2Config as C\n"


def test_a_folder_with_code_of_its_own_is_refused_without_a_question(base, tmp_path, monkeypatch):
    import json
    import shutil

    folder = tmp_path / "with-code"
    shutil.copytree(base, folder)
    (folder / "stranger.py").write_text(CODE.format(str(tmp_path / "ran")))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "stranger", "auto_map": {"AutoConfig": "stranger.C", "AutoModelForCausalLM": "stranger.M"}}
    (folder / "config.json").write_text(json.dumps(config))

    def question(*args):
        raise AssertionError("it asks on the terminal")

    monkeypatch.setattr("builtins.input", question)
    for load in (load_model, export.load, model_reward):
        with pytest.raises(ModelError):
            load(str(folder))
    assert not (tmp_path / "ran").exists()
