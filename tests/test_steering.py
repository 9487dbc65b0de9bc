"""The dial's two branches, and `generate`: what it refuses, and that it is the naive loop over the model's logits."""

import pytest
import torch
from datasets import Dataset
from tiny import tiny_gpt2, tiny_tokenizer
from transformers import BloomConfig, BloomForCausalLM

from quark_lm.errors import ConfigError, DataError
from quark_lm.generation.hf import HFCompleter
from quark_lm.prompts import encode
from quark_lm.reward_tokens import RewardTokens
from quark_lm.steering import branches, eos_ids, generate, generate_batches

PROMPTS = ["the cat", "rain", "an old hat is"]


def made(style="embedding"):
    model, tokenizer = tiny_gpt2(), tiny_tokenizer()
    return model, tokenizer, RewardTokens.create(model, tokenizer, num_quantiles=3, style=style)


# -- the branches


@pytest.mark.parametrize("style", ["embedding", "text"])
@pytest.mark.parametrize("position", ["first", "before_completion"])
def test_the_branches_are_the_prompts_with_their_token_and_with_the_worst(style, position):
    _, tokenizer, tokens = made(style)
    encoded = encode(Dataset.from_dict({"prompt": PROMPTS}), tokenizer, position)
    ids, ((contrast, strength),) = branches(tokens, encoded, [2, 0, 1], 2.0)
    assert strength == 2.0
    for prompt, at, quantile, one, other in zip(encoded.ids, encoded.token_at, [2, 0, 1], ids, contrast, strict=True):
        assert one == [*prompt[:at], *tokens.ids[quantile], *prompt[at:]]
        assert other == [*prompt[:at], *tokens.ids[0], *prompt[at:]]
    assert branches(tokens, encoded, [2, 0, 1]) == (ids, [])


def test_a_prompt_without_a_quantile_is_the_same_in_both_branches():
    _, tokenizer, tokens = made()
    encoded = encode(Dataset.from_dict({"prompt": PROMPTS}), tokenizer)
    ids, ((contrast, _),) = branches(tokens, encoded, [None, 2, None], 2.0)
    assert ids[0] == contrast[0] == encoded.ids[0]
    assert ids[2] == contrast[2] == encoded.ids[2]
    assert ids[1] != contrast[1]


# -- generate


def naive(model, tokenizer, tokens, prompt, quantile, strength, steps, from_token="worst"):
    """Greedy, one token at a time, by full forwards."""
    best = torch.tensor([[*tokens.ids[quantile], *tokenizer(prompt)["input_ids"]]])
    worst = torch.tensor([[*(tokens.ids[0] if from_token == "worst" else []), *tokenizer(prompt)["input_ids"]]])
    out = []
    for _ in range(steps):
        one, other = (model(ids).logits[0, -1].float() for ids in (best, worst))
        logits = other + strength * (one - other)
        logits[list(tokens.barred)] = -torch.inf
        token = int(logits.argmax())
        out.append(token)
        if token == tokenizer.eos_token_id:
            break
        best, worst = (torch.cat([ids, torch.tensor([[token]])], 1) for ids in (best, worst))
    return tokenizer.decode(out, skip_special_tokens=True)


@pytest.mark.parametrize(("quantile", "number"), [(-1, 2), (2, 2), (-3, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("strength", [1.0, 2.5])
@torch.no_grad()
def test_generate_is_the_naive_loop_and_counts_quantiles_from_both_ends(quantile, number, strength):
    model, tokenizer, tokens = made()
    options = {"reward_tokens": tokens, "temperature": 0.0, "max_completion_length": 6}
    texts = generate(model, tokenizer, PROMPTS, quantile=quantile, strength=strength, **options)
    assert texts == [naive(model, tokenizer, tokens, prompt, number, strength, 6) for prompt in PROMPTS]


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.5])
@torch.no_grad()
def test_the_dial_may_start_from_the_prompt_without_a_token(strength):
    model, tokenizer, tokens = made()
    options = {"reward_tokens": tokens, "temperature": 0.0, "max_completion_length": 6, "from_token": "none"}
    texts = generate(model, tokenizer, PROMPTS, strength=strength, **options)
    assert texts == [naive(model, tokenizer, tokens, prompt, 2, strength, 6, "none") for prompt in PROMPTS]
    for wrong, why in ({"from_token": "best"}, "neither 'worst' nor 'none'"), ({"strength": {"a": 2.0}}, "names 'a'"):
        with pytest.raises(ConfigError, match=why):
            generate(model, tokenizer, PROMPTS, **{**options, **wrong})


def test_the_stream_ends_with_the_completion():
    model, tokenizer, tokens = made()
    seen = {}
    options = {"reward_tokens": tokens, "seed": 3, "max_completion_length": 8, "on_token": seen.__setitem__}
    assert generate(model, tokenizer, PROMPTS, **options) == [seen[i] for i in range(3)]


@pytest.mark.filterwarnings("ignore:Out of memory")
def test_the_stream_of_a_batch_that_ran_out_of_memory_begins_again(monkeypatch):
    model, tokenizer, tokens = made()
    forward, calls = HFCompleter._forward, []

    def runs_out_once(self, *args):
        calls.append(None)
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        return forward(self, *args)

    monkeypatch.setattr(HFCompleter, "_forward", runs_out_once)
    seen = {}
    options = {"reward_tokens": tokens, "seed": 3, "max_completion_length": 8, "on_token": seen.__setitem__}
    assert generate(model, tokenizer, PROMPTS, **options) == [seen[i] for i in range(3)]
    assert len(calls) > 11


@pytest.mark.parametrize("quantile", [3, 7, -4])
def test_a_quantile_that_no_token_names_is_refused(quantile):
    model, tokenizer, tokens = made()
    with pytest.raises(ConfigError, match=f"quantile={quantile} is none of the 3 .* Set 0") as caught:
        generate(model, tokenizer, PROMPTS, reward_tokens=tokens, quantile=quantile)
    assert "\n" not in str(caught.value)


def test_one_text_in_place_of_a_list_is_refused():
    with pytest.raises(DataError, match=r"prompts is one text, whose letters .* Give a list: \[prompt\]"):
        generate(tiny_gpt2(), tiny_tokenizer(), "the cat")


@pytest.mark.parametrize("with_tokens", [False, True])
def test_a_prompt_fills_the_context_to_its_last_token_and_no_further(with_tokens):
    model, tokenizer, tokens = made()
    room = 128 - 20 - with_tokens
    options = {"reward_tokens": tokens if with_tokens else None, "max_completion_length": 20}
    assert len(generate(model, tokenizer, ["x" * room], **options)) == 1
    with pytest.raises(DataError, match=f"Prompt 1 has {room + 1} tokens, but only {room} fit"):
        generate(model, tokenizer, ["x", "x" * (room + 1)], **options)


def test_a_completion_longer_than_the_context_is_refused():
    with pytest.raises(ConfigError, match="no room for a prompt"):
        list(generate_batches(tiny_gpt2(), tiny_tokenizer(), ["x"], max_completion_length=128))


def test_a_dial_without_two_tokens_is_refused():
    model, tokenizer, tokens = made()
    for options in ({}, {"reward_tokens": tokens, "quantile": None}):
        with pytest.raises(ConfigError, match=r"strength=2\.0 needs two reward tokens"):
            generate(model, tokenizer, PROMPTS, strength=2.0, **options)


def test_the_mode_of_the_model_is_put_back():
    model = tiny_gpt2().train()
    generate(model, tiny_tokenizer(), PROMPTS, max_completion_length=2)
    assert model.training


def test_a_model_without_a_longest_context_takes_any_prompt():
    alibi = BloomForCausalLM(BloomConfig(vocab_size=119, hidden_size=16, n_layer=1, n_head=2))
    assert len(generate(alibi, tiny_tokenizer(), ["x" * 300], max_completion_length=2)) == 1


def test_the_ends_are_the_tokenizer_s_and_the_generation_config_s():
    model, tokenizer = tiny_gpt2(), tiny_tokenizer()
    model.generation_config.eos_token_id = [7, 0]
    assert eos_ids(model, tokenizer) == [0, 7]
