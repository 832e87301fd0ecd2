"""Running a merged MoE over calibration text with its routing forced, to see what its routers see.

Shapes: L layers, E experts, T tokens, H hidden, V vocabulary. torch is imported only here, and only when a model runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerge.errors import InputError

if TYPE_CHECKING:
    import torch

Route = int | None
"""Which expert takes every token; None mixes all in equal parts."""


def require_models_extra(what: str) -> None:
    """InputError where what models run on is not installed."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise InputError(f"{what} runs the merged model, which needs {error.name}: pip install 'moerge[models]'") from None


class RunningMoE:
    """A token-routed MoE in memory, whose gates are overruled, so that it does not matter what they hold."""

    def __init__(self, folder: Path, *, experts: int, layers: int, device: str = "cpu", dtype: str | None = None) -> None:
        require_models_extra("a calibrated router")
        import torch

        self.experts = experts
        self._device = _device(device)
        wanted = "auto" if dtype is None else getattr(torch, dtype)
        self._folder = folder
        self._tokenizer: Any = None
        self._model = _load(folder, wanted)
        self._model.to(self._device).eval()
        self._gates = [module for name, module in self._model.named_modules() if name.endswith(".gate")]
        self._blocks = [module for module in self._model.modules() if getattr(module, "gate", None) in self._gates]
        if len(self._gates) != layers:
            raise InputError(
                f"a calibrated router needs a gate in each of {layers} layers, and transformers finds {len(self._gates)}"
            )

    def encode(self, text: str, tokens: int) -> torch.Tensor:
        """The first `tokens` tokens of a text, [1, T], as the tokenizer starts a text."""
        import torch
        import transformers

        if self._tokenizer is None:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(self._folder)
        ids = self._tokenizer(text, truncation=True, max_length=tokens)["input_ids"]
        return torch.tensor([ids], dtype=torch.long, device=self._device)

    def random_tokens(self, seed: int, tokens: int) -> torch.Tensor:
        """Tokens drawn uniformly from the vocabulary, [1, T]: input that is no text at all."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self._model.config.vocab_size, (1, tokens), generator=generator).to(self._device)

    def router_inputs(self, ids_1T: torch.Tensor, path: Route) -> list[torch.Tensor]:
        """What each layer's router sees on this path, L times [T, H] in float32."""
        import torch

        with torch.no_grad(), self._forced(path), self._seen() as inputs_LTH:
            self._model.base_model(input_ids=ids_1T, use_cache=False)
        return inputs_LTH

    def losses(self, ids_1T: torch.Tensor, path: Route) -> torch.Tensor:
        """-log P of each token but the first given those before it, [T - 1], in nats."""
        import torch

        with torch.no_grad(), self._forced(path):
            logits_TV = self._model(input_ids=ids_1T, use_cache=False).logits[0].float()
        return torch.nn.functional.cross_entropy(logits_TV[:-1], ids_1T[0, 1:], reduction="none")

    @contextmanager
    def _seen(self) -> Iterator[list[torch.Tensor]]:
        inputs_LTH: list[torch.Tensor] = []

        def look(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            state = arguments[0].detach()
            inputs_LTH.append(state.reshape(-1, state.shape[-1]).float())

        handles = [gate.register_forward_pre_hook(look) for gate in self._gates]
        try:
            yield inputs_LTH
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _forced(self, path: Route) -> Iterator[None]:
        handles = [gate.register_forward_hook(partial(_overrule, path=path, experts=self.experts)) for gate in self._gates]
        chosen = {block: block.top_k for block in self._blocks}
        try:
            for block in self._blocks:
                block.top_k = self.experts  # transformers 4 chooses here
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block, top_k in chosen.items():
                block.top_k = top_k


def _overrule(module: Any, arguments: Any, output: Any, *, path: Route, experts: int) -> Any:
    """The router's output as it would be if it chose `path` for each token."""
    import torch

    if isinstance(output, torch.Tensor):  # transformers 4: logits, whose softmax the block takes
        if path is None:
            return torch.zeros_like(output)
        forced = torch.full_like(output, -torch.inf)
        forced[..., path] = 0
        return forced
    logits_TE, weights_TK, chosen_TK = output
    if path is None:
        every_E = torch.arange(experts, dtype=chosen_TK.dtype, device=chosen_TK.device)
        chosen = every_E.repeat(len(chosen_TK), 1)
    else:
        chosen = torch.full_like(chosen_TK[:, :1], path)
    weights = torch.full(chosen.shape, 1 / chosen.shape[1], dtype=weights_TK.dtype, device=weights_TK.device)
    return logits_TE, weights, chosen


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"moe.router.device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def _load(folder: Path, dtype: Any) -> Any:
    import transformers
    from transformers.utils import logging as untyped

    logging: Any = untyped
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        keyword = "dtype" if int(version("transformers").split(".")[0]) >= 5 else "torch_dtype"
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **{keyword: dtype})
    finally:
        if shown:
            logging.enable_progress_bar()
