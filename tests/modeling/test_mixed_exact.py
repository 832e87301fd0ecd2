"""What the model of different architectures computes, against its experts alone and slow loops written from the formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moerge.modeling import MoergeHeterogeneousForCausalLM
from tests.modeling.mixed_models import CONFIGS, FOUR, expert, mixed, positions
from tests.modeling.routed_models import padded, prompts

pytestmark = pytest.mark.slow

EXACT = [family for family in CONFIGS if family != "gemma2"]
"""What can be written as a head on final states: Gemma 2 caps its logits."""


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def alone(family: str, ids: Tensor, mask: Tensor) -> Tensor:
    model = expert(family)
    return model(ids, attention_mask=mask, use_cache=False, **positions(model, mask)).logits


@pytest.mark.parametrize("family", list(CONFIGS))
@torch.no_grad()
def test_an_expert_with_its_own_embedding_is_that_model(family: str) -> None:
    model = mixed(family, embedding="separate", routing={"kind": "uniform"})
    ids, mask = padded(prompts(9, 6), "left")
    out = model(ids, attention_mask=mask)
    close(out.logits[mask.bool()], alone(family, ids, mask).log_softmax(-1)[mask.bool()])
    ids = torch.stack(prompts(7, 7))
    close(model(ids).logits, expert(family)(ids).logits.log_softmax(-1))


@pytest.mark.parametrize("family", EXACT)
@torch.no_grad()
def test_an_expert_between_its_own_tables_and_exact_projectors_is_that_model(family: str) -> None:
    model = mixed(family, exact=True, routing={"kind": "uniform"})
    ids, mask = padded(prompts(9, 6), "left")
    close(model(ids, attention_mask=mask).logits[mask.bool()], alone(family, ids, mask)[mask.bool()])


def path(model: MoergeHeterogeneousForCausalLM, number: int, family: str, ids: Tensor) -> Tensor:
    """r_i of the paper's section 3.2, from the tensors alone."""
    tensors = model.state_dict()

    def project(side: str, x: Tensor) -> Tensor:
        w = {part: tensors[f"model.projectors_{side}.{number}.{part}"] for part in ("up.weight", "up.bias")}
        w |= {part: tensors[f"model.projectors_{side}.{number}.{part}"] for part in ("down.weight", "down.bias")}
        up = x @ w["up.weight"].T + w["up.bias"]
        gelu = up * 0.5 * (1 + torch.erf(up / 2**0.5))
        out = gelu @ w["down.weight"].T + w["down.bias"]
        if f"model.projectors_{side}.{number}.linear.weight" in tensors:
            linear = (tensors[f"model.projectors_{side}.{number}.linear.{part}"] for part in ("weight", "bias"))
            out = out + x @ next(linear).T + next(linear)
        return out

    dense = expert(family, number)
    states = dense.base_model(inputs_embeds=project("in", tensors["model.embed_tokens.weight"][ids])).last_hidden_state
    return project("out", states)


@pytest.mark.parametrize("linear", [True, False])
@torch.no_grad()
def test_the_shared_head_reads_the_weighted_sum_of_the_projected_states(linear: bool) -> None:
    model = mixed(*FOUR, routing={"kind": "learned", "top_k": 3}, projectors={"linear": linear, "width": 6})
    ids = torch.stack(prompts(8, 8, 8, seed=1))
    out = model(ids)
    alpha = out.routing.alpha
    assert len({tuple(row) for row in (alpha > 0).tolist()}) > 1 and ((alpha > 0).sum(1) == 3).all()
    states = torch.stack([path(model, number, family, ids) for number, family in enumerate(FOUR)], -1)
    close(out.logits, (states * alpha[:, None, None]).sum(-1) @ model.lm_head.weight.T)
    assert ("model.projectors_in.1.linear.weight" in model.state_dict()) == linear


@torch.no_grad()
def test_separate_embeddings_mix_probabilities() -> None:
    model = mixed(*FOUR, embedding="separate", routing={"kind": "learned", "top_k": 2})
    ids = torch.stack(prompts(8, 8, 8, seed=2))
    out = model(ids)
    p = torch.stack([expert(family, seed)(ids).logits.softmax(-1) for seed, family in enumerate(FOUR)], -1)
    close(out.logits, (p * out.routing.alpha[:, None, None]).sum(-1).log())


@pytest.mark.parametrize("embedding", ["shared", "separate"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@torch.no_grad()
def test_two_experts_that_are_the_same_model_give_that_model_whichever_is_chosen(family: str, embedding: str) -> None:
    model = mixed(expert(family), expert(family), embedding=embedding, exact=True)
    ids, mask = padded(prompts(9, 5), "left")
    expected = alone(family, ids, mask)
    expected = expected.log_softmax(-1) if embedding == "separate" else expected
    for kind, options in (("fixed", {"expert": "math"}), ("fixed", {"expert": "code"}), ("perplexity", {}), ("random", {})):
        model.set_routing(kind, **options)
        close(model(ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("embedding", ["shared", "separate"])
@torch.no_grad()
def test_a_batch_equals_its_rows_one_by_one(embedding: str, side: str) -> None:
    model = mixed("llama", "bloom", "gpt2", "mistral", embedding=embedding, routing={"kind": "perplexity", "prefix_tokens": 4})
    rows = prompts(9, 5, 3, 1, seed=4)
    ids, mask = padded(rows, side)
    out = model(ids, attention_mask=mask)
    assert len({tuple(row) for row in (out.routing.alpha > 0).tolist()}) > 1
    for row, sequence in enumerate(rows):
        single = model(sequence[None])
        torch.testing.assert_close(out.routing.alpha[row], single.routing.alpha[0])
        close(out.logits[row, mask[row].bool()], single.logits[0])


@torch.no_grad()
def test_the_attention_implementation_reaches_every_expert() -> None:
    model = mixed("llama", "gpt_neox", "mistral", "bloom", routing={"kind": "uniform"})
    ids, mask = padded(prompts(9, 6), "left")
    expected = model(ids, attention_mask=mask).logits[mask.bool()]

    def used() -> list[str]:
        return [one.config._attn_implementation for one in model.model.experts]

    assert model.config._attn_implementation == "sdpa" and used() == ["sdpa", "sdpa", "sdpa", "eager"]  # Bloom has its own
    model.set_attn_implementation("eager")
    assert used() == ["eager"] * 4
    close(model(ids, attention_mask=mask).logits[mask.bool()], expected)
    config = model.config
    config._attn_implementation = "eager"
    assert {one.config._attn_implementation for one in MoergeHeterogeneousForCausalLM(config).model.experts} == {"eager"}


@pytest.mark.parametrize("embedding", ["shared", "separate"])
@torch.no_grad()
def test_only_the_logits_that_are_asked_for_are_computed(embedding: str) -> None:
    model = mixed("llama", "openai-gpt", embedding=embedding, routing={"kind": "uniform"})
    ids = torch.stack(prompts(6, 6))
    every = model(ids).logits
    for kind in ("uniform", "perplexity"):
        model.set_routing(kind)
        every = model(ids).logits
        close(model(ids, logits_to_keep=1).logits, every[:, -1:])
        close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, every[:, [0, 3]])


@torch.no_grad()
def test_embeddings_instead_of_tokens() -> None:
    model = mixed("llama", "gpt2", routing={"kind": "learned"})
    ids = torch.stack(prompts(6, 6))
    close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)
    model.set_routing("perplexity")
    with pytest.raises(ValueError, match="this routing reads the prompt's tokens: pass input_ids, or a routing"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    model = mixed("llama", "gpt2", embedding="separate", routing={"kind": "learned"})
    embeds = model.get_input_embeddings()(ids)
    message = "every expert has its own embedding and head: pass input_ids, not inputs_embeds"
    for options in ({}, {"routing": model.route(ids)}):
        with pytest.raises(ValueError, match=message):
            model(inputs_embeds=embeds, **options)


@torch.no_grad()
def test_the_model_without_a_head() -> None:
    model = mixed("llama", "gpt_neox", routing={"kind": "uniform"})
    ids = torch.stack(prompts(5, 5))
    close(model.lm_head(model.model(ids).last_hidden_state), model(ids).logits)
    model = mixed("llama", "gpt_neox", embedding="separate", routing={"kind": "uniform"})
    with pytest.raises(ValueError, match="so there are no common states: use the causal LM"):
        model.model(ids)


def test_what_it_cannot_return_is_refused() -> None:
    model = mixed("llama", "gpt2", routing={"kind": "uniform"})
    ids = torch.stack(prompts(4))
    for flag in ("output_attentions", "output_hidden_states"):
        with pytest.raises(ValueError, match="returns neither attentions nor hidden states"):
            model(ids, **{flag: True})
    assert len(model(ids, return_dict=False)) == 3  # logits, cache, routing
