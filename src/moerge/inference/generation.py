"""Continuing a text with a checkpoint."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moerge.errors import InputError
from moerge.formatting import Displayed
from moerge.runtime.loading import Loaded, explained, load

LEAST_TEMPERATURE = 1e-3
"""Below it logits overflow, and the likeliest token is what is meant."""


@dataclass(frozen=True, repr=False)
class Generation(Displayed):
    """A model's continuation of a prompt. `routing` has a sequence-routed model's weight of each expert by name."""

    checkpoint: str
    prompt: str
    text: str
    prompt_tokens: int
    tokens: int
    seconds: float
    routing: dict[str, float] | None

    def to_json(self) -> dict[str, Any]:
        """Everything for `--json`."""
        return {
            "checkpoint": self.checkpoint,
            "prompt": self.prompt,
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "routing": self.routing,
        }


def generate(
    checkpoint: str | Path | Loaded,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Generation:
    """Continue `prompt`: the likeliest token each time at temperature 0, else a sample that `seed` determines.

    Sampling follows top-p and top-k of the checkpoint's generation config. No chat template is applied. Raises InputError if
    the checkpoint does not load, and for a temperature between 0 and `LEAST_TEMPERATURE`.
    """
    if 0 < temperature < LEAST_TEMPERATURE:
        raise InputError(f"temperature is {temperature:g}: use 0 for the likeliest token, or at least {LEAST_TEMPERATURE:g}")
    loaded = checkpoint if isinstance(checkpoint, Loaded) else load(checkpoint, trust_remote_code=trust_remote_code)
    import torch

    ids_1T = loaded.encode(prompt)
    settings = _settings(loaded, max_new_tokens, temperature)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    begun = time.perf_counter()
    try:
        with explained(loaded.name, "generate with"):
            out_1T = loaded.model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=settings)
    finally:
        torch.set_rng_state(state)
    seconds = time.perf_counter() - begun
    new_T = out_1T[0, ids_1T.shape[1] :]
    routing = None
    if loaded.by_sequence:
        names = loaded.model.config.expert_names
        routing = dict(zip(names, loaded.model.route(ids_1T).alpha[0].tolist(), strict=True))
    text = loaded.tokenizer.decode(new_T, skip_special_tokens=True)
    return Generation(loaded.name, prompt, text, ids_1T.shape[1], len(new_T), seconds, routing)


def _settings(loaded: Loaded, max_new_tokens: int, temperature: float) -> Any:
    settings = copy.deepcopy(loaded.model.generation_config)
    settings.max_new_tokens, settings.max_length, settings.do_sample = max_new_tokens, None, temperature > 0
    settings.num_beams = 1
    if temperature > 0:
        settings.temperature = temperature
    else:  # what only concerns sampling would cause warnings
        settings.temperature = settings.top_p = settings.top_k = None
    if settings.pad_token_id is None:
        end = settings.eos_token_id
        settings.pad_token_id = end[0] if isinstance(end, list) else end
    return settings
