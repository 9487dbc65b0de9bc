"""The tiny models and the tokenizer are what the other tests take them for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CHAT_TEMPLATE, END, START, VOCAB, tiny_gpt2, tiny_llama, tiny_tokenizer


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_tied_models_share_their_weights_and_untied_ones_do_not(build):
    tied, untied = build(tie=True), build(tie=False)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert not torch.equal(untied.get_output_embeddings().weight, untied.get_input_embeddings().weight)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_the_same_seed_gives_the_same_model_and_leaves_the_global_state_alone(build):
    before = torch.get_rng_state()
    first, second, other = build(seed=1), build(seed=1), build(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])
    assert not torch.equal(first.get_input_embeddings().weight, other.get_input_embeddings().weight)


def test_every_model_generates(tiny_model, tokenizer):
    batch = tokenizer(["the cat"], return_tensors="pt")
    output = tiny_model.generate(**batch, max_new_tokens=5, do_sample=True, pad_token_id=tokenizer.pad_token_id)
    assert batch["input_ids"].shape[1] < output.shape[1] <= batch["input_ids"].shape[1] + 5
    assert tiny_model.get_input_embeddings().num_embeddings == len(tokenizer) == VOCAB


def test_gpt2_drops_out_in_train_mode_and_llama_does_not(tokenizer):
    ids = tokenizer(["the cat sat"], return_tensors="pt")["input_ids"]
    for model, drops in [(tiny_gpt2().train(), True), (tiny_llama().train(), False)]:
        assert torch.equal(model(ids).logits, model(ids).logits) is not drops


def test_shifted_positions_show_on_gpt2_and_hide_on_llama(tokenizer):
    ids = tokenizer(["the cat sat"], return_tensors="pt")["input_ids"]
    positions = torch.arange(ids.shape[1])[None]
    moved = {}
    for name, model in [("gpt2", tiny_gpt2()), ("llama", tiny_llama())]:
        plain, shifted = (model(ids, position_ids=p).logits.log_softmax(-1) for p in (positions, positions + 7))
        moved[name] = (plain - shifted).abs().max().item()
    assert moved["gpt2"] > 0.3
    assert moved["llama"] < 1e-3


@given(st.text(alphabet=[chr(c) for c in range(32, 127)] + ["\n", "\t"], max_size=60))
def test_any_ascii_text_round_trips(text):
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_decoded_ids_may_encode_to_other_ids():
    tokenizer = tiny_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["t", "h", "e"])
    assert tokenizer(tokenizer.decode(ids))["input_ids"] != ids


def test_special_tokens_are_there_as_asked():
    plain, bare, start = tiny_tokenizer(), tiny_tokenizer(pad=False), tiny_tokenizer(bos=True)
    assert plain.eos_token == END
    assert plain.pad_token_id not in (None, plain.eos_token_id)
    assert bare.pad_token is None
    assert plain.bos_token is None
    assert start("a")["input_ids"][0] == start.convert_tokens_to_ids(START) == start.bos_token_id
    assert len(plain) == len(bare) == len(start) == len(tiny_tokenizer(chat=True)) == VOCAB
    assert plain.decode(plain(f"a{END}")["input_ids"], skip_special_tokens=True) == "a"


def test_the_chat_template_marks_who_speaks():
    tokenizer = tiny_tokenizer(chat=True)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    messages = [{"role": "user", "content": "hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>hello<|assistant|>"
    assert len(tokenizer(text)["input_ids"]) == 2 + len(tokenizer("hello")["input_ids"])


def test_tokenizer_and_model_survive_saving(tmp_path, tiny_model, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer(["the cat"], return_tensors="pt")["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path)("the cat")["input_ids"] == ids[0].tolist()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, tiny_model(ids).logits)
