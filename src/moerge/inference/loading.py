"""A checkpoint with its tokenizer, as transformers loads it. torch and transformers are imported only here and below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerge.architecture.sequence import BY_SEQUENCE
from moerge.calibration.texts import check_unicode
from moerge.checkpoint.manifest import read_manifest
from moerge.checkpoint.reader import check_files
from moerge.checkpoint.staging import MANIFEST
from moerge.errors import InputError
from moerge.quiet import without_progress_bars, without_warnings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, on the GPU where there is one, and its tokenizer."""

    name: str
    model: Any
    tokenizer: Any

    @cached_property
    def manifest(self) -> dict[str, Any] | None:
        """The manifest of a checkpoint that moerge made, on this machine or on the Hub."""
        folder = Path(self.name).expanduser()
        if folder.is_dir():
            return read_manifest(folder)
        from huggingface_hub import errors, hf_hub_download

        repo, _, revision = self.name.partition("@")
        with suppress(errors.EntryNotFoundError):
            return read_manifest(Path(hf_hub_download(repo, MANIFEST, revision=revision or None)).parent)
        return None

    @property
    def by_sequence(self) -> bool:
        """Whether whole sequences are routed."""
        return bool(self.model.config.model_type in BY_SEQUENCE)

    def encode(self, text: str, limit: int | None = None) -> torch.Tensor:
        """Up to `limit` tokens of a text, [1, T], as the tokenizer starts a text; InputError if there are none."""
        import torch

        check_unicode(text, f"the text {text[:40]!a}")
        options = {} if limit is None else {"truncation": True, "max_length": limit}
        ids = self.tokenizer(text, **options)["input_ids"]
        if not ids:
            raise InputError(f"the text {text[:40]!r} has no tokens: give a longer one")
        return torch.tensor([ids], dtype=torch.long, device=self.model.device)


def load(
    checkpoint: str | Path,
    *,
    trust_remote_code: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    tokenizer_from: str | Path | None = None,
) -> Loaded:
    """A checkpoint folder or Hub id (`owner/name@revision`), in the element type it is stored in unless `dtype` names another.

    `device` is the GPU by default where there is one; `tokenizer_from` another folder whose tokenizer is used.
    Raises InputError where transformers is missing or cannot load it, and for a device that cannot be used.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise InputError(f"running a model needs {error.name}: pip install 'moerge[models]'") from None
    folder = Path(checkpoint).expanduser()
    place = str(folder)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if not folder.is_dir():
        if folder.is_absolute() or str(checkpoint).startswith((".", "~")) or str(checkpoint).count("/") != 1:
            raise InputError(f"there is no checkpoint folder {checkpoint}: check the path")
        place, _, revision = str(checkpoint).partition("@")
        options |= {"revision": revision} if revision else {}
    _register_ours(str(checkpoint), place, options)
    if folder.is_dir():
        check_files(folder)
    with explained(str(checkpoint)):
        auto: Any = transformers.AutoModelForCausalLM
        safe = {**in_dtype(dtype), **options, "use_safetensors": True}
        model, found = auto.from_pretrained(place, **safe, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_from or place, **options)
    check_complete(str(checkpoint), found)
    try:
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    except (RuntimeError, AssertionError) as error:
        if device is None:
            raise
        raise InputError(f"the device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return Loaded(str(checkpoint), model, tokenizer)


def _register_ours(checkpoint: str, place: str, options: dict[str, Any]) -> None:
    """Make our architecture known; an older transformers cannot run it, but still all other models."""
    from transformers import PretrainedConfig

    from moerge.modeling import register

    try:
        register()
    except ImportError as error:
        revision = {key: value for key, value in options.items() if key == "revision"}
        with suppress(OSError):
            if PretrainedConfig.get_config_dict(place, **revision)[0].get("model_type") in BY_SEQUENCE:
                raise InputError(f"{checkpoint}: {error}: pip install --upgrade transformers") from None


@contextmanager
def explained(checkpoint: str) -> Iterator[None]:
    """While transformers loads a checkpoint: quietly, and an InputError where it cannot."""
    with without_progress_bars(), without_warnings():
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
            raise InputError(_explain(checkpoint, error)) from None


def check_complete(checkpoint: str, found: Mapping[str, Any]) -> None:
    """InputError where transformers has drawn at random what a checkpoint does not have. `found` is its loading info."""
    missing = sorted(found["missing_keys"])
    if missing:
        shown = f"{missing[0]!r}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}"
        raise InputError(f"{checkpoint} lacks tensors of its model, {shown}: it would run on random numbers, so copy it again")


def _explain(checkpoint: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return f"{checkpoint} comes with code of its own: look at it, then run it with --trust-remote-code"
    return f"transformers cannot load {checkpoint}: {text[:300]}"


def usable_device(name: str, where: str) -> torch.device:
    """A device that torch computes on here. Raises InputError that begins with `where` it is named."""
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # a kind of its own for each device
        raise InputError(f"{where}: {name!r} cannot be used here: {str(error).splitlines()[0][:200]}") from None
    return device


def in_dtype(dtype: str | None) -> dict[str, Any]:
    """What `from_pretrained` is told of the element type, None for the stored one: transformers 4 has another word for it."""
    import torch

    keyword = "dtype" if int(version("transformers").split(".")[0]) >= 5 else "torch_dtype"
    return {keyword: "auto" if dtype is None else getattr(torch, dtype)}
