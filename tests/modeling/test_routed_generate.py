"""Generation: the routing of the prompt stays, the cache changes nothing but the work, only chosen experts run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from moerge.modeling import MoergeCache, MoergeForCausalLM
from moerge.modeling.versions_moerge import CACHE
from tests.modeling.routed_models import check_cache, counting, dense_experts, dense_path, padded, prompts, routed

pytestmark = pytest.mark.slow

SETTINGS = [
    ("layer", ["ffn"], "perplexity"),
    ("layer", ["ffn", "attention"], "random"),
    ("output", ["ffn"], "perplexity"),
    ("logits", ["ffn", "attention"], "perplexity"),
]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
}


def generate(model: MoergeForCausalLM, ids: Tensor, mask: Tensor | None = None, *, tokens: int = 7, **options: Any) -> Tensor:
    torch.manual_seed(0)
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": tokens, **options}
    return model.generate(ids, attention_mask=mask, **options)


def different_experts(model: MoergeForCausalLM, ids: Tensor, mask: Tensor) -> bool:
    return len({tuple(row) for row in (model.route(ids, mask).alpha > 0).tolist()}) > 1


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize(("mix", "separate", "kind"), SETTINGS)
def test_the_cache_changes_nothing(mix: str, separate: list[str], kind: str, way: str) -> None:
    model = routed(separate=separate, mix=mix, routing={"kind": kind})
    ids, mask = padded(prompts(6, 3, 5), "left")
    assert different_experts(model, ids, mask)
    cached = generate(model, ids, mask, **WAYS[way])
    assert torch.equal(cached, generate(model, ids, mask, use_cache=False, **WAYS[way]))
    assert cached.shape == (3 * WAYS[way].get("num_return_sequences", 1), 13)


@pytest.mark.parametrize("way", ["greedy", "beam"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("mix", ["layer", "output"])
def test_a_left_padded_batch_equals_each_prompt_alone(family: str, way: str, mix: str) -> None:
    model = routed(dense_experts(family), separate=["ffn", "attention"], mix=mix)
    rows = prompts(7, 3, 5, seed=1)
    ids, mask = padded(rows, "left")
    assert different_experts(model, ids, mask)
    batch = generate(model, ids, mask, **WAYS[way])
    alone = torch.cat([generate(model, row[None], **WAYS[way])[:, len(row) :] for row in rows])
    assert torch.equal(batch[:, ids.shape[1] :], alone)


@pytest.mark.parametrize(("mix", "separate", "kind"), SETTINGS)
@torch.no_grad()
def test_cached_logits_are_those_of_the_whole_sequence_under_the_prompts_routing(
    mix: str, separate: list[str], kind: str
) -> None:
    model = routed(dense_experts("qwen2"), separate=separate, mix=mix, routing={"kind": kind})
    ids, mask = padded(prompts(12, 9), "left")
    first = model(ids[:, :7], attention_mask=mask[:, :7])
    routing = first.routing
    whole = model(ids, attention_mask=mask, routing=routing, use_cache=False)
    assert whole.get(CACHE) is None and whole.routing is not None
    assert not torch.equal(routing.alpha, model.route(ids, mask).alpha)
    second = model(ids[:, 7:10], attention_mask=mask[:, :10], **{CACHE: first[CACHE]})
    third = model(ids[:, 10:], attention_mask=mask, **{CACHE: first[CACHE]})
    logits = torch.cat([first.logits, second.logits, third.logits], 1)
    torch.testing.assert_close(logits[mask.bool()], whole.logits[mask.bool()], atol=1e-5, rtol=1e-5)
    assert torch.equal(third.routing.alpha, routing.alpha)
    assert first[CACHE].get_seq_length() == 12 and len(first[CACHE]) == 2
    assert repr(first[CACHE]).endswith("lanes, 12 tokens, 2 sequences)")


@torch.no_grad()
def test_without_padding_no_mask_is_needed() -> None:
    model = routed(mix="output")
    ids = torch.stack(prompts(8, 8))
    first = model(ids[:, :5])
    second = model(ids[:, 5:], **{CACHE: first[CACHE]})
    whole = model(ids, routing=first.routing, use_cache=False)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole.logits, atol=1e-5, rtol=1e-5)


def test_a_conversation_goes_on_with_the_routing_of_its_first_prompt() -> None:
    model = routed(separate=["ffn"])
    ids = torch.stack(prompts(5))
    first = generate(model, ids, return_dict_in_generate=True)
    cache, more = first[CACHE], torch.cat([first.sequences, torch.stack(prompts(4, seed=9))], 1)
    again = generate(model, more, **{CACHE: cache}, tokens=4)
    assert torch.equal(again, generate(model, more, routing=model.route(ids), tokens=4))
    assert torch.equal(cache.routing.alpha, model.route(ids).alpha)


def test_a_given_routing_is_used_throughout() -> None:
    model = routed()
    ids, mask = padded(prompts(6, 4), "left")
    expected = generate(model, ids, mask, num_beams=2)
    routing = model.route(ids, mask)
    model.set_routing("fixed", expert="base")
    assert not torch.equal(generate(model, ids, mask, num_beams=2), expected)
    for use_cache in (True, False):
        assert torch.equal(generate(model, ids, mask, num_beams=2, routing=routing, use_cache=use_cache), expected)


@pytest.mark.parametrize("mix", ["layer", "output"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_prompt_lookup_gives_the_same_text(family: str, mix: str) -> None:
    """Assisted decoding tries tokens and takes some back: the cache has to go back too, sliding windows included."""
    model = routed(dense_experts(family), separate=["ffn", "attention"], mix=mix)
    ids = torch.stack(prompts(4)).repeat(1, 3)
    found = generate(model, ids, prompt_lookup_num_tokens=3, tokens=12, return_dict_in_generate=True)
    assert torch.equal(found.sequences, generate(model, ids, tokens=12))
    torch.testing.assert_close(found[CACHE].routing.scores, model.route(ids).scores)  # guesses take no part
    model.set_routing("fixed", expert="code")
    routing = model.route(ids)
    expected = generate(model, ids)
    model.set_routing("uniform")
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3, routing=routing), expected)
    dense = dense_experts(family)[0]
    assert torch.equal(generate(model, ids, assistant_model=dense), generate(model, ids))
    assert torch.equal(generate(dense, ids, assistant_model=model), generate(dense, ids))


def test_a_prompt_in_chunks_needs_a_routing() -> None:
    model = routed()
    ids = torch.stack(prompts(9))
    with pytest.raises(ValueError, match="prefill_chunk_size would route by the first chunk of the prompt alone"):
        generate(model, ids, prefill_chunk_size=4)
    chunked = generate(model, ids, prefill_chunk_size=4, routing=model.route(ids))
    assert torch.equal(chunked, generate(model, ids))


def test_other_caches_are_refused() -> None:
    model = routed()
    ids = torch.stack(prompts(4))
    with pytest.raises(ValueError, match="cache_implementation='static' cannot hold the caches of several experts"):
        generate(model, ids, cache_implementation="static")
    with pytest.raises(TypeError, match=f"{CACHE} should be a MoergeCache, not DynamicCache: leave it out to get one"):
        model(ids, **{CACHE: DynamicCache()})
    with pytest.raises(TypeError, match="only a moerge model can fill it"):
        MoergeCache(model.config).update(ids, ids, 0)


@torch.no_grad()
def test_the_cache_selects_repeats_and_forgets_rows_and_tokens() -> None:
    for mix, separate, kind in SETTINGS:
        model = routed(separate=separate, mix=mix, routing={"kind": kind})
        check_cache(model)


def by_expert(calls: Counter[str], module: str) -> dict[int, int]:
    """Calls of each expert's modules of a kind, summed over the layers."""
    found: Counter[int] = Counter()
    for name, count in calls.items():
        if module in name:
            found[int(name.rsplit(".", 1)[1])] += count
    return dict(found)


@torch.no_grad()
def test_only_chosen_experts_run() -> None:
    model = routed(separate=["ffn"], routing={"kind": "random"})
    ids = torch.stack(prompts(6))
    chosen = model.route(ids).alpha[0].nonzero()[:, 0].tolist()
    with counting(model) as calls:
        model(ids)
    assert by_expert(calls, "mlp") == dict.fromkeys(chosen, 2)
    assert by_expert(calls, "self_attn") == {0: 2}  # shared: once a layer
    assert by_expert(calls, "lm_head") == {0: 1}
    for mix in ("output", "logits"):
        model.config.mix = mix
        with counting(model) as calls:
            model(ids)
        assert by_expert(calls, "mlp") == dict.fromkeys(chosen, 2)
        assert by_expert(calls, "self_attn") == {0: 4}  # one on each of two streams
    model.set_routing("fixed", expert="code")
    with counting(model) as calls:
        model(ids)
    assert by_expert(calls, "mlp") == {2: 2}


@torch.no_grad()
def test_an_expert_computes_only_its_own_rows() -> None:
    model = routed(routing={"kind": "fixed", "expert": "base"})
    ids = torch.stack(prompts(5, 5, 5))
    alpha = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0]])
    routing = model.route(ids)
    routing = type(routing)(alpha, alpha, "a test")
    rows: dict[str, int] = {}
    for name, module in model.named_modules():
        if name in ("model.layers.0.mlp.0", "model.layers.0.mlp.1", "model.layers.1.self_attn.1.q_proj"):
            module.register_forward_hook(lambda _, inputs, __, name=name: rows.update({name: len(inputs[0])}))
    cache = model(ids, routing=routing)[CACHE]
    assert rows == {"model.layers.0.mlp.0": 1, "model.layers.0.mlp.1": 2, "model.layers.1.self_attn.1.q_proj": 2}
    assert [len(lane.layers[0].keys) for lane in cache.lanes] == [1, 2]


@pytest.mark.parametrize(
    ("mix", "top_k", "prefills"), [("output", 2, 3), ("logits", 2, 3), ("layer", 1, 3), ("output", 3, 3), ("layer", 2, 5)]
)
def test_the_routing_pass_is_the_prefill_where_streams_are_apart(mix: str, top_k: int, prefills: int) -> None:
    """One pass an expert in all; on one joint stream the chosen experts run once more, together."""
    model = routed(separate=["ffn", "attention"], mix=mix, routing={"kind": "perplexity", "top_k": top_k})
    ids = torch.stack(prompts(6))
    with counting(model) as calls:
        generate(model, ids, tokens=1)
    assert sum(by_expert(calls, "mlp").values()) == 2 * prefills
    assert sum(by_expert(calls, "self_attn").values()) == 2 * prefills
    with counting(model) as calls:
        generate(model, ids, tokens=4)
    steps = 3 * top_k
    assert sum(by_expert(calls, "self_attn").values()) == 2 * (prefills + steps)
    with torch.no_grad(), counting(model) as calls:  # and without a cache
        model(ids, use_cache=False)
    assert sum(by_expert(calls, "mlp").values()) == 2 * prefills


def test_one_expert_generates_what_the_dense_model_generates() -> None:
    model = routed(dense_experts("mistral"), separate=["ffn"], routing={"kind": "fixed", "expert": "code"})
    ids, mask = padded(prompts(9, 5), "left")
    expected = generate(dense_path(model, 2), ids, mask, num_beams=2)
    for mix in ("layer", "output", "logits"):
        model.config.mix = mix
        assert torch.equal(generate(model, ids, mask, num_beams=2), expected)
