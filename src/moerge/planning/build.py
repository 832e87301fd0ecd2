"""From a recipe to a plan, reading configs and headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moerge.architecture import Expected, Family, family_of, moe_format
from moerge.architecture.config import canonical, portable
from moerge.architecture.sequence import MODEL_TYPE, expand, gate
from moerge.calibration import Texts
from moerge.checkpoint.dtypes import DTYPES, FLOATS, DType
from moerge.checkpoint.locate import locate
from moerge.checkpoint.reader import Checkpoint
from moerge.checkpoint.tokenizer import VOCABULARY_FILES, check_same_vocabulary, companion_files
from moerge.errors import InputError
from moerge.methods.average import Average
from moerge.methods.method import MergeMethod
from moerge.modeling import AUTO_MAP, FAMILIES, code_files
from moerge.moe.router import FittedRouter
from moerge.moe.sequence import SequenceRouter
from moerge.planning.checks import check_configs, check_models, expected_of, merge_candidates
from moerge.planning.match import MethodChooser
from moerge.planning.operations import Copy, Merge, Operation, Output, Source
from moerge.planning.plan import Plan
from moerge.recipe.schema import MoE, Recipe


def build_plan(recipe: Recipe, *, weights: bool = False, commits: Mapping[str, str | None] | None = None) -> Plan:
    """What the recipe amounts to, with every check that needs no tensor data.

    `weights` downloads Hub models completely, at the `commits` given by model name; without it only their configs and
    headers are fetched.
    Raises InputError if the models cannot be merged as asked.
    """
    locations = {"base": recipe.base} if recipe.base else {}
    locations |= {name: expert.model for name, expert in recipe.experts.items()}
    pinned = commits or {}
    models = tuple(
        locate(location, name=name, relative_to=recipe.folder, weights=weights, commit=pinned.get(name))
        for name, location in locations.items()
    )
    check_models(models)
    family = family_of(models[0].config)
    config_source = recipe.config or models[0].name
    warnings = check_configs(models, family, source=config_source, named=recipe.config is not None)
    tokenizer_source = recipe.tokenizer or config_source
    warnings += check_same_vocabulary(models)
    found, more = merge_candidates(models, family)
    job = _Job(recipe, {model.name: model for model in models}, family, _dtype(recipe, models, config_source))
    make = job.dense if recipe.moe is None else job.sequence_routed if recipe.moe.by_sequence else job.moe
    config, outputs, experts = make(found, config_source)
    calibration = recipe.moe.router.inputs(recipe, experts) if recipe.moe else ()
    files = companion_files(job.models[tokenizer_source].folder)
    if calibration and not set(files) & set(VOCABULARY_FILES):
        raise InputError(f"calibration needs a tokenizer, and {tokenizer_source} has none: name another with 'tokenizer'")
    if recipe.moe and recipe.moe.by_sequence:
        files |= code_files()
    planned = Plan(
        recipe=recipe,
        models=models,
        outputs=tuple(outputs),
        config=config,
        files=files,
        experts=experts,
        calibration=calibration,
        warnings=(*warnings, *more, *job.warnings(), *_calibration_warnings(recipe, calibration)),
        notes=(f"config from {config_source}, tokenizer and generation config from {tokenizer_source}",),
    )
    return replace(planned, notes=(*planned.notes, *_router_notes(planned)))


def _router_notes(plan: Plan) -> list[str]:
    router = plan.recipe.moe.router if plan.recipe.moe else None
    if not isinstance(router, FittedRouter):
        return []
    holds = "with the whole merged model" if router.runs_model else "with a few tensors"
    text = f", from {sum(len(texts.documents) for texts in plan.calibration)} texts" if plan.calibration else ""
    gigabytes = plan.router_bytes / 1e9
    return [f"the {router.kind} router is computed after merging {holds} in memory, about {gigabytes:.1f} GB{text}"]


def _calibration_warnings(recipe: Recipe, calibration: Sequence[Texts]) -> list[str]:
    if recipe.calibration and not calibration:
        return ["'calibration' is not used: nothing in this recipe is fitted to text"]
    owners: dict[str, set[str]] = {}
    for texts in calibration:
        for digest in texts.hashes:
            owners.setdefault(digest, set()).add(texts.expert)
    shared = [names for names in owners.values() if len(names) > 1]
    if not shared:
        return []
    return [f"{len(shared)} calibration texts belong to several experts ({', '.join(sorted(set().union(*shared)))})"]


def _dtype(recipe: Recipe, models: Sequence[Checkpoint], source: str) -> DType:
    """The recipe's dtype, else the float type that most bytes of the config's model are stored in."""
    if recipe.dtype:
        return FLOATS[recipe.dtype]
    model = next(model for model in models if model.name == source)
    counts = Counter({dtype.name: 0 for dtype in FLOATS.values()})
    for tensor in model.tensors.values():
        if tensor.dtype.is_float:
            counts[tensor.dtype.name] += tensor.nbytes
    return DTYPES[counts.most_common(1)[0][0]]


def _routed_config(moe: MoE, dense: Mapping[str, Any], experts: Sequence[str], routing: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a sequence-routed model of experts with this config."""
    config: dict[str, Any] = {"architectures": ["MoergeForCausalLM"], "model_type": MODEL_TYPE, "auto_map": AUTO_MAP}
    config["expert_config"] = {key: dense[key] for key in dense if key not in ("torch_dtype", "transformers_version")}
    config |= {"expert_names": list(experts), "separate": list(moe.separate), "mix": moe.mix, "routing": routing}
    config |= {key: dense[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in dense}
    return {**config, "dtype": dense["dtype"]}


@dataclass(frozen=True)
class _Job:
    recipe: Recipe
    models: Mapping[str, Checkpoint]
    family: Family | None
    dtype: DType

    def dense(self, found: Sequence[Expected], source: str) -> tuple[dict[str, Any], list[Output], tuple[str, ...]]:
        chooser = MethodChooser(self.recipe)
        outputs = [self._output(t, t.shape, self._merged(t, chooser, tuple(self.recipe.experts), source)) for t in found]
        chooser.check_all_used()
        config = portable(self.models[source].config, family=self.family, dtype=str(self.dtype.torch_name))
        return config, outputs, ()

    def moe(self, found: Sequence[Expected], source: str) -> tuple[dict[str, Any], list[Output], tuple[str, ...]]:
        moe = self.recipe.moe
        assert moe is not None
        model = self.models[source]
        chosen = moe_format(moe.format, model.model_type)
        config = canonical(model.config, self.family)
        obstacle = chosen.obstacle(config)
        unknown = next((tensor.name for tensor in found if not tensor.role), None)
        if obstacle or unknown:
            raise InputError(f"cannot build a {chosen.name} model: {obstacle or f'it has no place for tensor {unknown!r}'}")
        experts = self.recipe.expert_names
        converted = chosen.convert(config, len(experts), moe.top_k)
        chooser = MethodChooser(self.recipe)
        dense = {tensor.role: tensor for tensor in found}
        outputs = []
        for tensor in expected_of(chosen.family, converted, chosen.name):
            operation: Operation
            if tensor.role.endswith(".router"):
                operation = moe.router.operation(tensor)
            elif tensor.expert is not None:
                operation = self._copied(experts[tensor.expert], dense[tensor.dense_role].name)
            else:
                operation = self._merged(dense[tensor.role], chooser, experts, source)
            outputs.append(self._output(tensor, tensor.shape, operation))
        chooser.check_all_used()
        return portable(converted, family=chosen.family, dtype=str(self.dtype.torch_name)), outputs, experts

    def sequence_routed(self, found: Sequence[Expected], source: str) -> tuple[dict[str, Any], list[Output], tuple[str, ...]]:
        moe = self.recipe.moe
        assert moe is not None and isinstance(moe.router, SequenceRouter)
        dense = self._expert_config(moe, source)
        experts, tied = self.recipe.expert_names, bool(dense.get("tie_word_embeddings"))
        stored = [tensor for tensor in found if not (tied and tensor.name.startswith("lm_head."))]
        by_role = {tensor.role or tensor.name: tensor for tensor in stored}
        plain = [replace(tensor, role=tensor.role or tensor.name) for tensor in stored]
        chooser, outputs = MethodChooser(self.recipe), []
        try:
            expanded = list(expand(plain, len(experts), moe.separate))
        except ValueError as error:
            raise InputError(f"cannot build a sequence-routed model: {error}") from None
        for tensor in expanded:
            original = by_role[tensor.dense_role]
            if tensor.expert is not None:
                operation = self._copied(experts[tensor.expert], original.name)
            else:
                operation = self._merged(original, chooser, experts, source)
            outputs.append(self._output(tensor, tensor.shape, operation))
        chooser.check_all_used()
        routing = moe.router.routing(moe.top_k)
        if routing["kind"] == "learned":
            router = gate(len(experts), dense["hidden_size"])
            outputs.append(self._output(router, router.shape, moe.router.operation(router)))
        return _routed_config(moe, dense, experts, routing), outputs, experts

    def _expert_config(self, moe: MoE, source: str) -> dict[str, Any]:
        """The dense config that all experts share; InputError where the sequence-routed model cannot be made of such experts."""
        model = self.models[source]
        if model.model_type not in FAMILIES:
            raise InputError(
                f"moe.format: experts of type {model.model_type!r} cannot be routed by sequence (it takes: {', '.join(FAMILIES)})"
            )
        dense = portable(model.config, family=self.family, dtype=str(self.dtype.torch_name))
        if dense.get("tie_word_embeddings") and ("embedding" in moe.separate) != ("head" in moe.separate):
            raise InputError("moe.separate: embedding and head are tied in these models: keep both separate or neither")
        layers = getattr(moe.router, "layers", None) or ()
        if any(layer >= dense["num_hidden_layers"] for layer in layers):
            raise InputError(f"moe.router.layers: layer {max(layers)}, but the models have {dense['num_hidden_layers']} (from 0)")
        return dense

    def _output(self, tensor: Expected, shape: tuple[int, ...], operation: Operation) -> Output:
        dtype = operation.source.tensor.dtype if isinstance(operation, Copy) else self.dtype
        return Output(tensor.name, tensor.role, dtype, shape, operation)

    def _source(self, model: str, name: str) -> Source:
        return Source(model, self.models[model].tensors[name])

    def _copied(self, model: str, name: str) -> Operation:
        """The tensor's bytes, or its values rounded to the output's type."""
        source = self._source(model, name)
        if source.tensor.dtype is self.dtype or not source.tensor.dtype.is_float:
            return Copy(source)
        return Merge(Average(), (source,), (1.0,))

    def _merged(self, tensor: Expected, chooser: MethodChooser, members: tuple[str, ...], source: str) -> Operation:
        """A merge over `members`; the base has no task vector, so methods that work on those leave it out."""
        if not self._source(source, tensor.name).tensor.dtype.is_float:
            return self._copied(source, tensor.name)
        method = chooser.choose(tensor.role, tensor.name)
        base = None
        if method.uses_task_vectors:
            members = tuple(name for name in members if name != "base")
            base = self._source("base", tensor.name)
        self._check_count(method, members)
        weights = tuple(self.recipe.experts[name].weight if name in self.recipe.experts else 1.0 for name in members)
        return Merge(method, tuple(self._source(name, tensor.name) for name in members), weights, base)

    def _check_count(self, method: MergeMethod, members: Sequence[str]) -> None:
        if method.exact_experts not in (None, len(members)):
            raise InputError(
                f"{self.recipe.source}: {method.name} merges exactly {method.exact_experts} models, "
                f"not {len(members)} ({', '.join(members)})"
            )

    def warnings(self) -> list[str]:
        """What a user should know about a plan that is valid."""
        moe = self.recipe.moe
        if moe is None or not moe.router.needs_training:
            return []
        return [f"the {moe.router.kind} router is untrained: the MoE mixes its experts blindly until it is fine-tuned"]
