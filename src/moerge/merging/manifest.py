"""The manifest of a merge: recipe, inputs, versions and digests."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from moerge.checkpoint.manifest import FORMAT
from moerge.checkpoint.staging import Staging
from moerge.planning.plan import Plan
from moerge.tensors.digest import DEFINITION, combined_digest
from moerge.tensors.views.joined import SEPARATOR


def build_manifest(plan: Plan, staging: Staging, files: Mapping[str, str]) -> dict[str, Any]:
    """The manifest of a finished merge. `files` are the digests of the files beside the tensors."""
    by_model: dict[str, dict[str, str]] = {model.name: {} for model in plan.models}
    for label, digest in staging.inputs.items():
        model, _, tensor = label.partition(":")
        for name in model.split(SEPARATOR):
            by_model.setdefault(name, {})[tensor] = digest
    return {
        "format": FORMAT,
        "versions": {"moerge": version("moerge"), "python": platform.python_version()}
        | {package: version(package) for package in ("numpy", "numba", *_running(plan))},
        "recipe": plan.recipe.written,
        "models": {
            model.name: {
                "location": model.location,
                "revision": model.revision,
                "tensors_read": len(by_model[model.name]),
                "digest": combined_digest(by_model[model.name]),
            }
            for model in plan.models
        },
        "experts": list(plan.experts),
        "operations": list(plan.operations),
        "calibration": {
            texts.expert: {"location": texts.location, "digest": texts.digest, "documents": list(texts.hashes)}
            for texts in plan.calibration
        },
        "statistics": {
            used.model: {
                "file": str(used.statistics.path),
                "digest": combined_digest(by_model.get(used.label, {})),
                **used.statistics.facts.model_dump(include={"settings", "sequences", "tokens"}),
                "documents": list(used.statistics.facts.documents),
            }
            for used in plan.statistics
        },
        "vocabulary": dict(plan.vocabulary),
        "plan": plan.fingerprint,
        "warnings": list(plan.warnings),
        "nonfinite_inputs": staging.nonfinite,
        "digest": DEFINITION,
        "tensors": {tensor.name: staging.digests[tensor.name] for tensor in plan.stored},
        "files": dict(files),
        **({plan.account.key: dict(plan.account.facts)} if plan.account else {}),
    }


def _running(plan: Plan) -> tuple[str, ...]:
    runs = any(fitting.fitter.runs_model for fitting in plan.fit_jobs)
    return ("torch", "transformers") if runs else ()
