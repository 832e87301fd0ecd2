"""llama.cpp's converter: SOURCE MODEL OUT TYPE, for a tokenizer whose pre-tokenizer it cannot know.

It recognises byte-level BPE by a hash over the ids of a fixed text, so it refuses every tokenizer that was not published. The
demo's splits text exactly as SmolLM's does (single digits, then GPT-2's pattern), so it is told that name. Nothing else changes.
"""

from __future__ import annotations

import runpy
import sys

source, model, out, kind = sys.argv[1:5]
sys.path[:0] = [source, f"{source}/gguf-py"]
from conversion.base import TextModel  # noqa: E402

known = TextModel.get_vocab_base_pre


def recognised(self: TextModel, tokenizer: object) -> str:
    try:
        return str(known(self, tokenizer))
    except NotImplementedError:
        return "smollm"


TextModel.get_vocab_base_pre = recognised
sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", kind]
runpy.run_path(f"{source}/convert_hf_to_gguf.py", run_name="__main__")
