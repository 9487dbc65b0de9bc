"""Body and head against the models' own logits, on every architecture that changes them; the reference; the wrapper."""

import copy
import inspect

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny import VOCAB, tiny_gpt2, tiny_llama
from torch import nn

from quark_lm.errors import ModelError
from quark_lm.policy import (
    Head,
    Policy,
    allow_functions_inside,
    causal_lm,
    check_head,
    completion_log_probs,
    completion_states,
    disable_dropout,
    learned_digest,
    run_body,
)

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 0,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
# What is odd about each: how the head's logits are changed, positions, or where dropout hides.
OTHERS = {
    "Gemma2": {**GROUPED, "head_dim": 8, "final_logit_softcapping": 0.5},  # tanh on the logits
    "Cohere": {**GROUPED, "logit_scale": 0.25},  # logits times
    "Granite": {**GROUPED, "logits_scaling": 4.0, "embedding_multiplier": 2.0},  # logits divided by
    "Qwen3": {**GROUPED, "head_dim": 8},
    "GPTNeoX": {**SMALL, "hidden_dropout": 0.2, "attention_dropout": 0.2},
    "Bloom": {**SMALL, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.2, "attention_dropout": 0.2},  # no position ids
    "Falcon": {**SMALL, "num_attention_heads": 4, "hidden_dropout": 0.2, "attention_dropout": 0.2},  # reads its config
    "OPT": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.2},  # dropout as plain numbers
}


def other(name):
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**OTHERS[name])).eval()


@pytest.fixture(params=OTHERS)
def other_model(request):
    return other(request.param)


def adapted(model):
    torch.manual_seed(1)
    conv1d = isinstance(model, transformers.GPT2LMHeadModel)
    config = LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=conv1d, init_lora_weights=False)
    return get_peft_model(model, config)


# -- body and head


def test_body_and_head_give_the_models_own_logits(tiny_model):
    check_head(tiny_model)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    hidden = run_body(tiny_model, ids, position_ids=torch.arange(4)[None], use_cache=False).last_hidden_state
    torch.testing.assert_close(Head(tiny_model)(hidden.flatten(0, 1)), tiny_model(ids).logits.flatten(0, 1))


def test_scaled_and_capped_logits_are_the_models_own(other_model):
    check_head(other_model)
    assert next(other_model.modules()).training is False


def test_a_model_whose_logits_are_made_otherwise_is_refused():
    class Sharper(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.1
            return output

    model = Sharper(tiny_llama().config).eval()
    with pytest.raises(ModelError, match="Sharper makes its logits in a way that Quark does not know") as caught:
        check_head(model)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_cache_of_keys_and_values_is_refused():
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, state_size=4, vocab_size=64)
    with pytest.raises(ModelError, match="MambaForCausalLM samples from a state"):
        check_head(transformers.MambaForCausalLM(config))


def test_a_model_of_attention_and_a_state_is_refused():
    config = transformers.Lfm2Config(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    with pytest.raises(ModelError, match="Lfm2ForCausalLM samples from a state and not from a cache"):
        check_head(transformers.Lfm2ForCausalLM(config))


def test_the_digest_of_what_is_learned_changes_with_one_bit_of_it_alone():
    model = tiny_gpt2()
    model.transformer.wpe.requires_grad_(False)
    before = learned_digest(model)
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] += 1.0  # which does not learn
    assert learned_digest(model) == before
    weight = model.transformer.h[0].mlp.c_fc.weight
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(2.0))
    assert learned_digest(model) != before
    assert learned_digest(model.bfloat16()) != before


def test_checking_the_head_leaves_the_mode_as_it_was():
    model = tiny_gpt2().train()
    check_head(model)
    assert model.training


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ModelError, match="GPT2Model has no output head"):
        Head(tiny_gpt2().transformer)


def test_a_tied_heads_parameters_are_the_embeddings(tiny_model):
    tied = tiny_model.config.tie_word_embeddings
    assert (Head(tiny_model).parameters()[0] is tiny_model.get_input_embeddings().weight) is tied


def naive_log_probs(model, prompts, completions):
    out = []
    for prompt, completion in zip(prompts, completions, strict=True):
        log_probs = model(torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        out.append(sum(log_probs[place, token].item() for place, token in zip(places, completion, strict=True)))
    return np.array(out)


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14]]
COMPLETIONS = [[20, 21], [22, 23, 24, 0], [25], [26, 27, 28]]


def test_log_probabilities_of_completions_equal_those_of_the_naive_way(tiny_model):
    expected = naive_log_probs(tiny_model, PROMPTS, COMPLETIONS)
    for batch_size in (1, 3, 64):
        ours = completion_log_probs(tiny_model, Head(tiny_model), PROMPTS, COMPLETIONS, 1, batch_size=batch_size)
        np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_so_they_do_on_other_architectures(other_model):
    ours = completion_log_probs(other_model, Head(other_model), PROMPTS, COMPLETIONS, 1)
    np.testing.assert_allclose(ours, naive_log_probs(other_model, PROMPTS, COMPLETIONS), rtol=1e-4)


def test_barred_words_take_no_probability():
    model = tiny_llama()
    head = Head(model)
    plain = completion_log_probs(model, head, PROMPTS, COMPLETIONS, 1)
    barred = completion_log_probs(model, head, PROMPTS, COMPLETIONS, 1, barred=(40, 41))
    assert (barred > plain).all()


# -- dropout


def in_train_mode(model):
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    model.train()
    return [model(ids, use_cache=False).logits for _ in range(2)]


@pytest.mark.parametrize("name", ["gpt2", "GPTNeoX", "Bloom", "OPT", "Falcon"])
def test_dropout_can_be_switched_off_wherever_it_hides(name):
    model = tiny_gpt2() if name == "gpt2" else other(name)
    first, second = in_train_mode(model)
    assert not torch.equal(first, second)
    disable_dropout(model)
    first, second = in_train_mode(model)
    assert torch.equal(first, second)
    assert torch.equal(first, model.eval()(torch.tensor([[5, 6, 7, 8, 9, 10]]), use_cache=False).logits)


def test_an_adapters_dropout_is_switched_off_too():
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_llama(), config)
    disable_dropout(model)
    first, second = in_train_mode(model)
    assert torch.equal(first, second)


# -- the reference


def test_the_adapter_off_is_the_base_bit_for_bit(tiny_model):
    ids = torch.tensor([[5, 6, 7, 8]])
    base = tiny_model(ids).logits
    model = adapted(tiny_model)
    policy = Policy(model)
    assert not torch.equal(model(ids).logits, base)
    with policy.reference() as (reference, head):
        states = run_body(reference, ids, use_cache=False).last_hidden_state.flatten(0, 1)
        torch.testing.assert_close(head(states), base.flatten(0, 1))
        assert torch.equal(reference(ids).logits, base)
        assert not torch.is_grad_enabled()
    assert not torch.equal(model(ids).logits, base)
    assert policy._copy is None


def test_the_frozen_copy_stays_while_the_policy_learns(tiny_model):
    before = {name: weight.clone() for name, weight in tiny_model.state_dict().items()}
    policy = Policy(tiny_model.train())
    for parameter in tiny_model.parameters():
        parameter.data += 1.0
    with policy.reference() as (reference, _):
        assert not reference.training
        assert not any(parameter.requires_grad for parameter in reference.parameters())
        assert all(torch.equal(weight, before[name]) for name, weight in reference.state_dict().items())


def test_evaluating_puts_the_mode_back_even_after_an_error():
    model = tiny_gpt2().train()
    policy = Policy(model)

    def fails():
        with policy.evaluating():
            assert not model.training
            assert not torch.is_grad_enabled()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert model.training
    assert torch.is_grad_enabled()


# -- a function inside the forward


@pytest.mark.parametrize("wrap", [lambda model: model, adapted], ids=["plain", "adapter"])
def test_a_function_runs_inside_the_wrapped_forward(wrap):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module
            self.calls = 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    model = wrap(tiny_llama())
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    allow_functions_inside(model)
    allow_functions_inside(model)  # a second trainer on the same model
    wrapped = Wrapper(model)
    assert wrapped(inside=lambda batch, denominator: (batch, denominator), batch={"a": 1}, denominator=2) == (
        {"a": 1},
        2,
    )
    assert wrapped.calls == 1
    assert torch.equal(model(ids).logits, before)


def test_the_forward_still_shows_its_own_arguments():
    model = tiny_llama()
    expected = list(inspect.signature(model.forward).parameters)
    allow_functions_inside(model)
    assert list(inspect.signature(model.forward).parameters) == expected


def test_a_copy_of_the_wrapped_model_runs_on_its_own_weights():
    model = tiny_llama()
    allow_functions_inside(model)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    ids = torch.tensor([[5, 6, 7]])
    assert twin(ids).logits.abs().max() == 0
    assert model(ids).logits.abs().max() > 0
    assert twin(inside=lambda x: x, x=3) == 3


def test_the_inner_model_is_found_with_and_without_an_adapter():
    model = tiny_llama()
    assert causal_lm(model) is model
    assert causal_lm(adapted(model)) is model
    assert causal_lm(model) is model  # PEFT left a peft_config on it


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_a_merged_adapter_samples_the_same_and_the_weights_come_back_bit_for_bit(build):
    model = get_peft_model(
        build(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    ).eval()
    policy, ids = Policy(model), torch.tensor([[5, 6, 7, 8]])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        apart = model(ids).logits
        with policy.reference() as (reference, _), policy.merged():  # off, it stays off
            bare = reference(ids).logits
        with policy.merged():
            changed = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
            torch.testing.assert_close(model(ids).logits, apart)
        assert len(changed) == sum("lora_A" in name for name in before)
        assert torch.equal(model(ids).logits, apart)
        assert (bare - apart).abs().max() > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["lora_bias", "use_dora"])
def test_an_adapter_whose_merging_would_not_come_back_bit_for_bit_stays_apart(kind):
    config = LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=kind == "use_dora", **{kind: True}
    )
    model = get_peft_model(tiny_gpt2(), config).eval()  # whose layers have biases
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        apart = model(torch.tensor([[5, 6, 7, 8]])).logits
        with Policy(model).merged():
            assert torch.equal(model(torch.tensor([[5, 6, 7, 8]])).logits, apart)
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Model has `tie_word_embeddings")
def test_an_adapter_of_a_tied_head_is_not_merged_into_the_embedding():
    model = get_peft_model(
        tiny_gpt2(), LoraConfig(r=4, target_modules=["lm_head", "c_attn"], init_lora_weights=False)
    ).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        apart = model(ids).logits
        with Policy(model).merged():
            torch.testing.assert_close(model(ids).logits, apart)


@pytest.mark.parametrize("rows", [None, [3, 4]])  # new rows of reward tokens are another kind of layer
def test_a_float32_lora_beside_bfloat16_weights_is_multiplied_in_bfloat16_and_learns_in_float32(rows):
    def states(dtype: torch.dtype, casts: bool):
        torch.manual_seed(0)
        model = get_peft_model(
            tiny_llama().to(dtype), LoraConfig(r=4, target_modules="all-linear", trainable_token_indices=rows)
        )
        for name, parameter in model.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        seen = set()
        for name, module in model.named_modules():
            if name.endswith("lora_A.default"):
                module.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
        batch = {
            "input_ids": torch.arange(12).view(2, 6),
            "attention_mask": torch.ones(2, 6, dtype=torch.long),
            "position_ids": torch.arange(6).expand(2, 6),
            "rows": torch.tensor([2, 3, 4, 8, 9, 10]),
        }
        if casts:  # PEFT by itself
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
            hidden = run_body(model, **inputs, use_cache=False).last_hidden_state.flatten(0, 1)[batch["rows"]]
        else:
            hidden = completion_states(model, batch)
        hidden[:, ::2].float().sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return hidden.detach().float(), gradients, seen

    exact, exact_gradients, seen = states(torch.float32, False)
    assert seen == {torch.float32}
    cast, cast_gradients, seen = states(torch.bfloat16, True)
    assert seen == {torch.float32}
    ours, gradients, seen = states(torch.bfloat16, False)
    assert seen == {torch.bfloat16}
    assert gradients.dtype == torch.float32

    def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
        return float((found - wanted).norm() / wanted.norm())

    # no further from float32 than PEFT's own way, whose base weights are rounded too
    assert error(ours, exact) < 2 * error(cast, exact) < 0.1
    assert error(gradients, exact_gradients) < 2 * error(cast_gradients, exact_gradients) < 0.2
