"""What happens at the borders of a round: the callback through which `transformers.Trainer` calls Quark's verbs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset
from transformers import TrainerCallback

from . import measuring
from .collator import Draw
from .errors import GenerationError, RewardError
from .packaged import base_name
from .processes import first_tells
from .run_folder import file_digests, read_marker, write_marker

if TYPE_CHECKING:
    from .trainer import QuarkTrainer


class Draws(Dataset):
    """The current round's draws."""

    def __init__(self, trainer: QuarkTrainer) -> None:
        self.trainer = trainer

    def __len__(self) -> int:
        args = self.trainer.args
        return args.steps_per_round * self.trainer.get_total_train_batch_size(args)

    def __getitem__(self, index: int) -> Draw:
        return self.trainer.draws[index]


class Rounds(TrainerCallback):
    """Calls the verbs at the borders of a round, and tells what happened."""

    def __init__(self, trainer: QuarkTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer._measured_at = state.global_step if trainer._owed is None else -1
        if trainer.eval_prompts is not None and args.eval_every and state.global_step == 0:
            trainer.evaluate_base()
        if trainer._owed is not None:  # stopped between a round's last step and what is measured then
            round, trainer._owed = trainer._owed, None
            trainer.quantize(round)
            trainer.round_metrics = {}
            for line in first_tells(trainer.metrics_file.lines):
                trainer.round_metrics |= line if line.get("round") == round else {}
            trainer.finish_round(round)
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            told = read_marker(path)
            if trainer.is_world_process_zero() and told is not None:
                measured = {"measured": True, "stops_early": trainer._stops_early}
                write_marker(path, {**told, **measured, "metrics": trainer.metrics_digest(measured=True)})

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        round = state.global_step // args.steps_per_round
        trainer.round_metrics = {"round": round}
        trainer.explore(round)
        assigned = trainer.quantize(round)
        trainer._draw(round)
        figures = measuring.round_figures(trainer, round, assigned)
        if state.global_step == 0:
            figures |= {f"initial_{name}": value for name, value in trainer.measure_tokens().items()}
        trainer.round_metrics |= figures
        if state.global_step % args.steps_per_round == 0:
            trainer.log({name: value for name, value in trainer.round_metrics.items() if name != "round"})
        if args.log_completions:
            table = trainer.open_pool().to_table([round]).slice(0, args.num_completions_to_print)
            rows = list(zip(*(table.column(c).to_pylist() for c in ("prompt", "completion", "reward")), strict=True))
            trainer.display.completions(f"round {round + 1}", rows)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.check_finite()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._sums[5] += 1
        if state.global_step % args.steps_per_round == 0:
            control.should_log = True  # a round's last figures belong to it
        if self.trainer.all_stop():
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        # asked of all ranks: a signal may have come to one of them since the last step
        if trainer.all_stop():
            control.should_save = control.should_training_stop = True
            return
        if state.global_step % args.steps_per_round:
            return
        try:
            trainer.finish_round(state.global_step // args.steps_per_round - 1)
            if trainer._stops_early:
                control.should_training_stop = True
        except KeyboardInterrupt as stopped:
            if not stopped.args:
                raise  # a second Ctrl-C, which stops at once
            # the round's learning is saved; what was not measured will be when the run goes on
            control.should_save = control.should_training_stop = True
        except (RewardError, GenerationError) as failed:
            if trainer.accelerator.num_processes > 1:
                raise  # the other ranks do not know of it
            trainer._failed = failed  # raised when the round's learning is saved
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        told = trainer.verdict() if trainer.is_world_process_zero() and not trainer.interrupted else {}
        if told:
            trainer.display.line(told["text"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Marks the checkpoint as complete: each rank calls this when Trainer has written its part."""
        trainer = self.trainer
        trainer.accelerator.wait_for_everyone()
        sums = trainer._all_sums().tolist()
        if args.should_save:
            marker = {
                "step": state.global_step,
                "pool_sha256": trainer.open_pool().hashes(),
                "measured": trainer._measured_at == state.global_step,
                "stops_early": trainer._stops_early,
                "base": base_name(trainer.model),
                "sums": sums,
            }
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            marker["metrics"] = trainer.metrics_digest(marker["measured"])
            write_marker(path, {**marker, "files": file_digests(path)})
