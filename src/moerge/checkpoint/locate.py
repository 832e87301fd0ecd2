"""From what a recipe calls a model, a local folder or a Hub id, to a checkpoint."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from pathlib import Path

from moerge.checkpoint.dtypes import DTYPES
from moerge.checkpoint.header import StoredTensor
from moerge.checkpoint.reader import Checkpoint, open_folder, read_json
from moerge.errors import InputError, MachineError

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer*")
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def locate(location: str, *, name: str = "", relative_to: Path | None = None, weights: bool = True) -> Checkpoint:
    """Open a model given as a folder (relative to `relative_to`) or as a Hub id `owner/name[@revision]`.

    With `weights=False` a Hub model's configuration and headers are fetched, its weights are not.
    Raises InputError if there is no such model, MachineError if the Hub cannot be reached.
    """
    try:
        folder = (relative_to or Path()) / Path(location).expanduser()
        exists = folder.exists()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name + ': ' if name else ''}there is no model {location[:80]!r}: {reason}") from None
    if exists:
        return open_folder(folder, name=name, location=location)
    hub = None if location.startswith((".", "/", "~")) else _HUB_ID.fullmatch(location)
    if hub is None:
        raise InputError(f"{name + ': ' if name else ''}there is no folder {folder}{_nearby(folder)}")
    return _from_hub(hub["repo"], hub["revision"], name, location, folder, weights)


def _nearby(folder: Path) -> str:
    siblings = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, siblings, n=1)
    return f": did you mean {near[0]!r}?" if near else ": check the path"


def _from_hub(repo: str, revision: str | None, name: str, location: str, folder: Path, weights: bool) -> Checkpoint:
    import huggingface_hub as hub
    from huggingface_hub import errors

    patterns = [*SMALL_FILES, "*.safetensors"] if weights else list(SMALL_FILES)
    try:
        snapshot = Path(str(hub.snapshot_download(repo, revision=revision, allow_patterns=patterns)))
        commit = snapshot.name
        if weights:
            return replace(open_folder(snapshot, name=name, location=location), revision=commit)
        files = hub.get_safetensors_metadata(repo, revision=commit).files_metadata
    except errors.GatedRepoError:
        raise InputError(f"{name}: {repo} is gated on the Hub: accept its terms there, then run `hf auth login`") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
        at = f" at revision {revision}" if revision else ""
        raise InputError(f"{name}: {location} is neither a folder ({folder}) nor a model on the Hub{at}: check it") from None
    except errors.NotASafetensorsRepoError:
        raise InputError(f"{name}: {repo} has no safetensors weights on the Hub: convert it and name the local folder") from None
    except (OSError, errors.HfHubHTTPError) as error:
        reason = str(error).split("\n", 1)[0]
        raise MachineError(f"{name}: {location} is not a folder ({folder}) and the Hub did not answer: {reason}") from None
    tensors = {
        tensor_name: StoredTensor(tensor_name, DTYPES[info.dtype], tuple(info.shape), snapshot / file, info.data_offsets[0])
        for file, metadata in files.items()
        for tensor_name, info in metadata.tensors.items()
    }
    return Checkpoint(name, location, snapshot, read_json(snapshot / "config.json"), tensors, commit, complete=False)
