"""Verdicts, before merging, on the roles that can be merged and those that should stay separate.

The limits below are measured: `experiments/anchor.py` trains small experts that drift differently far from one ancestor, and some
from two ancestors, merges them, and measures which share of their lead over the base is lost on their own text (docs/comparing.md
has the table). Those are Llamas of 0.7 million parameters in 2 layers: expect the order of the cases from large models, not the
exact limits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from moerge.comparison.similarity import Expert, Pair, Similarity
from moerge.figures import short
from moerge.results import Data

Answer = Literal["merge", "merge with care", "keep separate"]

UNRELATED = 0.2
"""Cosine of two experts' parameters below which they have no ancestor in common, or nothing left of it. Measured: -0.02 to 0.04
from two initialisations, 0.44 and more from one. Averaging such models loses about twice what they learned: the result is far
worse than the base."""
FAR = 0.75
"""Distance of two experts over the geometric mean of their norms from which little of what they learned survives a merge.
Measured with K = 3: up to 0.56 the average loses what it dilutes, 62 to 65%, whatever the distance; at 0.76 73%, at 1.06 all.
Unrelated models have 1.41."""
CLOSE = 0.12
"""Distance up to which task vectors can even be added up, with `scale` 1, at no more cost than the average's. Measured: at 0.09
to 0.11 adding up loses 50% instead of 62%, at 0.19 76%, at 0.56 152%, which is worse than the base."""
OPPOSED = -0.1
"""Cosine of two task vectors below which they undo each other. Not measured: trained experts had 0.05 and more."""
UNEQUAL = 4.0
"""How many times longer one task vector may be than another. That unequal norms harm merging is from DisTaC (Yoshida et al. 2025,
arXiv 2508.01148); the number is a guess. The demo's experts differ 1.5 times."""
_DECISIVE = ("attention", "ffn")


class MergeAdvice(Data):
    """Advice on a role, with its reason in a sentence.

    The figures are over all layers: the mean and the smallest cosine over pairs of experts, the mean share of opposite signs, and
    the largest drift (norm over the base's; None without a base), distance and smallest cosine of parameters.
    """

    role: str
    answer: Answer
    reason: str
    parameters: int
    cosine: float | None
    least_cosine: float | None
    sign_conflict: float | None
    drift: float | None
    distance: float | None
    parameter_cosine: float | None


def assess(found: Similarity) -> tuple[MergeAdvice, ...]:
    """Advice for each role. Norms follow the matrices around them: they are alike even in unrelated models."""
    roles = [role for role in found.roles if role != "norm"]
    verdicts = [_assess_role(found, role) for role in roles]
    if "norm" in found.roles:
        verdicts.append(_assess_norms(found, verdicts))
    return tuple(verdicts)


def _assess_role(found: Similarity, role: str) -> MergeAdvice:
    pairs, rows = found.pairs_of("role", role), found.rows_of("role", role)
    answer, reason = _answer(pairs, rows)
    return _advice(role, answer, reason, pairs, rows)


def _advice(role: str, answer: Answer, reason: str, pairs: Sequence[Pair], rows: Sequence[Expert]) -> MergeAdvice:
    cosines = _known(pair.cosine for pair in pairs)
    return MergeAdvice(
        role=role,
        answer=answer,
        reason=reason,
        parameters=max(row.parameters for row in rows),
        cosine=_mean(cosines),
        least_cosine=min(cosines, default=None),
        sign_conflict=_mean(_known(pair.sign_conflict_changed for pair in pairs)),
        drift=max(_known(row.relative_norm for row in rows), default=None),
        distance=max(_known(pair.relative_distance for pair in pairs), default=None),
        parameter_cosine=min(_known(pair.parameter_cosine for pair in pairs), default=None),
    )


def _answer(pairs: Sequence[Pair], rows: Sequence[Expert]) -> tuple[Answer, str]:
    """The worst that can be said, and what it rests on."""
    if not pairs:
        return "merge", "only one expert has it"
    unlike = min(pairs, key=lambda pair: 1.0 if pair.parameter_cosine is None else pair.parameter_cosine)
    if unlike.parameter_cosine is not None and unlike.parameter_cosine < UNRELATED:
        return "keep separate", (
            f"{unlike.a} and {unlike.b} are as unlike as models without a common ancestor (cosine of their parameters "
            f"{short(unlike.parameter_cosine)}): their average is noise"
        )
    furthest = max(pairs, key=lambda pair: pair.relative_distance or 0.0)
    distance = furthest.relative_distance or 0.0
    apart = f"{furthest.a} and {furthest.b} are {short(distance)} of their norm apart"
    if distance >= FAR:
        return "keep separate", f"{apart}: little or nothing of what they learned survives a merge"
    kept = [row.averaged for row in rows if row.averaged is not None]
    care = _care(pairs, rows) if kept else None
    if care:
        return "merge with care", care
    if distance <= CLOSE:
        return "merge", f"no two experts are further than {short(distance)} of their norm apart"
    share = f" (the average {100 * sum(kept) / len(kept):.0f}% of its task vector)" if kept else ""
    return "merge with care", f"{apart}: a merge keeps a part of what each learned{share}, a separate copy keeps all"


def _care(pairs: Sequence[Pair], rows: Sequence[Expert]) -> str | None:
    """The reason why a plain average of these task vectors would lose much, and what to do about it."""
    opposed = min(pairs, key=lambda pair: 1.0 if pair.cosine is None else pair.cosine)
    if opposed.cosine is not None and opposed.cosine <= OPPOSED:
        cosine = short(opposed.cosine)
        return f"{opposed.a} and {opposed.b} undo each other (cosine of their task vectors {cosine}): let ties elect signs"
    faint, loud = min(rows, key=lambda row: row.norm), max(rows, key=lambda row: row.norm)
    if faint.norm and loud.norm > UNEQUAL * faint.norm:
        return (
            f"{loud.expert} changed {loud.norm / faint.norm:.1f} times as much as {faint.expert}, which it will outvote: "
            f"give {faint.expert} a larger weight"
        )
    return None


def _assess_norms(found: Similarity, others: Sequence[MergeAdvice]) -> MergeAdvice:
    pairs, rows = found.pairs_of("role", "norm"), found.rows_of("role", "norm")
    apart = [verdict.role for verdict in others if verdict.role in _DECISIVE and verdict.answer == "keep separate"]
    if len(apart) == len(_DECISIVE):
        return _advice("norm", "keep separate", "they scale what attention and ffn read, which stay separate", pairs, rows)
    return _advice("norm", "merge", "they are few, and alike wherever attention or ffn are merged", pairs, rows)


def recommend(found: Similarity, verdicts: Sequence[MergeAdvice]) -> str:
    """Advise on the experts as a whole."""
    answers = {verdict.role: verdict.answer for verdict in verdicts}
    separate = [role for role, answer in answers.items() if answer == "keep separate"]
    unrelated = any(v.role in _DECISIVE and v.parameter_cosine is not None and v.parameter_cosine < UNRELATED for v in verdicts)
    if unrelated:
        return (
            "do not average these models: route whole sequences to them instead (moe: format moerge, mix logits, "
            f"separate [{', '.join(_separable(list(answers)))}])"
        )
    if "attention" in separate:
        return f"route whole sequences: moe with format moerge and separate [{', '.join(_separable(separate))}]"
    if separate:
        return f"build a MoE that keeps [{', '.join(separate)}] separate and merges the rest"
    if "merge with care" in answers.values():
        return (
            "a dense merge should work and keeps a part of what each expert learned: try average, ties, and task_arithmetic with "
            f"scales from {1 / len(found.experts):.2g} to {2 / len(found.experts):.2g}; a MoE with separate [ffn] keeps more"
        )
    return "a dense merge should work: begin with average, which other methods have to beat, and let moerge search choose a scale"


def _separable(roles: Sequence[str]) -> list[str]:
    return [role for role in ("ffn", "attention", "norm", "embedding", "head") if role in roles]


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
