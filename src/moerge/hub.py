"""Publishing a checkpoint on the Hugging Face Hub: verified first, its own files only, in one commit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerge.checkpoint.companions import is_inside
from moerge.checkpoint.manifest import read_manifest
from moerge.checkpoint.reader import ADAPTER_CONFIG, INDEX, Checkpoint, open_folder
from moerge.checkpoint.source_cards import CARD
from moerge.checkpoint.staging import MANIFEST
from moerge.errors import InputError, MachineError
from moerge.formatting import Displayed
from moerge.inspection import verify
from moerge.progress import Progress
from moerge.quiet import without_hub_bars
from moerge.tokenizer import companion_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_WEIGHT_FILE = re.compile(r"(pytorch_)?model(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
"""What transformers may load weights from; one that is not part of the checkpoint would be loaded beside it, or instead."""
_REPO = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


@dataclass(frozen=True)
class Upload:
    """The files for the Hub: sizes in bytes by file name, and warnings about what will be public."""

    checkpoint: Checkpoint
    repo: str
    revision: str
    files: Mapping[str, int]
    warnings: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


@dataclass(frozen=True, repr=False)
class Pushed(Displayed):
    """A finished upload, or with `commit` None one that was only looked at. `removed` are stale weights of the repository."""

    upload: Upload
    url: str | None = None
    commit: str | None = None
    removed: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return the upload's warnings."""
        return self.upload.warnings

    def to_json(self) -> dict[str, Any]:
        """Everything for `--json`."""
        return {
            "checkpoint": str(self.upload.checkpoint.folder),
            "repo": self.upload.repo,
            "revision": self.upload.revision,
            "url": self.url,
            "commit": self.commit,
            "files": dict(self.upload.files),
            "bytes": self.upload.nbytes,
            "removed": list(self.removed),
            "warnings": list(self.upload.warnings),
        }


def prepare(folder: str | Path, repo: str, *, revision: str = "main", progress: Progress | bool = False) -> Upload:
    """Verify a checkpoint folder and list what would be uploaded; nothing is sent.

    Raises InputError for a damaged checkpoint, a name that is no repository's, and files that are links out of the folder.
    """
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise InputError(f"{repo!r} is not the name of a repository on the Hub: write it as owner/name")
    if not revision.strip():
        raise InputError("the revision has no name: leave it out for main, or name a branch")
    checkpoint = open_folder(Path(folder))
    files = own_files(checkpoint)
    problems = verify(checkpoint.folder, progress=progress).problems
    if problems:
        more = f" (and {len(problems) - 1} more: see `moerge verify`)" if len(problems) > 1 else ""
        raise InputError(f"{checkpoint.folder} is damaged and is not uploaded: {problems[0]}{more}", code="damaged-file")
    return Upload(checkpoint, repo, revision, files, tuple(_warnings(checkpoint)))


def own_files(checkpoint: Checkpoint) -> dict[str, int]:
    """Sizes of the files that belong to a checkpoint, by name; whatever else lies in its folder stays here."""
    folder, manifest = checkpoint.folder, read_manifest(checkpoint.folder)
    names = {file.name for tensor in checkpoint.tensors.values() for file in tensor.files}
    names |= {name for name in ("config.json", ADAPTER_CONFIG, INDEX, CARD) if (folder / name).is_file()}
    names |= {MANIFEST, *manifest["files"]} if manifest else set(companion_files(folder))
    for name in sorted(names):
        _check_inside(folder, name)
    return {name: (folder / name).stat().st_size for name in sorted(names)}


def _check_inside(folder: Path, name: str) -> None:
    path = folder / name
    if not is_inside(name) or not path.is_file():
        raise InputError(f"{folder} has no file {name!r} although its manifest lists it: merge again")
    if path.is_symlink() and folder.resolve() not in path.resolve().parents:
        raise InputError(f"{path} is a link to {path.resolve()}, outside of the checkpoint: put the file itself there")


def _warnings(checkpoint: Checkpoint) -> Iterator[str]:
    manifest = read_manifest(checkpoint.folder)
    models = manifest["models"].values() if manifest else ()
    local = [str(model.get("location")) for model in models if isinstance(model, dict) and not model.get("revision")]
    local.append(str(checkpoint.config.get("base_model_name_or_path", "")))  # an adapter's
    named = [location for location in local if location.startswith(("/", "~"))]
    if named:
        where = f"the model card and {MANIFEST if manifest else ADAPTER_CONFIG}"
        yield f"{where} name folders of this machine ({', '.join(named)}): anyone can read them there"
    if not (checkpoint.folder / CARD).is_file():
        yield f"there is no {CARD}, so the repository gets no model card"


def require_token() -> None:
    """InputError where this machine has no token for the Hub."""
    from huggingface_hub import get_token

    if not get_token():
        raise InputError("no token for the Hub: run `hf auth login`, or set HF_TOKEN to one that may write")


def push(
    checkpoint: str | Path,
    repo: str,
    *,
    revision: str = "main",
    private: bool = False,
    message: str | None = None,
    progress: Progress | bool = False,
) -> Pushed:
    """Verify a checkpoint folder and upload its own files to the Hugging Face Hub, in one commit.

    Args:
        checkpoint: The folder.
        repo: The repository, owner/name; made where it does not exist.
        revision: The branch; made where it does not exist.
        private: Make a new repository private.
        message: The commit message.
        progress: A `Progress`, or True for a display on standard error.

    Returns:
        The uploaded files and the commit's address.

    Raises:
        InputError: The checkpoint is damaged, or the Hub does not let this token write there.
        MachineError: The Hub cannot be reached.
    """
    require_token()
    upload = prepare(checkpoint, repo, revision=revision, progress=progress)
    return send(upload, private=private, message=message, show_progress=bool(progress))


def send(upload: Upload, *, private: bool = False, message: str | None = None, show_progress: bool = True) -> Pushed:
    """Upload what `prepare` found to the Hub, which makes the repository and the branch where they do not exist yet.

    All files appear at once, in one commit that also removes weights of an earlier checkpoint; files that are there already
    are not sent again, so an interrupted push goes on where it was. `private` holds for a new repository. Raises InputError
    where the Hub does not let this token write there, MachineError where it cannot be reached.
    """
    require_token()
    with _explained(upload.repo), _bars(show_progress):
        import huggingface_hub as hub

        api = hub.HfApi(library_name="moerge", library_version=version("moerge"))
        repo = api.create_repo(upload.repo, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(repo).private:
            raise InputError(f"{repo} exists and is public: make it private on the Hub, or push without --private")
        if upload.revision != "main":
            api.create_branch(repo, branch=upload.revision, exist_ok=True)
        return _commit(api, upload, repo, message or f"Upload a checkpoint merged by moerge {version('moerge')}")


def _commit(api: HfApi, upload: Upload, repo: str, message: str) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    folder = upload.checkpoint.folder
    there = api.list_repo_files(repo, revision=upload.revision)
    stale = sorted(name for name in there if _WEIGHT_FILE.fullmatch(name) and name not in upload.files)
    operations: list[Any] = [CommitOperationAdd(name, str(folder / name)) for name in upload.files]
    operations += [CommitOperationDelete(name) for name in stale]
    done = api.create_commit(repo, operations, commit_message=message, revision=upload.revision)
    missing = sorted(set(upload.files) - set(api.list_repo_files(repo, revision=done.oid)))
    if missing:
        raise InputError(f"{repo} did not take {', '.join(missing)}: look at its .gitignore on the Hub, then push again")
    return Pushed(upload, f"{api.endpoint}/{repo}", done.oid, tuple(stale))


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """huggingface_hub draws its own progress bars."""
    if shown:
        yield
        return
    with without_hub_bars():
        yield


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into errors of ours; its exceptions share no base class."""
    from huggingface_hub import errors

    try:
        yield
    except (InputError, MachineError):
        raise
    except (errors.RepositoryNotFoundError, errors.HfHubHTTPError) as error:
        raise _refusal(repo, error) from None
    except errors.HFValidationError:
        raise InputError(f"{repo!r} is not the name of a repository on the Hub: write it as owner/name") from None
    except errors.OfflineModeIsEnabled:
        raise MachineError("the Hub is switched off by HF_HUB_OFFLINE: unset it to push") from None
    except Exception as error:
        raise MachineError(
            f"{repo} could not be uploaded, run the same command again: {_first_line(error)}", code="no-network"
        ) from None


def _refusal(repo: str, error: Any) -> InputError | MachineError:
    """By the status of the Hub's answer."""
    status, said = getattr(error.response, "status_code", None), _first_line(error)
    sentences: dict[int, str] = {
        401: "the Hub does not know this token: run `hf auth login`, or set HF_TOKEN to one that may write",
        403: f"this token may not write to {repo}: use one with write access, or another name",
        404: f"{repo} is not on the Hub, or this token may not see it: check the name and the token's rights",
        409: f"{repo} was changed by someone else meanwhile: push again",
    }
    if status in sentences:
        return InputError(sentences[status])
    if status is not None and status < 500:
        return InputError(f"the Hub refused the upload to {repo}: {said}")
    return MachineError(f"{repo} could not be uploaded, run the same command again: {said}", code="no-network")


def _first_line(error: BaseException) -> str:
    said = getattr(error, "server_message", None) or str(error)
    return next((line.strip() for line in said.splitlines() if line.strip()), type(error).__name__)
