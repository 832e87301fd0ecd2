"""What routing reads: the prompt, its first tokens or everything, and each kind against its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moerge.modeling import MoergeHeterogeneousForCausalLM
from moerge.modeling.routing_moerge import weigh
from tests.modeling.mixed_models import FOUR, expert, mixed
from tests.modeling.routed_models import padded, prompts

pytestmark = pytest.mark.slow

KINDS = ["perplexity", "random", "learned"]


def perplexities(model: MoergeHeterogeneousForCausalLM, ids_T: Tensor, end: int) -> list[float]:
    """1 / PPL of the first tokens under each expert's path."""
    found = []
    for name in model.config.expert_names:
        model.set_routing("fixed", expert=name)
        log_p = model(ids_T[None]).logits[0].log_softmax(-1)
        terms = [log_p[j - 1, ids_T[j]].item() for j in range(1, end)]
        found.append(math.exp(sum(terms) / len(terms)))
    return found


@pytest.mark.parametrize("embedding", ["shared", "separate"])
@torch.no_grad()
def test_perplexity_is_that_of_the_first_tokens_or_of_all(embedding: str) -> None:
    model = mixed(*FOUR, embedding=embedding, routing={"kind": "perplexity", "prefix_tokens": 4})
    rows = prompts(9, 6, 3)
    expected = {end: [perplexities(model, row, min(end, len(row))) for row in rows] for end in (4, 9)}
    for on, end in (("prefix", 4), ("sequence", 9)):
        model.set_routing("perplexity", on=on)
        for side in ("left", "right"):
            routing = model.route(*padded(rows, side))
            for row in range(3):
                assert routing.scores[row].tolist() == pytest.approx(expected[end][row], rel=1e-4)
        torch.testing.assert_close(routing.alpha, weigh(routing.scores, 2))
    assert routing.based_on == "1 / perplexity of the prompt under each expert"


@pytest.mark.parametrize("embedding", ["shared", "separate"])
@torch.no_grad()
def test_the_gate_reads_the_mean_embedding_of_the_first_tokens(embedding: str) -> None:
    model = mixed(*FOUR, embedding=embedding, routing={"kind": "learned", "prefix_tokens": 4, "temperature": 0.5})
    if embedding == "shared":
        table = model.model.embed_tokens.weight
    else:  # the experts' own embeddings side by side
        table = torch.cat([expert(family, seed).get_input_embeddings().weight for seed, family in enumerate(FOUR)], -1)
    rows = prompts(9, 6, 3)
    for side in ("left", "right"):
        routing = model.route(*padded(rows, side))
        for row, sequence in enumerate(rows):
            torch.testing.assert_close(routing.scores[row], model.router.weight @ table[sequence[:4]].mean(0))
        torch.testing.assert_close(routing.alpha, weigh(routing.scores / 0.5, 2))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_prompt_mask_says_what_is_read(kind: str, side: str) -> None:
    """Rows whose mask is empty are read from their start, as without one."""
    model = mixed(*FOUR, routing={"kind": "learned", "prefix_tokens": 2})
    model.set_routing(kind)
    rows = prompts(9, 7, 5, 6)
    ids, mask = padded(rows, side)
    read = torch.zeros_like(mask)
    lengths = (5, 7, 0, 3)
    for row, length in enumerate(lengths):
        first = int(mask[row].argmax())
        read[row, first : first + length] = 1
    routing = model.route(ids, mask, prompt_mask=read)
    for row, (sequence, length) in enumerate(zip(rows, lengths, strict=True)):
        model.set_routing(kind, on="sequence")
        alone = model.route(sequence[None, : length or 2])
        torch.testing.assert_close(routing.scores[row], alone.scores[0])
        model.set_routing(kind, on="prefix")
    assert torch.equal(model(ids, attention_mask=mask, prompt_mask=read).routing.scores, routing.scores)
    with pytest.raises(ValueError, match=r"prompt_mask should be of shape \[4, 9\], not \[4, 3\]"):
        model.route(ids, mask, prompt_mask=read[:, :3])
    model.set_routing(kind, on="sequence")
    whole = model.route(ids, mask)
    assert torch.equal(model.route(ids, mask, prompt_mask=read).scores, whole.scores)
    assert not torch.allclose(whole.scores, routing.scores)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_follows_the_prefix_changes_neither_routing_nor_logits(kind: str) -> None:
    """The router must not see the tokens that are to be predicted; on the whole sequence, as in the paper, it does."""
    model = mixed(*FOUR, routing={"kind": "learned", "prefix_tokens": 4})
    ids = torch.stack(prompts(9, 9))
    other = ids.clone()
    other[:, 6:] = torch.stack(prompts(3, 3, seed=8))

    def both(on: str) -> tuple[Any, Any]:
        model.set_routing(kind, on=on)
        return model(ids), model(other)

    first, second = both("prefix")
    assert torch.equal(first.routing.scores, second.routing.scores)
    torch.testing.assert_close(first.logits[:, :6], second.logits[:, :6])
    first, second = both("sequence")
    assert not torch.allclose(first.routing.scores, second.routing.scores)


@torch.no_grad()
def test_generation_is_routed_by_the_prompt_mask_with_and_without_a_cache() -> None:
    model = mixed(*FOUR, routing={"kind": "perplexity", "prefix_tokens": 64})
    ids, mask = padded(prompts(9, 7), "left")
    read = mask.clone()
    read[:, 6:] = 0
    routing = model.route(ids, mask, prompt_mask=read)
    assert not torch.allclose(routing.scores, model.route(ids, mask).scores)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "num_beams": 2}
    expected = model.generate(ids, routing=routing, **options)
    for use_cache in (True, False):
        assert torch.equal(model.generate(ids, prompt_mask=read, use_cache=use_cache, **options), expected)


@torch.no_grad()
def test_another_kind_keeps_what_is_read() -> None:
    model = mixed(*FOUR, routing={"kind": "random", "on": "sequence", "prefix_tokens": 7, "seed": 3})
    model.set_routing("perplexity", top_k=1)
    assert model.config.routing == {"kind": "perplexity", "top_k": 1, "temperature": 1.0, "on": "sequence", "prefix_tokens": 7}
    with pytest.raises(ValueError, match="learned routing needs a gate, which this checkpoint lacks"):
        model.set_routing("learned")
    with pytest.raises(ValueError, match="routing on should be one of prefix, sequence, not 'all'"):
        model.set_routing("uniform", on="all")
    assert model.config.routing["kind"] == "perplexity"


@torch.no_grad()
def test_path_nll_is_that_of_the_whole_prompt() -> None:
    for embedding in ("shared", "separate"):
        model = mixed(*FOUR, embedding=embedding, routing={"kind": "uniform", "prefix_tokens": 3})
        ids = torch.stack(prompts(8))
        for number, name in enumerate(model.config.expert_names):
            nll = model.path_nll(number, model.model.make_prompt(ids))[0]
            model.set_routing("fixed", expert=name)
            torch.testing.assert_close(nll[0], model(ids, labels=ids).loss)


@torch.no_grad()
def test_the_model_without_a_head_reads_the_same() -> None:
    model = mixed(*FOUR, routing={"kind": "random", "prefix_tokens": 3})
    ids = torch.stack(prompts(9, 9, 9))
    read = torch.zeros_like(ids)
    read[:, :5] = 1
    for options in ({}, {"prompt_mask": read}):
        states = model.model(ids, **options).last_hidden_state
        torch.testing.assert_close(model.lm_head(states), model(ids, **options).logits)
