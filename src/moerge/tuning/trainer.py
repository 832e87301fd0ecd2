"""transformers' Trainer with our losses. Shapes: B sequences, T tokens, N routed things, E experts, L routed layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback

from moerge.architecture.sequence import BY_SEQUENCE
from moerge.distillation import DistillationTarget, hidden_distance
from moerge.errors import InputError
from moerge.tuning import losses
from moerge.tuning.adapters import save_trained
from moerge.tuning.launch import world_size
from moerge.tuning.marks import Marks
from moerge.tuning.metrics import Metrics, not_finite
from moerge.tuning.models import local, part_of
from moerge.tuning.parts import Schedule, router_modules
from moerge.tuning.run_directory import mark_complete
from moerge.tuning.sequences import collate
from moerge.tuning.settings import Tuning
from moerge.tuning.tokens import Tokens

_OPTIMIZER, _SCHEDULER = "optimizer.pt", "scheduler.pt"
"""Trainer's names in a training checkpoint."""


@dataclass
class _Step:
    """Sums over the parts of a step."""

    parts: int = 0
    scalars: dict[str, torch.Tensor] = field(default_factory=dict)
    load_LE: torch.Tensor | None = None
    drawn_S: torch.Tensor | None = None


class TuneTrainer(Trainer):
    """transformers' Trainer on our losses and data.

    `schedule` says what is trained when; with `only_trained` checkpoints hold nothing else. `metrics` gets a row for each step,
    `advance` receives the number of tokens done.
    """

    def __init__(
        self,
        *,
        settings: Tuning,
        schedule: Schedule,
        only_trained: bool,
        names: Sequence[str],
        metrics: Metrics,
        layers: Sequence[int],
        heldout: Mapping[str, Tokens],
        advance: Callable[[int], None],
        **options: Any,
    ) -> None:
        self.sharded = settings.sharding != "none"
        arguments = options["args"]
        # Trainer would refuse to checkpoint a sharded model's optimizer, since it does not know how; we do
        arguments.save_only_model = self.sharded
        super().__init__(data_collator=collate, callbacks=[_Complete(self)], **options)
        arguments.save_only_model = False
        self.model_accepts_loss_kwargs = False  # else Trainer would not divide the loss by the number of parts
        self._settings, self._schedule, self._names = settings, schedule, names
        self._only_trained = only_trained
        self._metrics, self._layers, self._advance = metrics, layers, advance
        self._heldout = heldout
        self._model = model = cast(Any, self.model)
        self._by_sequence = model.config.model_type in BY_SEQUENCE
        self._top_k = [module.top_k for module in router_modules(model).values()]
        self._parameters = dict(model.named_parameters())
        self._step, self._begun = _Step(), time.perf_counter()
        self._learned_a_part = 1.0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the losses, each a mean over these sequences; its parts are kept for the step's row."""
        wanted, settings = self._settings.losses, self._settings
        marks = Marks.of(inputs)
        options = {"output_router_logits": True} if self._top_k else {}
        options |= {"output_hidden_states": True} if self._layers else {}
        output = model(input_ids=inputs["input_ids"], use_cache=False, **options, **marks.options(by_sequence=self._by_sequence))
        logits_BTV = output.logits.float()
        parts = {"cross_entropy": losses.cross_entropy(logits_BTV, inputs["input_ids"], marks.learned_BT)}
        if settings.distils:
            parts |= self._distillation(logits_BTV, output, inputs, marks)
        if marks.learned_BT is not None:  # a mean over what is learned in the whole step, not in this part of it
            parts = {key: part * (marks.count / self._learned_a_part) for key, part in parts.items()}
        parts |= self._routing(output, marks)
        weights = {
            "cross_entropy": wanted.cross_entropy,
            "distillation": wanted.distillation.weight,
            "hidden": wanted.distillation.hidden,
            "load_balance": wanted.load_balance,
            "router_z": wanted.router_z,
        }
        loss = torch.stack([weights[key] * part for key, part in parts.items() if weights.get(key)]).sum()
        self._keep({"loss": loss, **parts}, inputs["source"])
        return (loss, output) if return_outputs else loss

    def _distillation(
        self, logits_BTV: torch.Tensor, output: Any, inputs: dict[str, Any], marks: Marks
    ) -> dict[str, torch.Tensor]:
        ids = inputs.get("target_ids")
        theirs = tuple(marks.predicting(inputs[f"hidden.{layer}"]) for layer in self._layers)
        logits_NM, ids_NM = marks.predicting(inputs["target_logits"]), None if ids is None else marks.predicting(ids)
        target, settings = DistillationTarget(logits_NM, ids_NM, theirs), self._settings.losses.distillation
        found = {"distillation": losses.forward_kl(marks.predicting(logits_BTV), target, settings.temperature)}
        if self._layers:
            found["hidden"] = hidden_distance([marks.predicting(output.hidden_states[n]) for n in self._layers], target)
        return found

    def get_batch_samples(self, *args: Any, **options: Any) -> Any:
        """Take Trainer's batches of a step, and count the tokens that are learned from them, a mean over parts and processes."""
        batches, items = super().get_batch_samples(*args, **options)
        counts = [Marks.of(batch).count for batch in batches if "marks" in batch]
        if counts:
            mean = torch.tensor(sum(counts) / len(counts), dtype=torch.float64, device=self.args.device)
            self._learned_a_part = float(_mean_over_processes(mean))
        return batches, items

    def _routing(self, output: Any, marks: Marks) -> dict[str, torch.Tensor]:
        """Balance, z-loss and entropy, means over layers; the load is that of all processes together."""
        routed = self._routed(output, marks)
        if not routed:
            return {}
        load_LE = _mean_over_processes(torch.stack([load_E for _, load_E in routed]))
        step = self._step
        step.load_LE = load_LE if step.load_LE is None else step.load_LE + load_LE
        balance = [losses.load_balance(s_NE, load_E) for (s_NE, _), load_E in zip(routed, load_LE, strict=True)]
        return {
            "load_balance": torch.stack(balance).mean(),
            "router_z": torch.stack([losses.router_z(scores_NE) for scores_NE, _ in routed]).mean(),
            "router_entropy": torch.stack([losses.router_entropy(scores_NE) for scores_NE, _ in routed]).mean().detach(),
        }

    def _routed(self, output: Any, marks: Marks) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Scores [N, E] before the softmax and load [E], for each layer with a router; one for a sequence-routed model."""
        if self._by_sequence:
            chosen_BE = (output.routing.alpha.detach() > 0).float()
            scores_BE = output.routing.scores.float() / self._model.config.routing.get("temperature", 1.0)
            return [(scores_BE, chosen_BE.sum(0) / chosen_BE.sum())]
        if not self._top_k:
            return []
        found = zip(map(marks.real, output.router_logits), self._top_k, strict=True)
        return [(scores_NE.float(), losses.load(scores_NE, top_k)) for scores_NE, top_k in found]

    def _keep(self, parts: dict[str, torch.Tensor], source_B: torch.Tensor) -> None:
        step = self._step
        step.parts += 1
        for key, part in parts.items():
            step.scalars[key] = step.scalars.get(key, 0) + part.detach().float()
        drawn_S = torch.bincount(source_B, minlength=len(self._names))
        step.drawn_S = drawn_S if step.drawn_S is None else step.drawn_S + drawn_S

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        """Run Trainer's step; what is still frozen gets no gradient, so that AdamW leaves it and its moments alone.

        An expert without a sequence has the gradient zero, as it has on several processes and as experts that lie in one tensor
        always have: its moments and weight decay go on.
        """
        loss: torch.Tensor = super().training_step(*args, **options)
        frozen, slices = self._schedule.frozen(self.state.global_step), self._schedule.slices(self.state.global_step)
        for name in self._schedule.ever_trained:
            parameter = self._parameters[name]
            if name in frozen:
                parameter.grad = None
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif name in slices:
                local(parameter.grad)[~_is_open(parameter, slices[name])] = 0
        return loss

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Name the parameters that decay, as Trainer does; of those that are open only in part, `_decay_slices` sees to it."""
        return [name for name in super().get_decay_parameter_names(model) if name not in self._schedule.sliced]

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """Create Trainer's optimizer, with weight decay of slices."""
        optimizer: Any = super().create_optimizer(*args, **options)
        if self._schedule.sliced:
            optimizer.register_step_pre_hook(self._decay_slices)
        return optimizer

    @torch.no_grad()
    def _decay_slices(self, optimizer: Any, *args: Any) -> None:
        """AdamW's decoupled weight decay of open slices alone, before its step as there; what has no gradient does not move."""
        step = self.state.global_step
        frozen, slices = self._schedule.frozen(step), self._schedule.slices(step)
        factor = 1 - optimizer.param_groups[0]["lr"] * self._settings.weight_decay
        for name in self._schedule.sliced - frozen:
            parameter = self._parameters[name]
            open_E = _is_open(parameter, slices.get(name, range(len(parameter))))
            local(parameter).mul_(torch.where(open_E, factor, 1.0)[:, None, None])

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save as Trainer does; where adapters are trained, only what is trained."""
        if not self._only_trained:
            super()._save(output_dir, state_dict)
        elif self.args.should_save or self.sharded:
            save_trained(self._model, self._schedule, Path(str(output_dir)), write=self.args.should_save)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A step's row for the metrics, and for whatever else Trainer reports to."""
        if "grad_norm" not in logs:
            return
        row = self._row(logs)
        if row["step"] % self._settings.evaluate_every == 0 or row["step"] == self._settings.total_steps:
            row |= self.heldout_losses()
        wrong = not_finite(row)
        if wrong:
            raise InputError(f"{wrong} is not a number after step {row['step']}: lower learning_rate, or look at the data")
        if self.is_world_process_zero():
            self._metrics.add(row)
        self._advance(self._settings.batch * self._settings.length)
        flat = {f"heldout/{name}": loss for name, loss in row.get("heldout", {}).items()}
        super().log({key: value for key, value in row.items() if isinstance(value, int | float)} | flat)
        self.state.log_history.clear()  # metrics.jsonl has it; every checkpoint would hold all of it again

    @torch.no_grad()
    def heldout_losses(self) -> dict[str, dict[str, float]]:
        """Cross-entropy on the second halves of each held-out text's sequences, in nats a token.

        A model that routes sequences routes by the first half: by the whole it would be chosen by what it is to predict. Every
        process runs all of it, as shards need.
        """
        found = {}
        self._model.eval()
        for name, tokens in self._heldout.items():
            count = min(tokens.sequences, self._settings.heldout_sequences)
            total, weight, rows = 0.0, 0, self.args.per_device_train_batch_size
            for start in range(0, count, rows):
                numbers = range(start, min(start + rows, count))
                inputs = {"input_ids": _stacked(map(tokens.sequence, numbers)).to(self.args.device)}
                inputs |= {} if tokens.learned is None else {"marks": _stacked(map(tokens.marks, numbers)).to(self.args.device)}
                counted = len(numbers) if tokens.learned is None else Marks.of(inputs).behind(self._settings.length // 2).count
                total += float(self._second_half(inputs)) * counted if counted else 0.0
                weight += counted
            if not weight:
                raise InputError(f"heldout.{name} has no answer in the second halves of sequences: lower 'length', or add text")
            found[name] = total / weight
        self._model.train()
        _let_go(self._model)
        self._begun = time.perf_counter()
        return {"heldout": found} if found else {}

    def _second_half(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        ids_BT, marks, options = inputs["input_ids"], Marks.of(inputs), dict[str, Any]()
        half = ids_BT.shape[1] // 2
        with self.compute_loss_context_manager():
            if self._by_sequence:
                first = {key: value[:, :half] for key, value in inputs.items()}
                read = Marks.of(first).options(by_sequence=False)
                options = {"routing": self._model(input_ids=first["input_ids"], use_cache=False, **read).routing}
            options |= marks.options(by_sequence=False)
            logits_BTV = self._model(input_ids=ids_BT, use_cache=False, **options).logits.float()
        return losses.cross_entropy(logits_BTV[:, half - 1 :], ids_BT[:, half - 1 :], marks.behind(half - 1).learned_BT)

    def before_training(self) -> None:
        """The row of step 0, where there is something to say."""
        found = self.heldout_losses()
        if found and self.is_world_process_zero():
            self._metrics.add({"step": 0, "tokens": 0, **found})

    def _row(self, logs: dict[str, float]) -> dict[str, Any]:
        step, self._step = self._step, _Step()
        assert step.drawn_S is not None
        means = _mean_over_processes(torch.stack([value / step.parts for value in step.scalars.values()]))
        drawn_S = _mean_over_processes(step.drawn_S.double()) * world_size()
        tokens, now = self._settings.batch * self._settings.length, time.perf_counter()
        speed, self._begun = tokens / (now - self._begun), now
        row: dict[str, Any] = {
            "step": self.state.global_step,
            "tokens": self.state.global_step * tokens,
            **dict(zip(step.scalars, means.tolist(), strict=True)),
        }
        if step.load_LE is not None:
            row["load"] = [[round(f, 6) for f in load_E] for load_E in (step.load_LE / step.parts).tolist()]
        row |= {"learning_rate": logs["learning_rate"], "grad_norm": float(logs["grad_norm"]), "tokens_per_second": speed}
        row["drawn"] = {name: round(count) for name, count in zip(self._names, drawn_S.tolist(), strict=True)}
        return row

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """In order: the mixture has shuffled already, and whatever the number of processes the batches are the same."""
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)  # type: ignore[arg-type]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save as Trainer does; of a sharded model the whole state, as one process would have it."""
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self._model, self._adamw, options=whole)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / _OPTIMIZER)
            torch.save(self._scheduler.state_dict(), Path(output_dir) / _SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load what `_save_optimizer_and_scheduler` saved, each process its part."""
        if not self.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / _OPTIMIZER, map_location="cpu", weights_only=True)
        whole = StateDictOptions(full_state_dict=True, strict=False)
        saved = set(state["state"])
        set_optimizer_state_dict(self._model, self._adamw, state, options=whole)
        for name, parameter in self._parameters.items():
            if name not in saved:  # not open yet: torch has made up a state, which would count as a step
                self._adamw.state.pop(parameter, None)
        self._scheduler.load_state_dict(torch.load(Path(checkpoint) / _SCHEDULER, weights_only=True))

    @property
    def _adamw(self) -> Any:
        wrapped: Any = self.optimizer
        return wrapped.optimizer

    @property
    def _scheduler(self) -> Any:
        return self.lr_scheduler

    def _load_from_checkpoint(self, *args: Any, **options: Any) -> None:
        """Nothing: the model was loaded from there already. Trainer's own way compares names as they are in memory with names as
        they are on disk, which differ for a MoE's experts, and skips what does not match without an error.
        """


class _Complete(TrainerCallback):
    """Marks training checkpoints that are whole on the disk, all processes' parts of them; begins with the held-out texts."""

    def __init__(self, trainer: TuneTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.global_step == 0:
            self._trainer.before_training()

    def on_save(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self._trainer.accelerator.wait_for_everyone()
        if args.should_save:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _stacked(rows: Iterable[np.ndarray]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(row) for row in rows])


def _let_go(model: Any) -> None:
    """Let go, in a sharded model, of the others' parts that forward keeps for a backward (FSDP2): the optimizer knows its own."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _is_open(parameter: torch.Tensor, open_slices: Sequence[int]) -> torch.Tensor:
    """Return which slices of a parameter [E, ...] are among these, bool [E]; of a sharded one, the slices of this process."""
    open_E = torch.zeros(len(parameter), dtype=torch.bool, device=parameter.device)
    open_E[open_slices] = True
    mine: torch.Tensor = part_of(open_E, parameter)
    return mine


def _mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    if world_size() == 1:
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value / world_size()
