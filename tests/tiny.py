"""Tiny models and a tokenizer, built from configs in milliseconds: what the tests run on. Nothing is downloaded.

GPT-2 has absolute positions and dropout 0.1, Llama rotary positions and no dropout: a mistake in padding or in the mode
(train or eval) shows on the first and hides on the second. The tokenizer works on characters with a few merges, so any
ASCII text round-trips, and decoding sampled ids and encoding them again often gives other ids, as with a real one.
"""

from __future__ import annotations

import os
import string

import torch
from tokenizers import Tokenizer, decoders, models, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# QUARK_TEST_CUDA=1: the trainers of the tests run on the GPU that this machine has.
USE_CPU = os.environ.get("QUARK_TEST_CUDA") != "1"

END, PAD, START = "<|end|>", "<|pad|>", "<|start|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
MERGES = "t h,th e,i n,a n,e r,o n,r e,a t,e n,in g,an d,i s,o r,a l,e s,i t".split(",")

_PIECES = [END, PAD, START, *ROLES, *"\n\t", *(c for c in map(chr, range(32, 127)))]
_PIECES += [merge.replace(" ", "") for merge in MERGES]
VOCAB = len(_PIECES)  # every tiny tokenizer has this length, whichever of its special tokens are in use

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ '<|end|>' }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(bos: bool = False, pad: bool = True, chat: bool = False) -> PreTrainedTokenizerFast:
    """A fast tokenizer over ASCII with `<|end|>` as the end of text.

    Args: bos: `<|start|>` is the beginning of text and is added to every encoding, as Llama's is. pad: `<|pad|>` is the
        padding; without it there is none, as in GPT-2. chat: has a chat template (`<|user|>hello<|assistant|>`).
    """
    backend = Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(_PIECES)}, merges=[tuple(m.split(" ")) for m in MERGES])
    )
    backend.decoder = decoders.Fuse()  # pieces joined as they are: no space between them
    special = {"eos_token": END}
    if pad:
        special["pad_token"] = PAD
    if bos:
        special["bos_token"] = START
        backend.post_processor = processors.TemplateProcessing(
            single=f"{START} $A", pair=f"{START} $A $B", special_tokens=[(START, _PIECES.index(START))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=128,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        extra_special_tokens=list(ROLES) if chat else [],
        **special,
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_gpt2(tie: bool = True, vocab: int = VOCAB, seed: int = 0) -> GPT2LMHeadModel:
    """A GPT-2 of 2 layers, width 32 and 128 positions, with GPT-2's own dropout of 0.1; in eval mode, seeded."""
    config = GPT2Config(
        vocab_size=vocab, n_positions=128, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=tie, **_COMMON
    )
    return _build(GPT2LMHeadModel, config, seed)


def tiny_llama(tie: bool = True, vocab: int = VOCAB, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of 2 layers, width 32, 128 positions, 4 heads on 2 of keys; no dropout; in eval mode, seeded."""
    config = LlamaConfig(
        vocab_size=vocab,
        max_position_embeddings=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
        **_COMMON,
    )
    return _build(LlamaForCausalLM, config, seed)


TINY_MODELS = {
    "gpt2-tied": lambda: tiny_gpt2(tie=True),
    "gpt2-untied": lambda: tiny_gpt2(tie=False),
    "llama-tied": lambda: tiny_llama(tie=True),
    "llama-untied": lambda: tiny_llama(tie=False),
}

# The usual 0.02 gives a model whose output hardly depends on its input: shifted positions would move nothing.
_COMMON = {"initializer_range": 0.2, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}


def _build(kind, config, seed):
    with torch.random.fork_rng(devices=[]):  # a test's own random numbers do not depend on how many models it built
        torch.manual_seed(seed)
        return kind(config).eval()


assert _PIECES.index(END) == 0
assert set(string.printable[:95]) <= set(_PIECES)
