"""OpenVINO through optimum-intel: SETTING OUT CASE...

With f32 OpenVINO computes, and keeps the key-value cache, in float32; otherwise as it does by default.
"""

from __future__ import annotations

from importlib.metadata import version

import protocol
import torch
from optimum.intel import OVModelForCausalLM

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def client(case: protocol.Case, setting: str) -> protocol.Answer:
    options = {"ov_config": EXACT} if setting == "f32" else {}
    model = OVModelForCausalLM.from_pretrained(case.model, export=True, load_in_8bit=False, **options)
    model.generation_config.eos_token_id = None  # all clients go on to the last token
    logits, greedy = [], []
    for prompt in case.prompts:
        ids = torch.tensor([prompt])
        logits.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].double().numpy())
        new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=protocol.NEW_TOKENS, do_sample=False)
        greedy.append(new[0, len(prompt) :].tolist())
    versions = f"OpenVINO {version('openvino')}, optimum-intel {version('optimum-intel')}"
    return protocol.Answer(versions, protocol.softmax(logits), greedy)


if __name__ == "__main__":
    protocol.answer(client)
