"""From what a recipe calls a model, a local folder or a Hub id, to a checkpoint."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from moerge.checkpoint.expert import expert_of, split_reference
from moerge.checkpoint.gguf_file import SUFFIX as GGUF
from moerge.checkpoint.gguf_file import open_gguf
from moerge.checkpoint.header import stored_tensor
from moerge.checkpoint.quantised import with_numbers
from moerge.checkpoint.reader import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    WEIGHTS,
    Checkpoint,
    open_folder,
    read_index,
    read_json,
)
from moerge.errors import InputError, MachineError, MoergeError
from moerge.files import SourceFile
from moerge.quiet import without_hub_bars

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model")
"""Files that hold a vocabulary."""

SMALL_FILES = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.py",
    "*.tiktoken",
    "*.spm",
    "vocab.bpe",
    "bpe.codes",
    "tokenizer*",
    "README.md",
)
_SUBFOLDERS = ("[!0-9a]*/*", "a[!d]*/*", "*/*/*")
"""All but the numbered ones of sentence-transformers and additional_chat_templates: other formats' weights lie in those."""
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def locate(
    location: str, *, name: str = "", relative_to: Path | None = None, weights: bool = True, commit: str | None = None
) -> Checkpoint:
    """Open a model given as a folder (relative to `relative_to`) or as a Hub id `owner/name[@revision]`, or an expert of it.

    With `weights=False` a Hub model's configuration and headers are fetched, its weights are not. `commit` pins what an
    earlier look at the Hub found, in case the revision has moved since.
    Raises InputError if there is no such model or expert, MachineError if the Hub cannot be reached.
    """
    try:
        model, expert = split_reference(location, relative_to or Path())
    except (OSError, RuntimeError):  # `_locate` says why this is no path
        model, expert = location, None
    found = _locate(model, name=name, relative_to=relative_to, weights=weights, commit=commit)
    return found if expert is None else expert_of(with_numbers(found), expert, location)


def _locate(location: str, *, name: str, relative_to: Path | None, weights: bool, commit: str | None) -> Checkpoint:
    label = f"{name}: " if name else ""
    try:
        folder = (relative_to or Path()) / Path(location).expanduser()
        exists = folder.exists()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{label}there is no model {location[:80]!r}: {reason}", code="not-found") from None
    if exists:
        return (open_gguf if folder.suffix == GGUF and folder.is_file() else open_folder)(folder, name=name, location=location)
    hub = None if location.startswith((".", "/", "~")) else _HUB_ID.fullmatch(location)
    near = _nearby(folder)
    missing = InputError(
        f"{label}there is no folder {folder}: {f'did you mean {near!r}?' if near else 'check the path'}", code="not-found"
    )
    if hub is None:
        raise missing
    try:
        with _explained(f"{label}{location}", folder):
            snapshot, fetched = _fetch(hub["repo"], commit or hub["revision"], weights)
    except MoergeError:
        if near:  # a misspelled relative path looks like a Hub id
            raise missing from None
        raise
    if fetched is None:
        return replace(open_folder(snapshot, name=name, location=location), revision=snapshot.name)
    tensors = {key: stored_tensor(SourceFile(snapshot / file), key, entry, 0) for key, (file, entry) in fetched.items()}
    adapter = {file for file, _ in fetched.values()} == {ADAPTER_WEIGHTS}
    config = read_json(snapshot / (ADAPTER_CONFIG if adapter else "config.json"))
    return Checkpoint(name, location, snapshot, config, tensors, snapshot.name, complete=False)


def _nearby(folder: Path) -> str | None:
    """The folder beside a missing one that is named most alike."""
    siblings = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    return next(iter(difflib.get_close_matches(folder.name, siblings, n=1)), None)


def _fetch(repo: str, revision: str | None, weights: bool) -> tuple[Path, dict[str, tuple[str, dict[str, object]]] | None]:
    """A Hub model's snapshot folder, named after its commit; and its headers' entries unless the weights are there."""
    import huggingface_hub as hub

    patterns = [*SMALL_FILES, "*.safetensors"] if weights else list(SMALL_FILES)
    with nullcontext() if weights else without_hub_bars():
        fetched = hub.snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=list(_SUBFOLDERS))
        snapshot = Path(str(fetched))
        if weights or _has_weights(snapshot):
            return snapshot, None
        if (snapshot / ADAPTER_CONFIG).exists() and not _has_model(repo, snapshot.name):
            files = {ADAPTER_WEIGHTS: hub.parse_safetensors_file_metadata(repo, ADAPTER_WEIGHTS, revision=snapshot.name)}
        else:
            files = hub.get_safetensors_metadata(repo, revision=snapshot.name).files_metadata
    return snapshot, {
        name: (file, {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)})
        for file, metadata in files.items()
        for name, info in metadata.tensors.items()
    }


def _has_weights(snapshot: Path) -> bool:
    if (snapshot / INDEX).exists():
        return all((snapshot / shard).exists() for shard in set(read_index(snapshot / INDEX).values()))
    return (snapshot / WEIGHTS).exists() or (snapshot / ADAPTER_WEIGHTS).exists()


def _has_model(repo: str, revision: str) -> bool:
    """Return whether a repository with an adapter's settings holds a whole model."""
    import huggingface_hub as hub

    return any(hub.file_exists(repo, file, revision=revision) for file in (WEIGHTS, INDEX))


@contextmanager
def _explained(model: str, folder: Path) -> Iterator[None]:
    """Turns what huggingface_hub raises into errors of ours; its exceptions share no base class."""
    from huggingface_hub import errors

    neither = f"{model} is neither a folder ({folder}) nor"
    try:
        yield
    except InputError:
        raise
    except errors.GatedRepoError:
        raise InputError(f"{model} is gated on the Hub: accept its terms there, then run `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{neither} a revision on the Hub: check what stands after the '@'", code="not-found") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise InputError(
            f"{neither} a model on the Hub: check the path or the id (private ones need `hf auth login`)", code="not-found"
        ) from None
    except errors.NotASafetensorsRepoError:
        raise InputError(f"{model} has no safetensors weights on the Hub: convert it and name the local folder") from None
    except errors.SafetensorsParsingError:
        raise InputError(
            f"{model} has a damaged safetensors file on the Hub: use another revision", code="damaged-file"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise MachineError(
            f"{model} is not a folder ({folder}), not in the Hub's cache, and the Hub cannot be reached: "
            "check the connection and HF_HUB_OFFLINE",
            code="no-network",
        ) from None
    except errors.EntryNotFoundError:
        raise InputError(f"{model} has no {ADAPTER_WEIGHTS} on the Hub: convert it and name the local folder") from None
    except Exception as error:
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise MachineError(
            f"{model} is not a folder ({folder}) and could not be fetched from the Hub: {reason}", code="no-network"
        ) from None
