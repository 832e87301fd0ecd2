"""Generation: the routing of the prompt stays for all that is generated."""

from __future__ import annotations

from typing import Any

from .cache_moerge import MoergeCache
from .versions_moerge import CACHE, GenerationMixin, check_overrides


class MoergeGenerationMixin:
    """Keeps the routing in the cache, or beside the inputs where there is none; turns away what cannot work."""

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} cannot hold the caches of several experts: "
                "leave it out"
            )
        if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            cache = self.model.new_cache()  # type: ignore[attr-defined]
            if cache is None:  # an expert can keep none: all tokens run again for each new one
                generation_config.use_cache = False
                return None
            model_kwargs[CACHE] = cache
            if generation_config.is_assistant:
                cache.activate_past_recording()
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

    def _prefill(self, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        cache = model_kwargs.get(CACHE)
        routed = model_kwargs.get("routing") is not None or (cache is not None and cache.is_initialized)
        if generation_config.prefill_chunk_size is not None and not routed:
            raise ValueError(
                "prefill_chunk_size would route by the first chunk of the prompt alone: "
                "leave it out, or pass routing=model.route(input_ids, attention_mask)"
            )
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

    def _assisted_decoding(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE)
        if isinstance(cache, MoergeCache) and not cache.is_initialized:
            # the first forward pass already has guessed tokens behind the prompt: they must not take part in routing
            routing = kwargs.pop("routing", None)
            model: Any = self
            if routing is None:
                routing = model.route(input_ids, kwargs.get("attention_mask"), prompt_mask=kwargs.get("prompt_mask"))
            cache.begin(routing, apart=model.config.streams_apart)
        return super()._assisted_decoding(input_ids, *args, **kwargs)  # type: ignore[misc]

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if outputs.get(CACHE) is None:
            model_kwargs["routing"] = outputs.routing
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)  # type: ignore[misc]

    def _expand_inputs_for_generation(self, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("routing") is not None:
            kwargs["routing"] = kwargs["routing"].repeat(expand_size)
        return super()._expand_inputs_for_generation(expand_size, *args, **kwargs)  # type: ignore[misc]


check_overrides(MoergeGenerationMixin, GenerationMixin)
