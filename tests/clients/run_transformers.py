"""transformers, the reference and its older versions: DTYPE OUT CASE..."""

from __future__ import annotations

import protocol
import torch
import transformers


def client(case: protocol.Case, setting: str) -> protocol.Answer:
    dtype = getattr(torch, setting)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        case.model, output_loading_info=True, torch_dtype=dtype, trust_remote_code=True
    )
    assert not any(report.values()), report
    model.generation_config.eos_token_id = None  # all clients go on to the last token
    logits, greedy = [], []
    with torch.no_grad():
        for prompt in case.prompts:
            ids = torch.tensor([prompt])
            logits.append(model(ids).logits[0, -1].double().numpy())
            new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=protocol.NEW_TOKENS, do_sample=False)
            greedy.append(new[0, len(prompt) :].tolist())
    return protocol.Answer(f"transformers {transformers.__version__}", protocol.softmax(logits), greedy)


if __name__ == "__main__":
    protocol.answer(client)
