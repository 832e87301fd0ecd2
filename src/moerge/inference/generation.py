"""Continuing a text with a checkpoint."""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerge.errors import InputError
from moerge.formatting import Displayed
from moerge.runtime.loading import Loaded, explained, load
from moerge.texts import has_template

if TYPE_CHECKING:
    import torch

LEAST_TEMPERATURE = 1e-3
"""Below it logits overflow, and the likeliest token is what is meant."""


@dataclass(frozen=True, repr=False)
class Generation(Displayed):
    """A model's continuation of a prompt. `routing` has a sequence-routed model's weight of each expert by name.

    `messages` are the whole conversation, where there is one.
    """

    checkpoint: str
    prompt: str
    text: str
    prompt_tokens: int
    tokens: int
    seconds: float
    routing: dict[str, float] | None
    messages: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

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
            **({"messages": list(self.messages)} if self.messages else {}),
            **({"notes": list(self.notes)} if self.notes else {}),
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

    Sampling follows top-p and top-k of the checkpoint's generation config. No chat template is applied, of which the result's
    notes say if the model has one: `moerge.inference.chat.Chat` applies it. Raises InputError if the checkpoint does not load,
    and for a temperature between 0 and `LEAST_TEMPERATURE`.
    """
    check_temperature(temperature)
    loaded = checkpoint if isinstance(checkpoint, Loaded) else load(checkpoint, trust_remote_code=trust_remote_code)
    ids_1T = loaded.encode(prompt)
    new_T, seconds = continue_tokens(loaded, ids_1T, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    text = loaded.tokenizer.decode(new_T, skip_special_tokens=True)
    routing = routing_by_name(loaded, None, ids_1T)
    return Generation(loaded.name, prompt, text, ids_1T.shape[1], len(new_T), seconds, routing, notes=_notes(loaded, prompt))


def check_temperature(temperature: float) -> None:
    """InputError for one at which logits overflow."""
    if 0 < temperature < LEAST_TEMPERATURE:
        raise InputError(f"temperature is {temperature:g}: use 0 for the likeliest token, or at least {LEAST_TEMPERATURE:g}")


def continue_tokens(
    loaded: Loaded,
    ids_1T: torch.Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    ends: Collection[int] = (),
    **options: Any,
) -> tuple[torch.Tensor, float]:
    """The tokens [T] that go on behind these, and the seconds that they took.

    `ends` are the tokens that end the text, by default the generation config's; `options` go to transformers' `generate`.
    """
    import torch

    settings = _settings(loaded, max_new_tokens, temperature)
    if ends:
        settings.eos_token_id = sorted(ends)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    begun = time.perf_counter()
    try:
        with explained(loaded.name, "generate with"):
            mask_1T = torch.ones_like(ids_1T)
            out_1T = loaded.model.generate(ids_1T, attention_mask=mask_1T, generation_config=settings, **options)
    finally:
        torch.set_rng_state(state)
    return out_1T[0, ids_1T.shape[1] :], time.perf_counter() - begun


def routing_by_name(loaded: Loaded, routing: Any, ids_1T: torch.Tensor) -> dict[str, float] | None:
    """The weights of a sequence-routed model's experts, of a `routing` or of that which the model finds for these tokens."""
    if not loaded.by_sequence:
        return None
    found = loaded.model.route(ids_1T) if routing is None else routing
    return dict(zip(loaded.model.config.expert_names, found.alpha[0].tolist(), strict=True))


def _notes(loaded: Loaded, prompt: str) -> tuple[str, ...]:
    """A note where a chat model gets a prompt without its template."""
    if not has_template(loaded.tokenizer) or any(token in prompt for token in loaded.tokenizer.all_special_tokens):
        return ()
    return (f"{loaded.name} is a chat model, and the prompt was given to it as it is: --chat asks it in its own template",)


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
