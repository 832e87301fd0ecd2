"""A checkpoint with its tokenizer, as transformers loads it. torch and transformers are imported only here and below."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from moerge.architecture.moe_format import GROUPED_BYTES
from moerge.architecture.sequence import BY_SEQUENCE
from moerge.architecture.sizes import MAX_MODULES
from moerge.architecture.token_mixture import MODEL_TYPE as BY_TOKEN
from moerge.checkpoint.header import UnknownElements, read_header
from moerge.checkpoint.manifest import read_manifest
from moerge.checkpoint.reader import check_files, read_json, weight_files
from moerge.checkpoint.staging import MANIFEST
from moerge.errors import InputError, MachineError, MoergeError
from moerge.extras import require
from moerge.files import as_path
from moerge.quiet import without_progress_bars, without_warnings
from moerge.texts.chat import encode
from moerge.texts.conversations import Document, text_of
from moerge.texts.documents import check_unicode

if TYPE_CHECKING:
    import torch

_SIZES = re.compile(
    r"^(n|num)_\w*(layers?|heads?|experts?|embd)$|(encoder|decoder)_layers$|head_dim$"
    r"|^(vocab|hidden|embedding|(moe_|shared_expert_)?intermediate)_size$|^(d_model|d_ff|ffn_dim|n_inner)$"
)
"""Keys of a config that say how many modules, rows or columns there are."""


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
        """Return whether whole sequences are routed."""
        return bool(self.model.config.model_type in BY_SEQUENCE)

    def encode(self, document: Document, limit: int | None = None) -> torch.Tensor:
        """Up to `limit` tokens of a text or conversation, [1, T], as `moerge.texts.encode`; InputError if there are none."""
        shown = text_of(document)[:40]
        check_unicode(text_of(document), f"the text {shown!a}")
        return self.tensor(encode(self.tokenizer, document, limit), f"the text {shown!r}")

    def tensor(self, ids: Sequence[int], what: str) -> torch.Tensor:
        """Tokens as the model takes them, [1, T]; InputError that begins with `what` they are of if there are none."""
        import torch

        if not ids:
            raise InputError(f"{what} has no tokens: give a longer one")
        self.check_ids(ids)
        return torch.tensor([ids], dtype=torch.long, device=self.model.device)

    def check_ids(self, ids: Sequence[int]) -> None:
        """InputError for a token that the model has no embedding for."""
        rows = len(self.model.get_input_embeddings().weight)
        if max(ids, default=0) >= rows:
            raise InputError(
                f"{self.name}: the tokenizer makes token {max(ids)} of a text, but the embedding has {rows} rows: "
                "give the model its own tokenizer"
            )


def context_length(loaded: Loaded) -> int | None:
    """Tokens that a model takes at once, as its configuration says; None where that says nothing."""
    config = loaded.model.config
    for part in (config, config.get_text_config()):
        for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
            if isinstance(length := getattr(part, key, None), int) and length > 0:
                return length
    return None


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
    require("models", "running a model")
    import torch

    folder = as_path(checkpoint, "a checkpoint").expanduser()
    place = str(folder)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if not folder.is_dir():
        if folder.is_absolute() or str(checkpoint).startswith((".", "~")) or str(checkpoint).count("/") != 1:
            raise InputError(f"there is no checkpoint folder {checkpoint}: check the path", code="not-found")
        place, _, revision = str(checkpoint).partition("@")
        options |= {"revision": revision} if revision else {}
    if folder.is_dir():
        check_runnable(folder)  # before anything else looks at it
    _register_ours(str(checkpoint), place, options)
    model = load_model(place, name=str(checkpoint), dtype=dtype, auto=_auto_class(place, options), **options)
    tokenizer = load_tokenizer(tokenizer_from or place, name=str(tokenizer_from or checkpoint), options=options)
    try:
        model.to(device_or_default(device)).eval()
    except (RuntimeError, AssertionError) as error:
        if device is None:
            raise
        raise InputError(f"the device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    with explained(str(checkpoint), "run"), torch.inference_mode():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device))
    return Loaded(str(checkpoint), model, tokenizer)


def _auto_class(place: str, options: Mapping[str, Any]) -> Any:
    """The class that loads a multimodal model whole, None for all others: as causal language models some lose what sees."""
    import transformers

    try:
        revision = {key: value for key, value in options.items() if key == "revision"}
        named = transformers.PretrainedConfig.get_config_dict(place, **revision)[0].get("architectures") or [""]
    except OSError:
        return None
    whole = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return transformers.AutoModelForImageTextToText if named[0] in whole.values() else None


def load_model(place: str | Path | None, *, name: str = "", dtype: str | None = None, auto: Any = None, **options: Any) -> Any:
    """A model with all of its weights, on the CPU, from a folder's safetensors or the Hub's, or from `options` alone.

    A `dtype` of None means the stored one; `auto` is the class that loads it, of causal language models by default, and
    `options` are of its `from_pretrained`. Raises InputError, which calls it `name`, where transformers cannot load it, and
    where it would draw tensors at random.
    """
    import transformers

    name = name or str(place)
    if place is not None and Path(place).is_dir():
        check_runnable(Path(place))
        _register_ours(name, str(place), {})
    kind: Any = auto or transformers.AutoModelForCausalLM
    with explained(name):
        safe = {**options, **in_dtype(dtype), "use_safetensors": True, "output_loading_info": True}
        model, found = kind.from_pretrained(place, **safe)
    check_complete(name, found)
    _multiply_what_is_aligned(model)
    return model


def _multiply_what_is_aligned(model: Any) -> None:
    """Let transformers 5 compute experts one by one where torch's grouped product refuses their matrices' rows."""
    stacked = [value for name, value in model.named_parameters() if "experts" in name and value.ndim == 3]
    if hasattr(model, "set_experts_implementation") and not all(map(_is_aligned, stacked)):
        model.set_experts_implementation("eager")


def _is_aligned(matrices: Any) -> bool:
    return all(size * matrices.element_size() % GROUPED_BYTES == 0 for size in matrices.shape[1:])


def load_config(folder: str | Path, **said: str) -> Any:
    """A folder's config.json as transformers knows it. `said` is for `explained`, which raises InputError where it does not."""
    import transformers

    with explained(**{"name": str(folder), **said}):
        return transformers.AutoConfig.from_pretrained(folder)


def load_tokenizer(folder: str | Path, *, options: Mapping[str, Any] = MappingProxyType({}), **said: str) -> Any:
    """The tokenizer of a folder; no code in it is run unless the `options` of `from_pretrained` say so.

    `said` is for `explained`, which raises InputError where transformers cannot load it.
    """
    import transformers

    with explained(**{"name": str(folder), "what": "load the tokenizer of", **said}):
        return transformers.AutoTokenizer.from_pretrained(folder, **{"trust_remote_code": False, **options})


def load_processor(folder: str | Path, **said: str) -> Any:
    """A model's processor, which makes its inputs of texts and images; `said` is for `explained`, which raises InputError."""
    import transformers

    auto: Any = transformers.AutoProcessor
    with explained(**{"name": str(folder), "what": "load the processor of", **said}):
        try:
            return auto.from_pretrained(folder, trust_remote_code=False)
        except ImportError:
            return _for_images_alone(load_config(folder), transformers).from_pretrained(folder, trust_remote_code=False)


def _for_images_alone(config: Any, transformers: Any) -> Any:
    """The class of a processor without its part for videos, which needs torchvision, and which images do not need."""
    kind = getattr(transformers, transformers.models.auto.processing_auto.PROCESSOR_MAPPING_NAMES[config.model_type])

    class Stills(kind):  # type: ignore[misc, valid-type]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if "video" not in name]

    return Stills


def check_runnable(folder: Path) -> None:
    """InputError where a folder's files are damaged or its config speaks of more than its weights hold, before any is loaded."""
    check_files(folder)
    if not (folder / "config.json").exists():
        return
    config = read_json(folder / "config.json")
    try:
        tensors = [tensor for file in weight_files(folder) for tensor in read_header(file).values()]
    except UnknownElements:
        return
    if tensors:
        _check_sizes(f"{folder / 'config.json'}: ", config, len(tensors), sum(tensor.size for tensor in tensors))


def _check_sizes(where: str, config: Mapping[str, Any], tensors: int, elements: int) -> None:
    for key, value in config.items():
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Mapping):
                _check_sizes(f"{where}{key}.", inner, tensors, elements)
        most = tensors if "layer" in key else min(elements, MAX_MODULES) if "expert" in key else elements
        if _SIZES.search(key) and type(value) is int and value > most:
            raise InputError(f"{where}{key} is {value:,}, and the weights are only {tensors:,} tensors: restore the right config")


def _register_ours(checkpoint: str, place: str, options: dict[str, Any]) -> None:
    """Make our architecture known; an older transformers cannot run it, but still all other models."""
    from transformers import PretrainedConfig

    from moerge.modeling import register

    try:
        register()
    except ImportError as error:
        revision = {key: value for key, value in options.items() if key == "revision"}
        with suppress(OSError):
            if PretrainedConfig.get_config_dict(place, **revision)[0].get("model_type") in (*BY_SEQUENCE, BY_TOKEN):
                raise InputError(f"{checkpoint}: {error}: pip install --upgrade transformers") from None


@contextmanager
def explained(name: str, what: str = "load", advice: str = "", where: str = "") -> Iterator[None]:
    """While transformers does something with a model called `name`: quietly, and an InputError where it cannot.

    The message begins with `where` the model is named and ends with `advice`.
    """
    with without_progress_bars(), without_warnings():
        try:
            yield
        except MoergeError:
            raise
        except Exception as error:  # transformers, tokenizers and safetensors have no common one
            raise _explain(name, what, advice and f": {advice}", where and f"{where}: ", error) from error


def check_complete(checkpoint: str, found: Mapping[str, Any]) -> None:
    """InputError where transformers has drawn at random what a checkpoint does not have. `found` is its loading info."""
    missing = sorted(found["missing_keys"])
    if missing:
        shown = f"{missing[0]!r}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}"
        raise InputError(f"{checkpoint} lacks tensors of its model, {shown}: it would run on random numbers, so copy it again")


def _explain(name: str, what: str, advice: str, where: str, error: Exception) -> MoergeError:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return InputError(f"{name} comes with code of its own: look at it, then run it with --trust-remote-code")
    ours = MachineError if isinstance(error, MemoryError) or re.search(r"out of memory|allocate memory", text) else InputError
    reason = f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
    return ours(f"{where}transformers cannot {what} {name}: {reason}{advice}")


def device_or_default(name: str | None) -> str:
    """The device of this name; without one a GPU where there is one."""
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


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
    """Return `from_pretrained`'s argument for the element type, None for the stored one: transformers 4 has another word for
    it.
    """
    import torch

    keyword = "dtype" if int(version("transformers").split(".")[0]) >= 5 else "torch_dtype"
    return {keyword: "auto" if dtype is None else getattr(torch, dtype)}
