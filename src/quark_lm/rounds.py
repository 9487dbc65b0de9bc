"""What happens at the borders of a round: the callback through which `transformers.Trainer` calls Quark's verbs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset
from transformers import TrainerCallback

from . import measuring
from .collator import Draw
from .errors import ConfigError, DataError, GenerationError, ModelError, RewardError
from .processes import first_tells
from .resuming import random_state, set_random_state
from .run_folder import read_marker, write_marker

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
        self._random: Any = None  # as the last finished step left it
        self._counts: tuple[Any, ...] = ()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer._measured_at = state.global_step if trainer._owed is None else -1
        if trainer.eval_prompts is not None and args.eval_every and state.global_step == 0:
            with trainer.keeping_held_out():
                trainer.evaluate_base()
        if trainer._owed is not None:  # stopped between a round's last step and what is measured then
            round, trainer._owed = trainer._owed, None
            trainer.quantize(round)
            trainer.round_metrics = {"round": round}
            for line in first_tells(trainer.metrics_file.lines):
                trainer.round_metrics |= line if line.get("round") == round else {}
            trainer.finish_round(round)
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            told = read_marker(path)
            if trainer.is_world_process_zero() and told is not None:
                measured = {"measured": True, "stops_early": trainer._stops_early}
                write_marker(path, {**told, **measured, "metrics": trainer.metrics_digest(measured=True)})
                trainer.sweep_held_out()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        self._random = random_state()  # the loader, which is opened next, draws from it, also when the run goes on
        round = state.global_step // args.steps_per_round
        trainer.round_metrics = {"round": round}
        trainer.explore(round)
        assigned = trainer.quantize(round)
        trainer._draw(round)
        figures = measuring.round_figures(trainer, round, assigned)
        measuring.warn_of_drift(trainer, round, figures)
        if state.global_step == 0:
            figures |= {f"initial_{name}": value for name, value in trainer.measure_tokens().items()}
        trainer.round_metrics |= figures
        if state.global_step % args.steps_per_round == 0:
            trainer.log({name: value for name, value in trainer.round_metrics.items() if name != "round"})
        if args.log_completions:
            table = trainer.open_pool().to_table([round]).slice(0, args.num_completions_to_print)
            rows = list(zip(*(table.column(c).to_pylist() for c in ("prompt", "completion", "reward")), strict=True))
            trainer.display.completions(f"round {round + 1}", rows)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if state.global_step % args.steps_per_round:
            self._random = random_state()
        self._counts = trainer._sums.clone(), trainer.current_flos, state.num_input_tokens_seen

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A stop between two micro-batches drops the step, and leaves no trace of it: what follows saves the last."""
        trainer = self.trainer
        if trainer.all_stop():
            set_random_state(self._random)
            trainer._sums, trainer.current_flos, state.num_input_tokens_seen = self._counts
            # shared by all trainers of a process: the next one's optimizer would take no step, and load no state
            trainer.accelerator.gradient_state._set_sync_gradients(True)
            control.should_training_stop = True

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
            control.should_log = False  # logging_strategy="epoch" would end the round's sums here
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
        # on every rank; a scorer may raise any of ours
        except (RewardError, GenerationError, ConfigError, DataError, ModelError) as failed:
            trainer.display.line("Saving what the round has learned; the same command goes on.")
            trainer._failed = failed  # raised when the round's learning is saved
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        told = trainer.verdict() if trainer.is_world_process_zero() and not trainer.interrupted else {}
        if told:
            trainer.display.line(told["text"])
