"""tokenizer_config.json that transformers 4 and 5 both read, as config.json is written too."""

from __future__ import annotations

import json
from collections.abc import Mapping

_CONFIG = "tokenizer_config.json"
_ONLY_IN_5, _IN_BOTH = "TokenizersBackend", "PreTrainedTokenizerFast"


def portable_tokenizer(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files with what transformers 5 renamed under its older name, which 5 reads as well; all other bytes stay.

    transformers 4, and with it llama.cpp's converter, fails on the class name `TokenizersBackend` and on
    `extra_special_tokens` as a list. Both were tried with 4.50.3, 4.57.6, 5.5.4 and 5.23.
    """
    try:
        settings = json.loads(files.get(_CONFIG, b"{}"))
    except ValueError:
        return dict(files)
    if not isinstance(settings, dict):
        return dict(files)
    written = dict(settings)
    if written.get("tokenizer_class") == _ONLY_IN_5:
        written["tokenizer_class"] = _IN_BOTH
    if isinstance(written.get("extra_special_tokens"), list):
        extra, already = written.pop("extra_special_tokens"), written.get("additional_special_tokens") or []
        written["additional_special_tokens"] = [*already, *(token for token in extra if token not in already)]
    if written == settings:
        return dict(files)
    return {**files, _CONFIG: (json.dumps(written, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")}
