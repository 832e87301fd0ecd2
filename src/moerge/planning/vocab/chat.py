"""The chat template of a result, and with it the tokens that end an answer; notes where models differ in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moerge.checkpoint.companions import read_companions
from moerge.errors import InputError
from moerge.files import read_file
from moerge.planning.models import SourceModel
from moerge.planning.vocab.config import SPECIAL_IDS
from moerge.recipe.schema import Recipe
from moerge.tokenizer import SETTINGS, TEMPLATES, Vocabulary, read_object, special_tokens, write_object

_TOKENIZER, _MAP, _GENERATION = SETTINGS
_FILE = "chat_template.jinja"
_ROLES = ("eos_token", "pad_token")
_UNIMPORTANT = ("transformers_version", "_from_model_config", *SPECIAL_IDS)


@dataclass(frozen=True)
class Move:
    """The new ids of the tokens of models whose vocabularies differ: `ids` are those of the result by text."""

    ids: Mapping[str, int]
    vocabularies: Mapping[str, Vocabulary]

    def id_of(self, model: str, number: int) -> int | None:
        """The id that a model's token has in the result, None where the result lacks it."""
        return self.ids.get(self.vocabularies[model].texts.get(number, ""))

    def lacking(self, model: str, written: str, end: str | None) -> list[str]:
        """A model's added tokens in a template, and the token that ends its answers, that the result lacks."""
        own = self.vocabularies[model]
        needed = [text for text, entry in own.added.items() if str(entry["content"]) in written or text == end]
        return [text for text in needed if text not in self.ids]


@dataclass(frozen=True)
class Chat:
    """The result's tokenizer and generation files, the ids of its special tokens, and what to say.

    `template` names the model, or the file, that the template is from; `donor` the model of the generation config.
    """

    files: Mapping[str, bytes]
    donor: str
    template: str | None = None
    ids: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Settings:
    """A model's own small files, its templates by name, and its special tokens."""

    model: SourceModel
    files: Mapping[str, bytes]

    @classmethod
    def of(cls, model: SourceModel) -> _Settings:
        return cls(model, read_companions(model.folder, (*SETTINGS, *TEMPLATES)))

    @property
    def template(self) -> Mapping[str, str]:
        return template_of(self.files)

    @property
    def tokens(self) -> Mapping[str, str]:
        return special_tokens(self.model.folder)


def template_of(files: Mapping[str, bytes]) -> dict[str, str]:
    """A model's chat templates by their name, "default" for the usual one, wherever transformers lets them be written."""
    found: dict[str, str] = {}
    for written in (read_object(files, name).get("chat_template") for name in (_TOKENIZER, "chat_template.json")):
        if isinstance(written, str):
            found["default"] = written
        for item in written if isinstance(written, list) else ():
            if isinstance(item, Mapping):
                found[str(item.get("name"))] = str(item.get("template"))
    for name, content in files.items():
        if name.endswith(".jinja"):
            found["default" if name == _FILE else Path(name).stem] = content.decode("utf-8", "replace")
    return {name: text.strip() for name, text in found.items() if text.strip()}


def settle_chat(
    recipe: Recipe,
    models: Sequence[SourceModel],
    source: str,
    files: Mapping[str, bytes],
    move: Move | None,
) -> Chat:
    """The template that the recipe names; by default that of `source`, the tokenizer's model, or the one that all others share.

    Without `move` all models' tokens have the ids that they have in the result. `files` are those of `source`.
    """
    settings = {model.name: _Settings.of(model) for model in models}
    wanted = recipe.chat_template
    if wanted is not None and wanted not in settings:
        return _from_file(recipe, settings, source, files)
    donor, notes = (wanted, []) if wanted is not None else _default(settings, source, files, move)
    taken = _Taking(settings, source, donor or source, move)
    changed = taken.files(files) if taken.donor != source else files
    ids = taken.ids() if taken.donor != source else {}
    has = bool(template_of(changed))
    return Chat(changed, taken.donor, taken.donor if has else None, ids, (*notes, *taken.notes()))


def without_others(chat: Chat, models: Sequence[SourceModel], source: str) -> Chat:
    """The chat of a tokenizer's own model, with a note where it has no template and models with tokens of their own have one."""
    others = [model.name for model in models if _Settings.of(model).template]
    if chat.template is not None or not others:
        return chat
    note = f"the result has no chat template: {source} has none, and {', '.join(others)} may have other tokens"
    return replace(chat, notes=(*chat.notes, f"{note} ('tokenizer: {others[0]}' takes both, 'chat_template: FILE' a template)"))


def _default(
    settings: Mapping[str, _Settings], source: str, files: Mapping[str, bytes], move: Move | None
) -> tuple[str | None, list[str]]:
    """Choose the template where nobody is named, and give the reason."""
    having = {name: own.template for name, own in settings.items() if own.template}
    own = template_of(files)
    others = [name for name, template in having.items() if template != own and name != source]
    if own:
        note = f"the chat template is {source}'s; those of {', '.join(others)} differ"
        return None, [f"{note} ('chat_template: {others[0]}' takes that one)"] if others else []
    if not having:
        return None, []
    if any(having[name] != having[others[0]] for name in others):
        return None, [
            f"the result has no chat template: {source} has none, and those of {', '.join(others)} differ: choose one, such as "
            f"'chat_template: {others[0]}'"
        ]
    donor = others[0]
    written, end = "\n".join(having[donor].values()), settings[donor].tokens.get("eos_token")
    lacking = move.lacking(donor, written, end) if move else []
    if lacking:
        return None, [
            f"the result has no chat template: that of {donor} needs {lacking[0]!r}, which {source}'s tokenizer lacks "
            f"('tokenizer: {donor}' takes both)"
        ]
    note = f"the chat template and the end of an answer are {', '.join(others)}'s, since {source} has no template"
    return donor, [f"{note} ('chat_template: {source}' leaves them out)"]


def _from_file(recipe: Recipe, settings: Mapping[str, _Settings], source: str, files: Mapping[str, bytes]) -> Chat:
    """A template of the user's, from a file or in the recipe; all else is that of the tokenizer's model."""
    assert recipe.chat_template is not None
    if "{" in recipe.chat_template:
        changed = {**_without_template(files), _FILE: recipe.chat_template.encode()}
        return Chat(changed, source, recipe.source, {}, ("the chat template is the recipe's own",))
    path = recipe.folder / Path(recipe.chat_template).expanduser()
    try:
        text = read_file(path).decode("utf-8")
    except (OSError, ValueError):
        raise InputError(
            f"{recipe.source}: chat_template: {recipe.chat_template!r} is neither a model that it can be taken from "
            f"({', '.join(settings)}) nor a text file that can be read"
        ) from None
    changed = {**_without_template(files), _FILE: text.encode()}
    return Chat(changed, source, recipe.chat_template, {}, (f"the chat template is that of {recipe.chat_template}",))


def _without_template(files: Mapping[str, bytes]) -> dict[str, bytes]:
    kept = {name: content for name, content in files.items() if not any(fnmatchcase(name, pattern) for pattern in TEMPLATES)}
    written = read_object(kept, _TOKENIZER)
    if "chat_template" in written:
        kept[_TOKENIZER] = write_object({key: value for key, value in written.items() if key != "chat_template"})
    return kept


@dataclass(frozen=True)
class _Taking:
    """A template that is taken from `donor`, into the files of `source`."""

    settings: Mapping[str, _Settings]
    source: str
    donor: str
    move: Move | None

    @property
    def own(self) -> _Settings:
        return self.settings[self.donor]

    def files(self, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """The files of the tokenizer's model with the donor's template, its end tokens and its generation config."""
        changed = _without_template(files)
        changed |= {name: content for name, content in self.own.files.items() if name not in SETTINGS}
        roles: dict[str, Any] = {role: token for role, token in self.own.tokens.items() if role in _ROLES}
        inline = read_object(self.own.files, _TOKENIZER).get("chat_template")
        written = {**read_object(changed, _TOKENIZER), **roles, **({"chat_template": inline} if inline else {})}
        changed[_TOKENIZER] = write_object(written)
        if _MAP in changed:
            changed[_MAP] = write_object({**read_object(changed, _MAP), **roles})
        generation = read_object(self.own.files, _GENERATION) or {**read_object(files, _GENERATION), **self.ids()}
        if generation:
            ids = {key: self._moved(value) for key, value in generation.items() if key.endswith("_token_id")}
            kept = {key: value for key, value in {**generation, **ids}.items() if key not in ids or value is not None}
            changed[_GENERATION] = write_object(kept)
        return changed

    def ids(self) -> dict[str, Any]:
        """The donor's special tokens for config.json, by their ids in the result."""
        found = {key: self._moved(self.own.model.find_key(key)) for key in SPECIAL_IDS}
        return {key: value for key, value in found.items() if value is not None}

    def _moved(self, value: Any) -> Any:
        if self.move is None:
            return value
        if isinstance(value, list):
            return [number for number in map(self._moved, value) if number is not None] or None
        return self.move.id_of(self.donor, value) if type(value) is int else None

    def notes(self) -> list[str]:
        """Return notes on models that end their texts otherwise than the result does, or generate by other settings."""
        ends, notes = {name: self._end(own) for name, own in self.settings.items()}, []
        differing = [name for name, end in ends.items() if end and ends[self.donor] and end != ends[self.donor]]
        if differing:
            shown = "; ".join(f"{name} by {ends[name]}" for name in differing)
            notes.append(f"the result ends its texts as {self.donor} does, by {ends[self.donor]}; {shown}")
        own = _generation(self.own)
        others = [name for name, settings in self.settings.items() if name != self.donor and _generation(settings) != own]
        keys = sorted({key for name in others for key, _ in _generation(self.settings[name]).items() ^ own.items()})
        if others:
            notes.append(f"generation_config.json is {self.donor}'s; {', '.join(others)} differ in {', '.join(keys)}")
        return notes

    def _end(self, own: _Settings) -> str:
        numbers = read_object(own.files, _GENERATION).get("eos_token_id", own.model.find_key("eos_token_id"))
        numbers = [number for number in (numbers if isinstance(numbers, list) else [numbers]) if type(number) is int]
        here = [number if self.move is None else self.move.id_of(own.model.name, number) for number in numbers]
        shown = ", ".join(sorted({"another token" if number is None else str(number) for number in here}))
        return " ".join(
            [*([repr(own.tokens["eos_token"])] if "eos_token" in own.tokens else []), *([f"(id {shown})"] if here else [])]
        )


def _generation(own: _Settings) -> dict[str, str]:
    """Return a generation config without ids, in a form that can be compared."""
    return {key: repr(value) for key, value in read_object(own.files, _GENERATION).items() if key not in _UNIMPORTANT}
