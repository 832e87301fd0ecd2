"""A checkpoint with its tokenizer, as transformers loads it. torch and transformers are imported only here and below."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerge.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, on the GPU where there is one, and its tokenizer."""

    name: str
    model: Any
    tokenizer: Any

    @property
    def by_sequence(self) -> bool:
        """Whether whole sequences are routed."""
        return bool(self.model.config.model_type == "moerge")

    def encode(self, text: str, limit: int | None = None) -> torch.Tensor:
        """Up to `limit` tokens of a text, [1, T], as the tokenizer starts a text; InputError if there are none."""
        import torch

        options = {} if limit is None else {"truncation": True, "max_length": limit}
        ids = self.tokenizer(text, **options)["input_ids"]
        if not ids:
            raise InputError(f"the text {text[:40]!r} has no tokens: give a longer one")
        return torch.tensor([ids], dtype=torch.long, device=self.model.device)


def load(checkpoint: str | Path, *, trust_remote_code: bool = False) -> Loaded:
    """A checkpoint folder or Hub id (`owner/name@revision`), in the element type it is stored in.

    Raises InputError where transformers is missing or cannot load it.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise InputError(f"running a model needs {error.name}: pip install 'moerge[models]'") from None
    from moerge.modeling import register

    with suppress(ImportError):  # an older transformers still runs all other models
        register()
    folder = Path(checkpoint).expanduser()
    place = str(folder)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if not folder.is_dir():
        if folder.is_absolute() or str(checkpoint).startswith((".", "~")) or str(checkpoint).count("/") != 1:
            raise InputError(f"there is no checkpoint folder {checkpoint}: check the path")
        place, _, revision = str(checkpoint).partition("@")
        options |= {"revision": revision} if revision else {}
    keyword = "dtype" if int(version("transformers").split(".")[0]) >= 5 else "torch_dtype"
    with _without_progress_bars():
        try:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(place, **{keyword: "auto"}, **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise InputError(_explain(str(checkpoint), error)) from None
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return Loaded(str(checkpoint), model, tokenizer)


def _explain(checkpoint: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return f"{checkpoint} comes with code of its own: look at it, then run it with --trust-remote-code"
    return f"transformers cannot load {checkpoint}: {text[:300]}"


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging as untyped

    logging: Any = untyped
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
