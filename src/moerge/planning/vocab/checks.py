"""Messages about vocabularies that differ: errors that name the tokens, warnings and notes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moerge.errors import InputError
from moerge.planning.models import SourceModel
from moerge.recipe.schema import UNION
from moerge.tokenizer import Vocabulary, special_tokens, token_ids

_SHOWN = 3
_SAVE = "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one"


def listed(shown: Iterable[str], count: int) -> str:
    """The first few of `count` things, and how many more there are."""
    first = list(shown)[:_SHOWN]
    more = count - len(first)
    return f"{', '.join(first)}{f' and {more:,} more' if more else ''}"


def check_kinds(vocabularies: Mapping[str, Vocabulary], source: str) -> None:
    """InputError if one vocabulary spells its tokens otherwise than the source's: the same text then means other things."""
    own = vocabularies[source].spelling
    for name, vocabulary in vocabularies.items():
        if vocabulary.spelling.kind != own.kind:
            raise InputError(
                f"the tokenizers of {source} and {name} are of different kinds, so the same text is not the same token: {source} "
                f"is {own.kind} ({own.shown}), {name} {vocabulary.spelling.kind} ({vocabulary.spelling.shown}); "
                "such models have no common ancestor to merge from",
                code="vocabularies-differ",
            )


def check_roles(models: Sequence[SourceModel], named: str | None) -> None:
    """InputError if a token begins texts in one model and ends them in another, and no model is named whose roles hold."""
    if named is not None and named != UNION:
        return
    roles = [(model.name, special_tokens(model.folder)) for model in models]
    for index, (first, ours) in enumerate(roles):
        for second, theirs in roles[index + 1 :]:
            for token in sorted({*ours.values()} & {*theirs.values()}):
                one, other = (_edges(tokens, token) for tokens in (ours, theirs))
                if one and other and not one & other:
                    raise InputError(
                        f"{token!r} is the {min(one)} of {first} and the {min(other)} of {second}: name the model whose special "
                        f"tokens the result has, such as 'tokenizer: {first}'",
                        code="vocabularies-differ",
                    )


def _edges(roles: Mapping[str, str], token: str) -> set[str]:
    return {role for role, text in roles.items() if text == token and role in ("bos_token", "eos_token")}


def undecided(vocabularies: Mapping[str, Vocabulary], source: str) -> InputError:
    """Return the error for vocabularies that differ where the recipe does not say what to do about it."""
    ours = vocabularies[source]
    name, theirs = next((name, other) for name, other in vocabularies.items() if other.ids != ours.ids)
    parts = []
    for owner, vocabulary, other in ((source, ours, theirs), (name, theirs, ours)):
        only = sorted(vocabulary.ids.keys() - other.ids.keys(), key=vocabulary.ids.__getitem__)
        parts += [f"only {owner} has {listed(map(vocabulary.shown, only[:_SHOWN]), len(only))}"] if only else []
    moved = sorted(text for text in ours.ids.keys() & theirs.ids.keys() if ours.ids[text] != theirs.ids[text])
    parts += [f"{listed(map(ours.shown, moved[:_SHOWN]), len(moved))} have other ids"] if moved else []
    settings = [source, *(name for name, other in vocabularies.items() if other.ids != ours.ids), UNION]
    choices = ", ".join(f"'tokenizer: {setting}'" for setting in settings[:-1]) + f" or 'tokenizer: {UNION}'"
    return InputError(
        f"the vocabularies of {source} and {name} differ: {'; '.join(parts)}; say whose tokens to keep: {choices}",
        code="vocabularies-differ",
    )


def no_tokenizers(sizes: Mapping[str, Any]) -> InputError:
    """Return the error for embeddings of different sizes without a tokenizer to match their rows by."""
    described = ", ".join(f"{name}: {size!r}" for name, size in sizes.items())
    return InputError(
        f"vocab_size differs ({described}) and no model has a tokenizer to match the rows by: put each model's tokenizer.json "
        "into its folder",
        code="vocabularies-differ",
    )


def not_readable(names: Sequence[str], source: str) -> InputError:
    """Return the error for a model with merge rules and no vocabulary, which cannot be compared with others."""
    return InputError(
        f"the tokenizers of the models differ, and that of {', '.join(names)} cannot be compared token by token: give it a "
        f"tokenizer.json ({_SAVE})",
        code="vocabularies-differ",
    )


def tokens_without_rows(model: SourceModel) -> list[str]:
    """A warning if the tokenizer of `model` has tokens that the embedding, as its config has it, has no row for."""
    rows = model.config.get("vocab_size")
    try:
        ids = token_ids(model.folder) or {}
    except InputError:  # where it has to be read, it says so
        return []
    beyond = sorted((text for text, number in ids.items() if type(rows) is int and number >= rows), key=ids.__getitem__)
    if not beyond:
        return []
    shown = listed(map(repr, beyond[:_SHOWN]), len(beyond))
    return [
        f"the tokenizer of {model.name} has tokens beyond the embedding's {rows:,} rows, {shown}: a text with one of them "
        "ends with an index error"
    ]


def splitting_warnings(vocabularies: Mapping[str, Vocabulary], source: str) -> list[str]:
    """Return warnings about text that a model was trained on and the source's tokenizer cuts into other tokens."""
    ours = vocabularies[source].splitting
    warnings = []
    for name, vocabulary in vocabularies.items():
        theirs = vocabulary.splitting
        differing = [part for part in ours if part in theirs and ours[part] != theirs[part]]
        if differing:
            warnings.append(f"the result splits text as {source} does, not as {name} ({', '.join(differing)} differ)")
    return warnings
