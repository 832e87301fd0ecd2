"""The kinds of routing, each against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moerge.modeling import MoergeForCausalLM, Routing, dense_name, layer_of, role_of, separate_name
from moerge.modeling.routing_moerge import weigh
from tests.modeling.routed_models import NAMES, dense_experts, dense_path, padded, prompts, routed

pytestmark = pytest.mark.slow


def slow_perplexity(model: MoergeForCausalLM, ids_T: Tensor) -> list[float]:
    """exp(-1/t sum log P(x_j | x_<j)) under each expert's path, over the predicted tokens."""
    found = []
    for expert in range(3):
        log_p = dense_path(model, expert)(ids_T[None]).logits[0].log_softmax(-1)
        terms = [log_p[j - 1, ids_T[j]].item() for j in range(1, len(ids_T))]
        found.append(math.exp(-sum(terms) / len(terms)))
    return found


@pytest.mark.parametrize("separate", [["ffn"], ["ffn", "attention", "norm", "embedding", "head"]])
@torch.no_grad()
def test_perplexity_is_the_papers_formula(separate: list[str]) -> None:
    model = routed(separate=separate)
    rows = prompts(9, 6, 2)
    for side in ("left", "right"):
        routing = model.route(*padded(rows, side))
        for row, ids_T in enumerate(rows):
            score = [1 / value for value in slow_perplexity(model, ids_T)]
            assert routing.scores[row].tolist() == pytest.approx(score, rel=1e-4)
            worst = score.index(min(score))
            kept = [0.0 if expert == worst else math.exp(value) for expert, value in enumerate(score)]
            assert routing.alpha[row].tolist() == pytest.approx([value / sum(kept) for value in kept], rel=1e-4)
    assert routing.based_on == "1 / perplexity of the prompt under each expert"


@torch.no_grad()
def test_a_low_temperature_tells_apart_what_large_perplexities_do_not() -> None:
    model = routed()
    ids = torch.stack(prompts(12))
    plain = model.route(ids)
    model.set_routing("perplexity", temperature=0.0002)
    sharp = model.route(ids)
    assert torch.equal(sharp.scores, plain.scores)
    assert plain.alpha.max() < 0.51 and sharp.alpha.max() > 0.99
    assert sharp.based_on == "1 / perplexity of the prompt under each expert, at temperature 0.0002"
    torch.testing.assert_close(sharp.alpha, weigh(plain.scores / 0.0002, 2))


@torch.no_grad()
def test_a_single_token_predicts_nothing_so_all_experts_are_equal() -> None:
    routing = routed().route(torch.tensor([[5]]))
    assert routing.scores.tolist() == [[1, 1, 1]] and routing.alpha.tolist() == [[0.5, 0.5, 0]]


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=6), st.integers(1, 8))
def test_weights_are_a_softmax_over_the_k_highest_scores(scores: list[float], top_k: int) -> None:
    alpha = weigh(torch.tensor([scores]), top_k)[0].tolist()
    order = sorted(range(len(scores)), key=lambda expert: -scores[expert])[:top_k]
    total = sum(math.exp(scores[expert]) for expert in order)
    expected = [math.exp(score) / total if expert in order else 0.0 for expert, score in enumerate(scores)]
    assert alpha == pytest.approx(expected, abs=1e-5)


def test_an_expert_whose_score_is_not_a_number_is_not_chosen() -> None:
    assert weigh(torch.tensor([[math.nan, 0.0, 0.0]]), 2).tolist() == [[0, 0.5, 0.5]]
    assert weigh(torch.tensor([[math.nan, 1.0]]), 2).tolist() == [[0, 1]]
    hopeless = Routing(weigh(torch.full((1, 2), math.nan), 2), torch.zeros(1, 2), "")
    with pytest.raises(ValueError, match="a sequence has no expert: its scores are not numbers"):
        hopeless.shares()


def test_shares_are_the_rows_and_weights_of_each_expert() -> None:
    alpha = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    routing = Routing(alpha, alpha, "")
    first, second = routing.shares()
    assert (first.expert, first.rows_R.tolist(), first.weight_R11.flatten().tolist()) == (0, [0], [0.5])
    assert (second.expert, second.rows_R, second.weight_R11.flatten().tolist()) == (1, None, [0.5, 1.0])
    assert [share.expert for share in routing.shares(idle=True)] == [0, 1, 2, 3]
    assert [share.weight_R11.flatten().tolist() for share in routing.shares(idle=True)[2:]] == [[0.0], [0.0]]
    assert routing.repeat(2).alpha.tolist() == alpha[[0, 0, 1, 1]].tolist()
    assert routing.take(torch.tensor([1])).alpha.tolist() == alpha[1:].tolist()


@torch.no_grad()
def test_random_is_a_function_of_the_seed_and_the_tokens() -> None:
    model = routed(routing={"kind": "random", "seed": 7})
    rows = prompts(*[6] * 40, 3)
    routing = model.route(*padded(rows, "left"))
    assert torch.equal(model.route(*padded(rows[::-1], "right")).scores.flip(0), routing.scores)
    assert routing.scores[:1].tolist() == [pytest.approx([0.5265, 0.3402, 0.9880], abs=1e-4)]
    assert len({tuple(row) for row in routing.scores.tolist()}) == len(rows)
    shares = (routing.alpha > 0).float().mean(0)
    assert shares.sum() == pytest.approx(2, abs=1e-4) and shares.min() > 0.45
    assert routing.based_on == "the prompt's tokens and the seed 7, drawn at random"
    model.set_routing("random", seed=8)
    assert not torch.equal(model.route(*padded(rows, "left")).scores, routing.scores)


@torch.no_grad()
def test_uniform_and_fixed_look_at_nothing() -> None:
    model = routed(routing={"kind": "uniform"})
    ids = torch.stack(prompts(3, 3))
    assert model.route(ids).alpha.tolist() == [[pytest.approx(1 / 3)] * 3] * 2
    assert model.route(ids).based_on == "nothing: every expert weighs the same"
    model.set_routing("fixed", expert="code")
    assert model.route(ids).alpha.tolist() == [[0, 0, 1]] * 2
    assert model.route(ids).based_on == "nothing: always code"


def test_learned_is_a_gate_on_the_mean_embedding_and_learns() -> None:
    model = routed(separate=["ffn"], routing={"kind": "learned"})
    rows = prompts(6, 4)
    ids, mask = padded(rows, "left")
    routing = model.route(ids, mask)
    for row, sequence in enumerate(rows):
        mean = model.model.embed_tokens[0].weight[sequence].mean(0)
        torch.testing.assert_close(routing.scores[row], (model.router.weight @ mean).detach())
    torch.testing.assert_close(routing.alpha, weigh(routing.scores, 2))
    assert not routing.alpha.requires_grad
    for mix in ("layer", "output", "logits"):
        model.config.mix = mix
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        assert model.router.weight.grad.isfinite().all() and model.router.weight.grad.abs().sum() > 0


def slow_task_vector(model: MoergeForCausalLM, ids_T: Tensor, taking_part: list[str]) -> list[float]:
    """cos(-gradient of the base's loss, theta_i - theta_base) over dense tensors, everything in memory."""
    base, *others = (dense_path(model, expert) for expert in range(3))
    base(ids_T[None], labels=ids_T[None]).loss.backward()
    parameters = [dict(expert.named_parameters()) for expert in (base, *others)]
    g = torch.cat([parameters[0][name].grad.flatten() for name in taking_part])
    vectors = [torch.cat([(p[name] - parameters[0][name]).flatten() for name in taking_part]) for p in parameters[1:]]
    return [0.0] + [torch.cosine_similarity(-g, tau, 0).item() for tau in vectors]


@pytest.mark.parametrize(
    ("separate", "options"),
    [
        (["ffn"], {}),
        (["ffn", "attention"], {"roles": ["attention"]}),
        (["ffn", "attention"], {"layers": [1]}),
        (["ffn", "attention", "norm", "embedding", "head"], {}),
        (["ffn", "embedding", "head"], {"roles": ["head"], "layers": []}),
    ],
)
def test_task_vector_is_the_cosine_of_the_descent_direction(separate: list[str], options: dict[str, list[str]]) -> None:
    model = routed(separate=separate, routing={"kind": "task_vector", **options})
    names = [
        name
        for name, _ in dense_path(model, 0).named_parameters()
        if role_of(name) in options.get("roles", separate) and layer_of(name) in [*options.get("layers", [0, 1]), None]
    ]
    rows = prompts(8, 5)
    routing = model.route(*padded(rows, "left"))
    for row, ids_T in enumerate(rows):
        expected = slow_task_vector(model, ids_T, names)
        assert routing.scores[row].tolist() == pytest.approx(expected, abs=1e-5)
    assert routing.scores.abs().amax(1).min() > 1e-3 and (routing.scores[:, 0] == 0).all()
    torch.testing.assert_close(routing.alpha, weigh(routing.scores, 2))
    assert routing.based_on == "cos(-gradient of the base's loss on the prompt, task vector of each expert)"


def test_task_vector_of_tied_embeddings() -> None:
    model = routed(dense_experts(tied=True), separate=["embedding", "head"], routing={"kind": "task_vector"})
    (ids_T,) = prompts(8)
    expected = slow_task_vector(model, ids_T, ["model.embed_tokens.weight"])
    assert model.route(ids_T[None]).scores[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_an_expert_trained_on_the_prompt_points_the_way_of_descent() -> None:
    """The sign: one step of gradient descent from the base has score 1, one of ascent -1."""
    model = routed(separate=["ffn"], routing={"kind": "task_vector", "top_k": 1})
    (ids_T,) = prompts(10)
    base = dense_path(model, 0)
    base(ids_T[None], labels=ids_T[None]).loss.backward()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if role_of(name) == "ffn":
                for expert, step in ((1, 0.1), (2, -0.1)):
                    model.get_parameter(separate_name(name, expert)).copy_(parameter - step * parameter.grad)
    routing = model.route(ids_T[None])
    assert routing.scores.tolist() == [[0, pytest.approx(1, abs=1e-4), pytest.approx(-1, abs=1e-4)]]
    assert routing.alpha.tolist() == [[0, 1, 0]]


def test_task_vector_routing_leaves_no_trace() -> None:
    model = routed(separate=["ffn"], routing={"kind": "task_vector"})
    ids = torch.stack(prompts(6))
    with torch.inference_mode():
        expected = model.route(ids)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.train()
    assert torch.equal(model.route(ids).scores, expected.scores)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


@torch.no_grad()
def test_routing_in_training_mode_is_that_of_evaluation() -> None:
    model = routed()
    model.config.expert_config.attention_dropout = 0.5
    for layer in model.model.layers:
        for attention in layer.self_attn:
            attention.attention_dropout = 0.5
    ids = torch.stack(prompts(9))
    expected = model.route(ids)
    model.train()
    assert torch.equal(model.route(ids).scores, expected.scores)
    assert model.model.layers[0].self_attn[1].training


def test_names_of_tensors_go_both_ways() -> None:
    for name in dense_path(routed(dense_experts("qwen3")), 0).state_dict():
        assert dense_name(separate_name(name, 3)) == (name, 3)
    assert separate_name("model.layers.12.self_attn.q_proj.bias", 2) == "model.layers.12.self_attn.2.q_proj.bias"
    assert separate_name("lm_head.weight", 0) == "lm_head.0.weight"
    assert [role_of(f"model.{part}.weight") for part in ("embed_tokens", "norm", "layers.0.post_attention_layernorm")] == [
        "embedding",
        "norm",
        "norm",
    ]
    for wrong in ("model.layers.0.mlp.0.up_proj.weight", "model.rotary_emb.inv_freq", "transformer.wte.weight"):
        with pytest.raises(ValueError, match="is no tensor of a dense model"):
            separate_name(wrong, 0)
    with pytest.raises(ValueError, match="is no tensor of a dense model"):
        dense_name("lm_head.weight")


def test_another_kind_of_routing_can_be_set_if_the_checkpoint_has_what_it_takes() -> None:
    model = routed()
    with pytest.raises(ValueError, match="learned routing needs a gate, which this checkpoint lacks"):
        model.set_routing("learned")
    with pytest.raises(ValueError, match="routing to the fixed expert 'poet': the experts are " + ", ".join(NAMES)):
        model.set_routing("fixed", expert="poet")
    assert model.config.routing["kind"] == "perplexity"
