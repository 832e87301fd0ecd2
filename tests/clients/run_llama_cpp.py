"""llama.cpp through llama-cpp-python: SETTING OUT CASE..., where each case has SETTING.gguf.

With f32 the key-value cache is float32 too, which is not llama.cpp's default.
"""

from __future__ import annotations

import llama_cpp
import numpy as np
import protocol

F32 = 0  # ggml's number of the type


def client(case: protocol.Case, setting: str) -> protocol.Answer:
    cache = {"type_k": F32, "type_v": F32} if setting == "f32" else {}
    model = llama_cpp.Llama(str(case.folder / f"{setting}.gguf"), n_ctx=256, logits_all=True, verbose=False, n_threads=2, **cache)
    tokens = [model.tokenize(text.encode(), add_bos=False, special=False) for text in case.texts]
    logits, greedy = [], []
    for prompt in case.prompts:
        model.reset()
        model.eval(prompt)
        logits.append(np.array(model.scores[model.n_tokens - 1], np.float64))
        new = []
        for _ in range(protocol.NEW_TOKENS):
            new.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(new[-1:])
        greedy.append(new)
    versions = f"llama-cpp-python {llama_cpp.__version__}"
    return protocol.Answer(versions, protocol.softmax(logits), greedy, tokens)


if __name__ == "__main__":
    protocol.answer(client)
