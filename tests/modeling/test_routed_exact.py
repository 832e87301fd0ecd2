"""What the sequence-routed model computes, against dense models and slow loops written from the formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moerge.modeling import MoergeForCausalLM
from tests.modeling.routed_models import LAYOUTS, NAMES, dense_experts, dense_path, padded, prompts, routed

pytestmark = pytest.mark.slow

FAMILIES = [
    ("llama", False),
    ("llama", True),
    ("mistral", False),
    ("qwen2", False),
    ("qwen2", True),
    ("qwen3", False),
]
MIXES = ("layer", "output", "logits")


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
@torch.no_grad()
def test_a_fixed_expert_with_everything_separate_is_that_dense_expert(family: str, tied: bool) -> None:
    dense = dense_experts(family, tied=tied)
    ids = torch.stack(prompts(11, 11))
    model = routed(dense, routing={"kind": "fixed", "expert": "math"})
    expected = dense[1](ids).logits
    assert (expected - dense[0](ids).logits).abs().max() > 0.1
    for mix in ("layer", "output"):
        model.config.mix = mix
        close(model(ids).logits, expected)
    model.config.mix = "logits"
    close(model(ids).logits, expected.log_softmax(-1))


@pytest.mark.parametrize("separate", LAYOUTS)
@torch.no_grad()
def test_uniform_output_mixing_is_the_mean_of_the_experts_final_states_through_the_head(separate: list[str]) -> None:
    model = routed(separate=separate, mix="output", routing={"kind": "uniform"})
    ids = torch.stack(prompts(8, 8))
    paths = [dense_path(model, expert) for expert in range(3)]
    states = [path.model(ids).last_hidden_state for path in paths]
    if "head" in separate:  # each state through its own head: the same as the formula where the head is shared
        expected = sum(path.lm_head(state) for path, state in zip(paths, states, strict=True)) / 3
    else:
        expected = paths[0].lm_head(sum(states) / 3)
    close(model(ids).logits, expected)


@pytest.mark.parametrize("separate", LAYOUTS)
@torch.no_grad()
def test_logit_mixing_is_the_log_of_the_mixed_probabilities(separate: list[str]) -> None:
    model = routed(separate=separate, mix="logits")
    ids = torch.stack(prompts(8, 8, 8, seed=3))
    out = model(ids)
    probabilities = torch.stack([dense_path(model, expert)(ids).logits.softmax(-1) for expert in range(3)], -1)
    close(out.logits, (probabilities * out.routing.alpha[:, None, None, :]).sum(-1).log())
    assert ((out.routing.alpha > 0).sum(1) == 2).all()


def layer_mix(model: MoergeForCausalLM, ids_T: Tensor, alpha_E: Tensor) -> Tensor:
    """One sequence, from the formula: at every layer the chosen experts' outputs are summed with alpha on one stream."""
    weights = {expert: weight for expert, weight in enumerate(alpha_E.tolist()) if weight}
    paths = {expert: dense_path(model, expert) for expert in weights}
    h = sum(weight * paths[e].model.embed_tokens(ids_T[None]) for e, weight in weights.items())
    rope = next(iter(paths.values())).model.rotary_emb(h, torch.arange(len(ids_T))[None])
    for layer in range(model.config.num_hidden_layers):
        blocks = {e: path.model.layers[layer] for e, path in paths.items()}
        h = h + sum(
            weight
            * blocks[e].self_attn(hidden_states=blocks[e].input_layernorm(h), position_embeddings=rope, attention_mask=None)[0]
            for e, weight in weights.items()
        )
        h = h + sum(weight * blocks[e].mlp(blocks[e].post_attention_layernorm(h)) for e, weight in weights.items())
    return sum(weight * paths[e].lm_head(paths[e].model.norm(h)) for e, weight in weights.items())[0]


@pytest.mark.parametrize("separate", [*LAYOUTS, ["norm"], ["attention"], ["embedding", "head"]])
@torch.no_grad()
def test_layer_mixing_is_the_slow_loop(separate: list[str]) -> None:
    model = routed(separate=separate, routing={"kind": "random"})
    ids = torch.stack(prompts(7, 7, 7, seed=1))
    out = model(ids)
    assert len({tuple(row) for row in (out.routing.alpha > 0).tolist()}) > 1  # not all rows have the same experts
    close(out.logits, torch.stack([layer_mix(model, *row) for row in zip(ids, out.routing.alpha, strict=True)]))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_a_batch_equals_its_rows_one_by_one(family: str, mix: str, side: str) -> None:
    model = routed(dense_experts(family), separate=["ffn", "attention"], mix=mix)
    rows = prompts(9, 5, 6, 1, seed=4)
    ids, mask = padded(rows, side)
    out = model(ids, attention_mask=mask)
    assert len({tuple(row) for row in (out.routing.alpha > 0).tolist()}) > 1
    for row, sequence in enumerate(rows):
        alone = model(sequence[None])
        torch.testing.assert_close(out.routing.alpha[row], alone.routing.alpha[0])
        close(out.logits[row, mask[row].bool()], alone.logits[0])


@torch.no_grad()
def test_task_vector_routing_of_a_batch_equals_its_rows_one_by_one() -> None:
    model = routed(separate=["ffn", "attention"], routing={"kind": "task_vector"})
    rows = prompts(7, 4, 1, seed=2)
    for side in ("left", "right"):
        routing = model.route(*padded(rows, side))
        for row, sequence in enumerate(rows):
            close(routing.scores[row], model.route(sequence[None]).scores[0])


@torch.no_grad()
def test_eager_attention_equals_sdpa() -> None:
    model = routed(dense_experts("mistral"), separate=["ffn", "attention"])
    ids, mask = padded(prompts(9, 6), "left")
    expected = model(ids, attention_mask=mask).logits
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.model.layers[0].self_attn[1].config._attn_implementation == "eager"
    close(model(ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_a_single_expert_per_sequence_is_its_path_whatever_the_mix() -> None:
    model = routed(separate=["ffn"], routing={"kind": "perplexity", "top_k": 1})
    ids = torch.stack(prompts(6, 6, 6, 6, seed=5))
    out = model(ids)
    chosen = out.routing.alpha.argmax(-1).tolist()
    assert len(set(chosen)) > 1
    paths = [dense_path(model, expert) for expert in range(3)]
    close(out.logits, torch.cat([paths[expert](row[None]).logits for expert, row in zip(chosen, ids, strict=True)]))
    with torch.enable_grad():  # the same on one stream, which is what runs when gradients are wanted
        close(model(ids).logits.detach(), out.logits)


@torch.no_grad()
def test_a_given_routing_is_used_as_it_is() -> None:
    model = routed(mix="output")
    ids = torch.stack(prompts(6, 6))
    routing = model.route(ids)
    model.set_routing("fixed", expert="code")
    assert not torch.allclose(model(ids).logits, model(ids, routing=routing).logits)
    model.set_routing("perplexity")
    close(model(ids, routing=routing).logits, model(ids).logits)


@torch.no_grad()
def test_only_the_last_logits_are_computed_when_asked() -> None:
    model = routed(mix="logits")
    ids = torch.stack(prompts(6, 6))
    every = model(ids).logits
    close(model(ids, logits_to_keep=1).logits, every[:, -1:])
    close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, every[:, [0, 3]])


@torch.no_grad()
def test_embeddings_instead_of_tokens() -> None:
    model = routed(separate=["ffn"], routing={"kind": "uniform"})
    ids = torch.stack(prompts(6, 6))
    embeds = model.get_input_embeddings()(ids)
    close(model(inputs_embeds=embeds).logits, model(ids).logits)
    model.set_routing("perplexity")
    with pytest.raises(ValueError, match="this routing reads the prompt's tokens: pass input_ids, or a routing"):
        model(inputs_embeds=embeds)
    close(model(inputs_embeds=embeds, routing=model.route(ids)).logits, model(ids).logits)
    with pytest.raises(ValueError, match="pass either input_ids or inputs_embeds"):
        model()


def test_what_it_cannot_return_is_refused() -> None:
    model = routed(routing={"kind": "fixed", "expert": NAMES[0]})
    ids = torch.stack(prompts(4))
    for flag in ("output_attentions", "output_hidden_states"):
        with pytest.raises(ValueError, match="returns neither attentions nor hidden states"):
            model(ids, **{flag: True})
    assert len(model(ids, return_dict=False)) == 3  # logits, cache, routing
