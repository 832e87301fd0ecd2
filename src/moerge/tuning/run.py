"""`moerge tune` from the settings to the checkpoint: read `tune` first."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerge.checkpoint.manifest import read_manifest, sealed
from moerge.checkpoint.reader import Checkpoint
from moerge.checkpoint.staging import MANIFEST
from moerge.checkpoint.workspace import machine_errors
from moerge.errors import InputError
from moerge.extras import require
from moerge.files import check_unchanged, scratch_folder, target_of
from moerge.progress import Advance, Progress, reporter
from moerge.tuning.launch import check_device, check_launch, explain, on_main, rank
from moerge.tuning.models import is_sharded, load_sharded, locate_models, skeleton_of
from moerge.tuning.run_directory import RunDirectory
from moerge.tuning.settings import TuneConfig, load_tuning

if TYPE_CHECKING:
    from moerge.tuning.tune_plan import TunePlan
    from moerge.tuning.tune_result import TuneResult

_TRANSFORMERS = (5, 5)
"""Since then routers are modules, and experts a tensor."""

_KEPT = 2
"""Training checkpoints kept: while one is written, the one before stays."""


def _check_installation() -> None:
    """Raise InputError if a package that tuning needs is missing or too old."""
    require("tune", "tuning")
    import transformers

    if tuple(map(int, transformers.__version__.split(".")[:2])) < _TRANSFORMERS:
        wanted = ".".join(map(str, _TRANSFORMERS))
        raise InputError(f"tuning needs transformers {wanted} or newer, and this is {transformers.__version__}: upgrade it")


def plan_tune(tuning: str | Path | Mapping[str, Any], *, seed: int | None = None) -> TunePlan:
    """Plan a tuning: shares of the data, how long it lasts, sizes. Reads the text that the run needs, runs no model."""
    _check_installation()
    from moerge.tuning.tune_plan import make_plan

    tune_config = load_tuning(tuning, seed=seed)
    models = locate_models(tune_config, weights=False)
    with scratch_folder("moerge-tune-") as folder:
        work = RunDirectory(folder / "out")
        skeleton, tokenizer = skeleton_of(models[""].folder)
        processes = tune_config.settings.processes or 1
        return make_plan(tune_config, work, models, tokenizer, skeleton, processes, lambda text: None)


def tune(
    tuning: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    seed: int | None = None,
    progress: Progress | bool = False,
) -> TuneResult | None:
    """Tune as TUNE.yaml says and write the checkpoint folder `out`; None on all processes but the first.

    `resume` continues an interrupted tuning into `out` from its last complete training checkpoint, with the losses that it
    would have had, and leaves a complete result of the same settings and models as it is; `force` replaces a checkpoint that
    moerge made there.
    `progress` is a `Progress`, or True for a display on standard error.
    Raises InputError for bad input and an existing `out`, MachineError for a full or failing disk.
    """
    _check_installation()
    tune_config = load_tuning(tuning, seed=seed)
    processes = check_launch(tune_config)
    work = RunDirectory(target_of(out))
    with closing(work), reporter(progress) as report:
        job = _Job(tune_config, work, report, check_device(tune_config), processes)
        arguments = job.arguments()
        try:
            on_main(lambda: job.prepare(resume=resume, force=force))
            if work.interrupted:  # on all processes; otherwise OUT was complete already
                job.train(arguments)
                job.gather()
                on_main(lambda: job.finish(force=force))
        except InputError:
            if rank() == 0:
                work.discard()
            raise
        except Exception as error:
            found = explain(error)
            if found is None:
                raise
            raise found from None
        return job.result


@dataclass
class _Job:
    tune_config: TuneConfig
    work: RunDirectory
    progress: Progress
    device: str
    processes: int
    result: TuneResult | None = None
    advance: Advance | None = None
    adapted: Any = None

    def prepare(self, *, resume: bool, force: bool) -> None:
        """On the first process: the folder, the tokens, the teachers' targets. The others find all of it there."""
        from moerge.tuning.teachers import check_space
        from moerge.tuning.tune_result import TuneResult, weights_digest

        models = self.models
        self.inputs = {
            name or "model": {
                "location": m.location,
                "revision": m.revision,
                "tensors_read": len(m.tensors),
                "digest": weights_digest(m),
            }
            for name, m in models.items()
        }
        facts = {"settings": self.tune_config.settings.model_dump(mode="json"), "models": self.inputs}
        if resume and (finished := self.work.finished(facts)):
            self.work.clear()
            self.result = TuneResult(self.work.target, finished, was_complete=True)
            return
        self.recipe = (read_manifest(models[""].folder) or {}).get("recipe")
        self.work.open(facts, {name or "the model": m.folder for name, m in models.items()}, resume=resume, force=force)
        with machine_errors(self.work.root):
            plan, _, _ = self.plan
            if self.work.is_new:
                what, remedy = "training checkpoints and the result", "write OUT to another disk"
                check_space(plan.disk_bytes, self.work.root, what, remedy)
            if plan.teacher_targets:
                self._teach(plan, {name: m.folder for name, m in models.items() if name})

    def _teach(self, plan: TunePlan, teachers: Mapping[str, Path]) -> None:
        from moerge.tuning.teachers import check_space, run_teachers

        settings, teacher_targets, (_, _, config) = self.tune_config.settings, plan.teacher_targets, self.plan
        assert teacher_targets is not None
        amount = teacher_targets.sequences * settings.length
        size = f"{plan.target_bytes_needed / 1e6:,.3g} MB in {self.work.targets}"
        self.progress.info(f"the teachers' targets for {amount:,} tokens take {size}")
        if self.work.is_new:
            remedy = "lower losses.distillation.top, or write to another disk"
            check_space(plan.target_bytes_needed, self.work.targets, "the teachers' targets", remedy)
        tokens = dict(zip(plan.mixture.names, plan.tokens, strict=True))
        run_teachers(self.tune_config, teacher_targets, teachers, tokens, config, self.device, self._begin(amount))

    def _begin(self, teacher_targets: int = 0) -> Advance:
        """Start the one phase of all tokens to come; returns its callback."""
        settings = self.tune_config.settings
        if self.advance is None:
            left = settings.total_steps - _step(self.work.latest())
            self.advance = self.progress.phase("tuning", teacher_targets + left * settings.batch * settings.length, "tokens")
        return self.advance

    @cached_property
    def models(self) -> dict[str, Checkpoint]:
        """The model, under "", and each source's teacher."""
        return locate_models(self.tune_config)

    @cached_property
    def plan(self) -> tuple[TunePlan, Any, Any]:
        """The plan, the tokenizer and the model's config; tokens that are there are not made again."""
        from moerge.tuning.tune_plan import make_plan

        skeleton, tokenizer = skeleton_of(self.models[""].folder)
        warn = self.progress.warning if rank() == 0 else lambda text: None
        plan = make_plan(self.tune_config, self.work, self.models, tokenizer, skeleton, self.processes, warn)
        return plan, tokenizer, skeleton.config

    def arguments(self) -> Any:
        """Trainer's arguments. Making them starts the communication between processes."""
        from transformers import TrainingArguments

        settings = self.tune_config.settings
        found = TrainingArguments(
            output_dir=str(self.work.checkpoints),
            per_device_train_batch_size=settings.batch // (settings.accumulation * self.processes),
            gradient_accumulation_steps=settings.accumulation,
            max_steps=settings.total_steps,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.clip,
            lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
            warmup_steps=settings.warmup,
            optim="adamw_torch",
            bf16=settings.dtype == "bfloat16",
            use_cpu=self.device == "cpu",
            seed=settings.seed,
            save_strategy="steps",
            save_steps=settings.save_every,
            save_total_limit=_KEPT,
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to=[],
            disable_tqdm=True,
            log_level="error",
            log_level_replica="error",
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            ddp_timeout=7 * 24 * 3600,  # the others wait while the first process runs the teachers
        )
        if self.processes == 1 and found.n_gpu > 1:
            found._n_gpu = 1  # else Trainer splits batches over all GPUs in threads
            self.progress.warning("several GPUs are here and one is used: torchrun --nproc_per_node N starts a process for each")
        return found

    def train(self, arguments: Any) -> None:
        """Train what is left of the steps."""
        from transformers import PrinterCallback

        from moerge.quiet import without_progress_bars
        from moerge.tuning.metrics import Metrics
        from moerge.tuning.sequences import Sequences
        from moerge.tuning.trainer import TuneTrainer

        settings, checkpoint = self.tune_config.settings, self.work.latest()
        plan, _, _ = self.plan
        schedule, model = plan.schedule, self._model(checkpoint)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in schedule.ever_trained)
        if settings.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        done = _step(checkpoint)
        self.metrics = Metrics(self.work.metrics, settings.dying, self.progress.warning)
        if rank() == 0:
            self.metrics.begin(done)
        self._begin()
        teacher_targets = plan.teacher_targets
        trainer = TuneTrainer(
            model=model,
            args=arguments,
            train_dataset=Sequences(plan.mixture, plan.tokens, teacher_targets),
            settings=settings,
            schedule=schedule,
            only_trained=plan.targets is not None,
            names=plan.mixture.names,
            metrics=self.metrics,
            layers=teacher_targets.files.layers if teacher_targets else (),
            heldout=plan.heldout,
            advance=self._begin(),
        )
        trainer.remove_callback(PrinterCallback)
        if rank() == 0 and (tensorboard_dir := _tensorboard(self.work.tensorboard_dir)):
            trainer.add_callback(tensorboard_dir)
        self.trainer, begun = trainer, time.perf_counter()
        with without_progress_bars(), machine_errors(self.work.root):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        self.seconds, self.resumed = time.perf_counter() - begun, done

    def _model(self, checkpoint: Path | None) -> Any:
        """The model as it is after a training checkpoint, or as it was to begin with."""
        from moerge.runtime.loading import load

        settings, targets, source = self.tune_config.settings, self.plan[0].targets, self.models[""]
        begin = source.folder if targets else checkpoint or source.folder
        if settings.sharding != "none":
            model = load_sharded(begin, self.processes)
        else:
            model = load(begin, dtype="float32", device="cpu", tokenizer_from=source.folder).model
        return self._with_adapters(model, checkpoint) if targets else model

    def _with_adapters(self, model: Any, trained: Path | None) -> Any:
        """The model with adapters on it, as new or as they are in a folder."""
        from moerge.tuning.adapters import add_adapters, load_trained, share_out

        settings, targets = self.tune_config.settings, self.plan[0].targets
        assert settings.adapters is not None and targets is not None
        self.adapted = add_adapters(model, settings.adapters, targets, settings.seed)
        if is_sharded(model):
            share_out(model)
        if trained:
            load_trained(model, trained)
        return model

    def gather(self) -> None:
        """Put the parts of a sharded model together on the disk."""
        if self.tune_config.settings.sharding == "none":
            return
        from moerge.quiet import without_progress_bars
        from moerge.tuning.adapters import save_trained

        with without_progress_bars(), machine_errors(self.work.root):
            model: Any = self.trainer.model
            if self.adapted:
                save_trained(model, self.plan[0].schedule, self.work.unsharded, write=rank() == 0)
            else:
                model.save_pretrained(self.work.unsharded, is_main_process=rank() == 0)
            self.trainer.accelerator.wait_for_everyone()

    def _load_unsharded(self, source: Checkpoint) -> Any:
        """Load what `gather` put together of a sharded model, on this process alone."""
        from moerge.runtime.loading import load

        begin = source.folder if self.adapted else self.work.unsharded
        model = load(begin, dtype="float32", device="cpu", tokenizer_from=source.folder).model
        return self._with_adapters(model, self.work.unsharded) if self.adapted else model

    def finish(self, *, force: bool) -> None:
        """On the first process: write the result and publish it."""
        from moerge.tuning.manifest import tuned_manifest
        from moerge.tuning.tune_result import TuneResult, facts_of, files_of, write_adapter, write_result

        source, settings = self.models[""], self.tune_config.settings
        with machine_errors(self.work.root):
            model = self.trainer.model if settings.sharding == "none" else self._load_unsharded(source)
            if settings.adapters and settings.adapters.save == "merged":
                model = self.adapted.merge_and_unload()
            if settings.adapters and settings.adapters.save == "adapter":
                write_adapter(self.adapted, self.work, settings.model)
            else:
                write_result(model, self.work, source, settings.save_dtype)
        trained = {"recipe": self.recipe, "resumed_after_step": self.resumed, "seconds": self.seconds, "last": self.metrics.last}
        facts = facts_of(self.plan[0], self.inputs, trained)
        with machine_errors(self.work.root):
            for name, content in files_of(facts, self.work).items():
                (self.work.result / name).write_bytes(content)
            check_unchanged(file for m in self.models.values() for file in m.files)
            made = tuned_manifest(self.work.result, facts, self.plan[0], read_manifest(source.folder) or {}, source)
        self.work.complete({MANIFEST: sealed(made)}, replace=force)
        self.result = TuneResult(self.work.target, facts)


def _step(checkpoint: Path | None) -> int:
    """The step that a training checkpoint was made after."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def _tensorboard(folder: Path) -> Any:
    """Trainer's reporter to TensorBoard, where that is installed."""
    from importlib.util import find_spec

    if not find_spec("tensorboard"):
        return None
    from torch.utils.tensorboard import SummaryWriter
    from transformers import integrations as untyped

    integrations: Any = untyped
    return integrations.TensorBoardCallback(SummaryWriter(log_dir=str(folder)))
