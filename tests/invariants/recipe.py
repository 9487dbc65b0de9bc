"""One small run, made in every way that must give the same losses; also the script that the DDP processes run.

A run learns two rounds of three steps: round 0 from a user's own scored data, round 1 from what the policy explores
with the dial. `python recipe.py FOLDER NAMES...` runs those cases in a process group and writes FOLDER/<name>.json. A
case's name may be followed by ways to run it: ".fsdp" (FSDP2; those come last, for Accelerate keeps to it), ".parts"
(no rank gathers the whole model to explore), ".sharded" (checkpoints in parts), ".stopped" (after two steps, and
resumed), ".halves" (a step's draws in two micro-batches; a stop then comes between them), ".few" (fewer prompts than
processes).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import TINY_MODELS, USE_CPU, tiny_tokenizer
from transformers import TrainerCallback

from quark_lm import QuarkConfig, QuarkTrainer, policy, processes

STEPS_PER_ROUND, NUM_ROUNDS, BATCH = 3, 2, 8
SEED = 7
PROMPTS = [
    "the cat",
    "a long day in the sand",
    "rain",
    "an old",
    "it is not",
    "one more time",
    "her hat is",
    "in there",
]


@dataclass(frozen=True)
class Case:
    model: str
    style: str = "embedding"
    position: str = "first"
    lora: bool = False
    settings: tuple[tuple[str, Any], ...] = ()


CASES = {
    "gpt2-tied": Case("gpt2-tied"),
    "gpt2-untied": Case("gpt2-untied", position="before_completion"),
    "llama-tied": Case("llama-tied", style="text"),
    "llama-untied": Case("llama-untied", settings=(("token_dropout", 0.3), ("draw", "balanced"))),
    "gpt2-tied-lora": Case("gpt2-tied", lora=True),
    "gpt2-untied-lora": Case("gpt2-untied", lora=True),
    "llama-tied-lora": Case("llama-tied", lora=True, style="text"),
}


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """A value of its own for almost every text, the same in every process."""
    return [zlib.crc32(completion.encode()) / 2**32 for completion in completions]


def mortal_reward(completions: list[str], trainer_state: Any, **kwargs: Any) -> list[float]:
    """As `reward`; after the second round it kills the second process, if the file that MORTAL names is not there."""
    path = Path(os.environ.get("MORTAL", "/"))
    if not path.exists() and os.environ.get("RANK") == "1" and trainer_state.global_step > 3:
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return reward(completions)


def failing_reward(completions: list[str], trainer_state: Any, **kwargs: Any) -> list[float]:
    """As `reward`; after the first round the second process's has a value too many, while the file FAILS is there."""
    fails = Path(os.environ.get("FAILS", "")).is_file() and os.environ.get("RANK") == "1"
    return reward(completions) + [0.0] * int(fails and trainer_state.global_step == 3)


_CALLS: list[int] = []


def breaking_reward(completions: list[str], **kwargs: Any) -> list[float]:
    """As `reward`; from its second call on (the base's, the first round's) the second process cannot sample any more,
    while the file FAILS is there."""
    from quark_lm.errors import ModelError
    from quark_lm.generation.hf import HFCompleter

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ModelError("the logits are not finite")

    _CALLS.append(1)
    if len(_CALLS) > 1 and Path(os.environ.get("FAILS", "")).is_file() and os.environ.get("RANK") == "1":
        HFCompleter._complete_batch = broken
    return reward(completions)


def scored_data() -> dict[str, list[Any]]:
    """A user's own data: three completions a prompt, of different lengths."""
    endings = [" sat on the mat", " and then", " s"]
    rows = [(prompt, ending + prompt[:n]) for n, prompt in enumerate(PROMPTS) for ending in endings]
    rewards = np.random.default_rng(SEED).permutation(len(rows)) / len(rows)
    return {"prompt": [p for p, _ in rows], "completion": [c for _, c in rows], "reward": rewards.tolist()}


def lora_config(case: Case, dropout: float = 0.0) -> LoraConfig:
    conv1d = case.model.startswith("gpt2")  # GPT-2's layers hold their weights transposed; PEFT warns unless told
    return LoraConfig(
        r=4, lora_dropout=dropout, target_modules="all-linear", fan_in_fan_out=conv1d, task_type="CAUSAL_LM"
    )


def config(folder: Path, case: Case, **changes: Any) -> QuarkConfig:
    return QuarkConfig(
        **{
            "output_dir": str(folder),
            "num_rounds": NUM_ROUNDS,
            "steps_per_round": STEPS_PER_ROUND,
            "per_device_train_batch_size": BATCH,
            "num_generations": 3,
            "max_completion_length": 6,
            "prompts_per_round": None,
            "num_quantiles": 3,
            "draw": "all",
            "heldout_share": 0.2,
            "beta": 0.3,
            "reward_token_style": case.style,
            "reward_token_position": case.position,
            "learning_rate": 5e-3,
            "adam_epsilon": 0.01,  # large: with a small one Adam hides a gradient that is off by a factor
            "warmup_steps": 0,
            "seed": SEED,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": USE_CPU,
            "disable_tqdm": True,
            **dict(case.settings),
            **changes,
        }
    )


def trainer(
    folder: Path, case: Case, lora_dropout: float = 0.0, held_out: tuple[str, ...] = (), **changes: Any
) -> QuarkTrainer:
    """A trainer of the case, ready to train; its state outside the run's own seed differs from call to call."""
    torch.seed()
    return QuarkTrainer(
        TINY_MODELS[case.model](),
        reward,
        config(folder, case, **changes),
        Dataset.from_dict({"prompt": PROMPTS}),
        eval_dataset=Dataset.from_dict({"prompt": held_out}) if held_out else None,
        processing_class=tiny_tokenizer(),
        peft_config=lora_config(case, lora_dropout) if case.lora else None,
        initial_pool=Dataset.from_dict(scored_data()),
    )


def losses(trainer: QuarkTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class StopAt(TrainerCallback):
    """Ctrl-C while the step of this number is made, as a person gives it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            signal.raise_signal(signal.SIGINT)


# two prompts, so that two of four processes have nothing to explore
FEW = {"prompts_per_round": 2, "meaning_rows": 8}


def changes_of(ways: list[str]) -> dict[str, Any]:
    """The settings of a run in these ways."""
    changes: dict[str, Any] = dict(FEW) if "few" in ways else {}
    if "fsdp" in ways:
        kind = "SHARDED_STATE_DICT" if "sharded" in ways else "FULL_STATE_DICT"
        changes |= {"fsdp": True, "fsdp_config": {"state_dict_type": kind}}
    return changes


def kept_here(model: torch.nn.Module) -> float:
    """The share of the model's numbers that this process holds."""
    parameters = list(model.parameters())
    return sum(policy.local_part(p).numel() for p in parameters) / sum(p.numel() for p in parameters)


class Watched(policy.Joint):
    """Tells at its end how the model was run."""

    told: ClassVar[set[str]] = set()

    def let_go(self) -> None:
        self.told |= {"whole"} if self.whole else set()
        self.told |= {"parts"} if self.parts else set()
        super().let_go()


def main(folder: Path, names: list[str]) -> int:
    torch.set_num_threads(1)
    share, policy.Joint = policy._WHOLE_SHARE, Watched
    for name in names:
        case, *ways = name.split(".")
        case, changes = CASES[case], changes_of(ways)
        parts = 2 if "halves" in ways else 1
        changes["per_device_train_batch_size"] = BATCH // int(os.environ["WORLD_SIZE"]) // parts
        changes["gradient_accumulation_steps"] = parts
        policy._WHOLE_SHARE = 0.0 if "parts" in ways else share
        Watched.told = set()
        if "stopped" in ways:
            stopped = trainer(folder / name, case, **changes)
            if stopped.args.process_index == 1:  # one rank alone is told to stop
                stopped.add_callback(StopAt(2))
            try:
                stopped.train()
            except KeyboardInterrupt:
                assert stopped.state.global_step == (1 if "halves" in ways else 2)  # between halves the step is dropped
        made = trainer(folder / name, case, **changes)
        made.train()
        whole = made.policy.whole()
        told = {"losses": losses(made), "processes": made.accelerator.num_processes, "explored": sorted(Watched.told)}
        told["kept"] = kept_here(made.model)
        if made.policy._copy is not None:
            told["reference_kept"] = kept_here(made.policy._copy)
        if made.is_world_process_zero():
            (folder / f"{name}.json").write_text(json.dumps(told))
            torch.save(whole.state_dict(), folder / f"{name}.pt")
    torch.distributed.barrier()  # no rank may leave while another still waits for it in gloo
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    processes.end_after(lambda: main(Path(sys.argv[1]), sys.argv[2:]))
