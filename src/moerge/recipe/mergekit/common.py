"""The common parts of files for `mergekit-yaml` and `mergekit-moe`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moerge.errors import suggest
from moerge.recipe.document import Document, Key, short
from moerge.recipe.mergekit.models import Reference, Roster, read_reference
from moerge.recipe.tokens import TokenizerSection, read_tokenizer_section

_AUTO = (
    "differs from mergekit: 'chat_template: auto' takes that of the tokenizer's model, or the one that all others share; "
    "mergekit takes the most frequent"
)
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_DTYPES = ("bfloat16", "float16", "float32")


def check_keys(document: Document, path: Key, section: Mapping[str, Any], known: Sequence[str]) -> None:
    """InputError for a key that mergekit would silently ignore."""
    for key in section:
        if key not in known:
            raise document.error(
                (*path, str(key)), f": unknown key in a mergekit file, {suggest(str(key), known)}", code="unknown-name"
            )


def listed(document: Document, path: Key, value: Any = None) -> list[Any]:
    """A list that is not empty; without `value` the one at the top level."""
    value = document.data.get(str(path[0])) if len(path) == 1 and value is None else value
    if not isinstance(value, list) or not value:
        raise document.error(path, f" should be a list of models, not {short(value)}")
    return value


def read_dtype(document: Document) -> str | None:
    """The result's element type: `out_dtype`, else `dtype`."""
    used = None
    for key in ("dtype", "out_dtype"):
        written = document.data.get(key)
        if written is not None:
            used = str(written).removeprefix("torch.")
            only_computes = key == "dtype" and used == "float64" and document.data.get("out_dtype") is not None
            if used not in _DTYPES and not only_computes:
                raise document.error((key,), f" should be one of {', '.join(_DTYPES)}, not {short(written)}")
    return used


def read_seed(document: Document) -> int:
    """`random_seed`, which mergekit takes from its command line instead."""
    seed = document.data.get("random_seed", 0)
    if type(seed) is not int:
        raise document.error(("random_seed",), f" should be a whole number, not {short(seed)}")
    return seed


def read_tokenizer(document: Document, names: Mapping[str, str]) -> TokenizerSection:
    """Our `tokenizer` from `tokenizer_source` or `tokenizer`, by the models' names here."""

    def model_at(path: Key, written: Any) -> str:
        reference = "base" if written == "base" else str(read_reference(document, path, written))
        if reference not in names:
            near = suggest(reference, [*names, "union"])
            raise document.error(path, f": {reference!r} is not a model of this file, {near}", code="unknown-name")
        return names[reference]

    data = document.data
    if data.get("tokenizer_source") is not None and data.get("tokenizer") is not None:
        raise document.error(("tokenizer",), ": there is a 'tokenizer_source' already: remove one")
    path: Key = ("tokenizer_source",)
    written = data.get("tokenizer_source")
    if isinstance(data.get("tokenizer"), str):  # as in our recipes, whose messages suggest it
        path, written = ("tokenizer",), data["tokenizer"]
    elif data.get("tokenizer") is not None:
        section = read_tokenizer_section(document, model_at)
        whose = section.source
        return section._replace(source="union" if whose in (None, "union") else model_at(("tokenizer", "source"), whose))
    return TokenizerSection(written if written in (None, "union") else model_at(path, written))


def read_chat_template(document: Document, warnings: list[str]) -> str | None:
    """Our `chat_template`: a template as it is, ChatML by its name; with `auto`, what our recipes do without the key."""
    written = document.data.get("chat_template")
    if written is None or written == "auto":
        if written:
            warnings.append(_AUTO)
        return None
    if not isinstance(written, str) or ("{" not in written and written != "chatml"):
        raise document.error(("chat_template",), f" should be auto, chatml or a Jinja template itself, not {short(written)}")
    return _CHATML if written == "chatml" else written


def roster_models(roster: Roster, base: Reference | None, *, named_base: str | None) -> dict[str, Any]:
    """Our `experts`, `base` and `base_adapter`: a base that is merged like the others is only an expert."""
    apart = base if named_base == "base" else None
    experts = {}
    for reference, name in roster.names.items():
        on_base = apart is not None and apart.adapter is None and reference.model == apart.model and reference.adapter
        experts[name] = {"model": reference.adapter} if on_base else {"model": reference.model, "adapter": reference.adapter}
    found: dict[str, Any] = {"experts": experts}
    return found if apart is None else {**found, "base": apart.model, "base_adapter": apart.adapter}
