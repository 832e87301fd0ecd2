"""Generation with experts of different architectures: the cache changes nothing, only chosen experts run, each on its rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from moerge.modeling import MoergeHeterogeneousForCausalLM, Routing
from moerge.modeling.experts_moerge import MoergeHeterogeneousCache
from moerge.modeling.versions_moerge import CACHE
from tests.modeling.mixed_models import FOUR, expert, mixed
from tests.modeling.routed_models import check_cache, padded, prompts

pytestmark = pytest.mark.slow

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
}
MIXES = {
    "four": FOUR,
    "windows": ("gemma2", "mistral", "gemma3_text"),
    "positions": ("gpt2", "bloom", "mpt", "opt"),
    "states": ("mamba", "lfm2", "falcon_h1", "llama"),
}


def generate(
    model: MoergeHeterogeneousForCausalLM, ids: Tensor, mask: Tensor | None = None, *, tokens: int = 6, **options: Any
) -> Any:
    torch.manual_seed(0)
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": tokens, **options}
    return model.generate(ids, attention_mask=mask, **options)


def model_of(mix: str, embedding: str = "shared", kind: str = "random") -> MoergeHeterogeneousForCausalLM:
    return mixed(*MIXES[mix], embedding=embedding, routing={"kind": kind, "prefix_tokens": 5})


def assert_apart(model: MoergeHeterogeneousForCausalLM, ids: Tensor, mask: Tensor) -> None:
    assert len({tuple(row) for row in (model.route(ids, mask).alpha > 0).tolist()}) > 1


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize(
    ("mix", "embedding", "kind"),
    [
        ("four", "shared", "perplexity"),
        ("four", "separate", "learned"),
        ("windows", "separate", "perplexity"),
        ("positions", "shared", "random"),
        ("states", "shared", "learned"),
    ],
)
def test_the_cache_changes_nothing(mix: str, embedding: str, kind: str, way: str) -> None:
    model = model_of(mix, embedding, kind)
    ids, mask = padded(prompts(6, 3, 5), "left")
    assert_apart(model, ids, mask)
    cached = generate(model, ids, mask, **WAYS[way])
    assert torch.equal(cached, generate(model, ids, mask, use_cache=False, **WAYS[way]))
    assert cached.shape == (3 * WAYS[way].get("num_return_sequences", 1), 12)


@pytest.mark.parametrize("way", ["greedy", "beam"])
@pytest.mark.parametrize("mix", list(MIXES))
def test_a_left_padded_batch_equals_each_prompt_alone(mix: str, way: str) -> None:
    model = model_of(mix)
    rows = prompts(7, 3, 5, seed=1)
    ids, mask = padded(rows, "left")
    assert_apart(model, ids, mask)
    batch = generate(model, ids, mask, **WAYS[way])
    alone = torch.cat([generate(model, row[None], **WAYS[way])[:, len(row) :] for row in rows])
    assert torch.equal(batch[:, ids.shape[1] :], alone)


@pytest.mark.parametrize("family", ["mistral", "gpt2", "bloom", "mamba", "openai-gpt"])
def test_one_expert_generates_what_that_model_generates(family: str) -> None:
    dense = expert(family)
    ids, mask = padded(prompts(9, 9 if family == "openai-gpt" else 5), "left")
    expected = generate(dense, ids, mask, num_beams=2)
    for embedding in ("shared", "separate"):
        model = mixed(family, embedding=embedding, exact=True, routing={"kind": "uniform"})
        assert torch.equal(generate(model, ids, mask, num_beams=2), expected)


@torch.no_grad()
def test_cached_logits_are_those_of_the_whole_sequence_under_the_prompts_routing() -> None:
    for mix, embedding in (("windows", "shared"), ("four", "separate"), ("positions", "shared")):
        model = model_of(mix, embedding, "perplexity")
        ids, mask = padded(prompts(12, 9), "left")
        first = model(ids[:, :7], attention_mask=mask[:, :7])
        whole = model(ids, attention_mask=mask, routing=first.routing, use_cache=False)
        assert whole.get(CACHE) is None
        second = model(ids[:, 7:10], attention_mask=mask[:, :10], **{CACHE: first[CACHE]})
        third = model(ids[:, 10:], attention_mask=mask, **{CACHE: first[CACHE]})
        logits = torch.cat([first.logits, second.logits, third.logits], 1)
        torch.testing.assert_close(logits[mask.bool()], whole.logits[mask.bool()], atol=1e-5, rtol=1e-5)
        assert torch.equal(third.routing.alpha, first.routing.alpha)
        assert first[CACHE].get_seq_length() == 12
        assert repr(first[CACHE]).endswith("lanes, 12 tokens, 2 sequences)")


@torch.no_grad()
def test_each_lane_is_the_cache_that_the_experts_own_forward_makes() -> None:
    model = mixed("mistral", "mamba", "llama", routing={"kind": "uniform"})
    ids = torch.stack(prompts(6, 6))
    cache = model(ids)[CACHE]
    for lane, one in zip(cache.lanes, model.model.experts, strict=True):
        own = one.base_model(inputs_embeds=torch.zeros(2, 6, one.config.hidden_size), use_cache=True)
        made = own.get(CACHE, own.get("cache_params"))
        assert type(lane.cache) is type(made) and [type(layer) for layer in lane.cache.layers] == [type(x) for x in made.layers]
        assert len(lane) == len(made) and lane.length == 6


@torch.no_grad()
def test_only_chosen_experts_run_and_each_on_its_own_rows() -> None:
    model = mixed(*FOUR, routing={"kind": "fixed", "expert": "math"})
    ids = torch.stack(prompts(5, 5, 5))
    rows: dict[int, list[int]] = {}
    for number, one in enumerate(model.model.experts):
        for projector in (model.model.projectors_in[number], one.base_model.layers[1].mlp):
            projector.register_forward_hook(lambda _, inputs, __, n=number: rows.setdefault(n, []).append(len(inputs[0])))
    model(ids)
    assert rows == {0: [3, 3]}
    rows.clear()
    alpha = torch.tensor([[0.0, 1, 0, 0], [0, 0.5, 0, 0.5], [0, 1, 0, 0]])
    cache = model(ids, routing=Routing(alpha, alpha, ""))[CACHE]
    assert rows == {1: [3, 3], 3: [1, 1]}
    assert [len(lane.cache.layers[0].keys) for lane in cache.lanes] == [3, 1]
    rows.clear()
    model(ids[:, :1], **{CACHE: cache})
    assert rows == {1: [3, 3], 3: [1, 1]}


def test_the_routing_pass_is_the_prefill_if_it_reads_the_whole_prompt() -> None:
    calls: list[int] = []
    for prefix, prefills in ((64, [0, 1, 2, 3]), (4, [0, 1, 2, 3, 0, 3])):
        model = mixed(*FOUR, routing={"kind": "perplexity", "prefix_tokens": prefix})
        ids = torch.stack(prompts(6, seed=3))
        chosen = model.route(ids).alpha[0].nonzero()[:, 0].tolist()
        for number, one in enumerate(model.model.experts):
            one.base_model.register_forward_hook(lambda _, __, ___, n=number: calls.append(n))
        calls.clear()
        generate(model, ids, tokens=3)
        steps = 2 * chosen
        assert calls == [0, 1, 2, 3, *([] if len(prefills) == 4 else chosen), *steps]


@torch.no_grad()
def test_the_cache_selects_repeats_and_forgets_rows_and_tokens() -> None:
    for mix in ("four", "positions", "states"):
        check_cache(model_of(mix), crops=mix != "states")


@pytest.mark.parametrize("mix", ["four", "windows"])
def test_prompt_lookup_gives_the_same_text(mix: str) -> None:
    """Assisted decoding tries tokens and takes some back: the caches have to go back too, sliding windows included."""
    model = model_of(mix, kind="perplexity")
    ids = torch.stack(prompts(4)).repeat(1, 3)
    found = generate(model, ids, prompt_lookup_num_tokens=3, tokens=12, return_dict_in_generate=True)
    assert torch.equal(found.sequences, generate(model, ids, tokens=12))
    torch.testing.assert_close(found[CACHE].routing.scores, model.route(ids).scores)  # guesses take no part
    mask = torch.zeros_like(ids)
    mask[:, 8:] = 1
    looked_up = generate(model, ids, prompt_lookup_num_tokens=3, prompt_mask=mask)
    assert torch.equal(looked_up, generate(model, ids, routing=model.route(ids, prompt_mask=mask)))
    dense = expert("llama")
    assert torch.equal(generate(model, ids, assistant_model=dense), generate(model, ids))
    assert torch.equal(generate(dense, ids, assistant_model=model), generate(dense, ids))


def test_a_prompt_in_chunks_needs_a_routing() -> None:
    model = model_of("four", kind="perplexity")
    ids = torch.stack(prompts(9))
    with pytest.raises(ValueError, match="prefill_chunk_size would route by the first chunk of the prompt alone"):
        generate(model, ids, prefill_chunk_size=4)
    assert torch.equal(generate(model, ids, prefill_chunk_size=4, routing=model.route(ids)), generate(model, ids))


def test_generating_from_embeddings() -> None:
    model = model_of("four", kind="learned")
    ids = torch.stack(prompts(6, 6))
    expected = generate(model, ids)[:, 6:]
    assert torch.equal(generate(model, None, torch.ones(2, 6), inputs_embeds=model.get_input_embeddings()(ids)), expected)


def test_an_expert_that_keeps_no_cache_is_run_without_one() -> None:
    model = mixed("llama", "openai-gpt", routing={"kind": "uniform"})
    ids = torch.stack(prompts(6, 6))
    assert model(ids, use_cache=True).get(CACHE) is None
    text = generate(model, ids, num_beams=2, return_dict_in_generate=True)
    assert text.get(CACHE) is None
    expected = ids
    for _ in range(3):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generate(model, ids, tokens=3), expected)


def test_other_caches_are_refused() -> None:
    model = model_of("four")
    ids = torch.stack(prompts(4))
    with pytest.raises(ValueError, match="cache_implementation='static' cannot hold the caches of several experts"):
        generate(model, ids, cache_implementation="static")
    with pytest.raises(TypeError, match=f"{CACHE} should be a MoergeCache, not DynamicCache: leave it out to get one"):
        model(ids, **{CACHE: DynamicCache()})
    with pytest.raises(TypeError, match="only a moerge model can fill it"):
        MoergeHeterogeneousCache(model.model.experts).update(ids, ids, 0)


@pytest.mark.parametrize("family", ["mamba", "lfm2", "falcon_h1", "mistral", "llama4_text"])
@torch.no_grad()
def test_several_tokens_more_equal_the_whole_sequence(family: str) -> None:
    """Experts with states start anew where their own forward gets several tokens at once."""
    for embedding in ("shared", "separate"):
        model = mixed(family, "llama", embedding=embedding, routing={"kind": "uniform"})
        ids, mask = padded(prompts(12, 9), "left")
        first = model(ids[:, :7], attention_mask=mask[:, :7])
        second = model(ids[:, 7:], attention_mask=mask, **{CACHE: first[CACHE]}, logits_to_keep=4)
        whole = model(ids, attention_mask=mask, use_cache=False)
        torch.testing.assert_close(second.logits, whole.logits[:, -4:], atol=1e-5, rtol=1e-5)
        assert second[CACHE].get_seq_length() == 12


def test_states_cannot_be_taken_back() -> None:
    model = mixed("mamba", "llama", routing={"kind": "uniform"})
    with pytest.raises(ValueError, match=r"assist|Assist|cropped"):
        generate(model, torch.stack(prompts(4)).repeat(1, 3), prompt_lookup_num_tokens=3)
