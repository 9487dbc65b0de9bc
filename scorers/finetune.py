"""LoRA fine-tuning of all-MiniLM-L6-v2 and a small head on soft targets: one loop for both training scripts; what they
learn from is theirs.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.functional import binary_cross_entropy_with_logits

from quark_lm.rewards.minilm import HUB_ID, build_head, forward, load_encoder

RANK = 16  # on all six linear maps of each of the six layers: 664k parameters, 1.3 MB in float16
ALPHA = 32
HEAD_WIDTH = 128
MAX_LENGTH = 64  # tokens read in training; inference reads 128


def finetune(
    texts: list[str],
    targets: list[float],
    weights: list[float],
    path: Path,
    *,
    epochs: float,
    learning_rate: float,
    batch_size: int = 64,
    seed: int = 0,
) -> dict:
    """Trains on texts with a target in [0, 1] and a weight, writes adapter and head to `path`, returns the settings."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    encoder, tokenizer = load_encoder()
    encoder.set_attn_implementation(
        "eager"
    )  # torch 2.13 on a CPU: the backward of flash attention takes twice the rest of the step
    maps = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    peft_encoder = get_peft_model(encoder, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=maps, lora_dropout=0.0))
    head = build_head(encoder.config.hidden_size, HEAD_WIDTH)
    peft_encoder.eval()  # no dropout in the frozen base: on a CPU its masks cost a third of the time
    trained = [p for p in [*peft_encoder.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01)

    ids = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
    target, weight = torch.tensor(targets), torch.tensor(weights)
    num_batches = int(epochs * len(texts) / batch_size)
    batches = _batches_of_a_length([len(row) for row in ids], batch_size, num_batches, rng)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=num_batches, pct_start=0.06, anneal_strategy="linear"
    )

    start, cpu_start, running = time.perf_counter(), time.process_time(), []
    for step, batch in enumerate(batches):
        longest = max(len(ids[i]) for i in batch)
        input_ids = torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in batch])
        mask = torch.tensor([[1] * len(ids[i]) + [0] * (longest - len(ids[i])) for i in batch])
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(peft_encoder, head, input_ids, mask)
        index = torch.from_numpy(batch)
        loss = (binary_cross_entropy_with_logits(logits, target[index], reduction="none") * weight[index]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        running.append(loss.item())
        if step % 200 == 199 or step + 1 == num_batches:
            seconds = time.perf_counter() - start
            print(f"step {step + 1}/{num_batches}  loss {np.mean(running[-200:]):.4f}  {seconds:.0f} s", flush=True)

    tensors = {}
    for name, parameter in peft_encoder.named_parameters():
        if parameter.requires_grad:  # base_model.model.<module>.lora_A.default.weight
            tensors[name.removeprefix("base_model.model.").removesuffix(".default.weight")] = parameter
    tensors |= {f"head.{name}": parameter for name, parameter in head.named_parameters()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in tensors.items()},
        path,
        metadata={"base": HUB_ID, "lora_scale": json.dumps(ALPHA / RANK)},
    )
    path.chmod(0o644)  # safetensors writes 600, which a wheel would keep
    return {
        "rank": RANK,
        "head_width": HEAD_WIDTH,
        "texts": len(texts),
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
        "training_cpu_seconds": round(time.process_time() - cpu_start),
        "threads": torch.get_num_threads(),
    }


def _batches_of_a_length(
    lengths: list[int], batch_size: int, num_batches: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """`num_batches` batches of indices, in random order; the texts of a batch have about one length."""
    batches: list[np.ndarray] = []
    while len(batches) < num_batches:
        noisy = np.array(lengths) * rng.uniform(0.85, 1.15, size=len(lengths))
        order = np.argsort(noisy)
        epoch = [order[i : i + batch_size] for i in range(0, len(order) - batch_size + 1, batch_size)]
        batches += [epoch[i] for i in rng.permutation(len(epoch))]
    return batches[:num_batches]
