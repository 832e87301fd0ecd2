"""Projectors drawn and fitted: against slow references, and what must come out exact."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge.architecture.heterogeneous import FACTOR, expected_projectors, projector_config
from moerge.errors import InputError
from moerge.operations.fitter import FitContext
from moerge.operations.operations import Draw, Output, fit_jobs
from moerge.projectors.fit import PENALTY
from moerge.projectors.least_squares import NormalEquations
from moerge.projectors.outputs import ExpertTables, projector_outputs
from moerge.projectors.token_weights import SMOOTHING, smoothed
from moerge.projectors.units import PRE_ACTIVATION, TokenDetectors, token_detectors
from moerge.tensors.dtypes import BF16, F32, DType
from moerge.tensors.tensor import ArrayTensor
from moerge.tensors.threads import single_threaded_blas
from tests.helpers.tiny import encode, llama_config, write_checkpoint

TOKENS = 90
Arrays = dict[str, np.ndarray]


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tensor(values: np.ndarray, name: str = "table", dtype: DType = F32) -> ArrayTensor:
    return ArrayTensor(name, dtype, values.shape, encode(values.reshape(-1), dtype))


def tables(embedding: np.ndarray, head: np.ndarray, bias: np.ndarray | None = None, name: str = "math") -> ExpertTables:
    return ExpertTables(name, tensor(embedding), tensor(head), None if bias is None else tensor(bias))


def fitted(
    folder: Path,
    expert: ExpertTables,
    embedding: np.ndarray,
    head: np.ndarray,
    *,
    bias: np.ndarray | None = None,
    dtype: DType = F32,
    threads: int = 1,
    seed: int = 0,
) -> Arrays:
    """What the fitters make of one expert beside these shared tables, by the tensor's short name."""
    stored = {"model.embed_tokens.weight": embedding, "lm_head.weight": head} | ({} if bias is None else {"lm_head.bias": bias})
    write_checkpoint(folder, stored, llama_config(), dtype=dtype.name, tokenizer=False)
    made = projector_outputs("fitted", [expert], embedding.shape[1], seed)
    outputs = [Output(tensor.name, tensor.role, dtype, tensor.shape, operation) for tensor, operation in made]
    found = {}
    for fitting in fit_jobs(outputs):
        with single_threaded_blas():
            values = fitting.fitter.fit(FitContext(folder, fitting.outputs, (expert.name,), threads=threads))
        assert values.keys() == {output.name for output in fitting.outputs}
        assert all(values[output.name].shape == output.shape for output in fitting.outputs)
        found |= {name.removeprefix("model.projectors_"): value for name, value in values.items()}
    return found


def project(found: Arrays, side: str, rows: np.ndarray) -> np.ndarray:
    """The projector, as the model computes it."""
    part = {name.removeprefix(f"{side}.0."): value.astype(np.float64) for name, value in found.items()}
    out = rows @ part["linear.weight"].T + part["linear.bias"]
    if "up.weight" in part:
        inner = rows @ part["up.weight"].T + part["up.bias"]
        out = out + gelu(inner) @ part["down.weight"].T + part["down.bias"]
    return out


def gelu(values: np.ndarray) -> np.ndarray:
    return values * (0.5 + 0.5 * np.vectorize(math.erf)(values / math.sqrt(2)))


def test_names_and_shapes() -> None:
    config = projector_config("fitted", 8)
    assert config == {"linear": True, "width": 8 * FACTOR}
    expected = {tensor.name: tensor.shape for tensor in expected_projectors(config, [(8, 8), (6, 4)], 8)}
    assert len(expected) == 2 * 2 * 6
    assert expected["model.projectors_in.1.linear.weight"] == (6, 8)
    assert expected["model.projectors_in.1.up.weight"] == (32, 8)
    assert expected["model.projectors_in.1.down.weight"] == (6, 32)
    assert expected["model.projectors_out.1.linear.weight"] == (8, 4)
    assert expected["model.projectors_out.1.up.weight"] == (32, 4)
    assert expected["model.projectors_out.1.down.bias"] == (8,)
    expert = tables(draw(0, TOKENS, 8), draw(1, TOKENS, 8))
    assert [t.name for t, _ in projector_outputs("random", [expert], 8)] == [
        t.name for t in expected_projectors(projector_config("random", 8), [(8, 8)], 8)
    ]


def test_random_projectors_are_drawn_as_torch_draws_linear_layers() -> None:
    drawn = {t.name: op for t, op in projector_outputs("random", [tables(draw(0, TOKENS, 9), draw(1, TOKENS, 4))], 16, 7)}
    assert len(drawn) == 8 and all(isinstance(operation, Draw) and operation.seed == 7 for operation in drawn.values())
    bounds = {name.removeprefix("model.projectors_"): operation.bound for name, operation in drawn.items()}  # type: ignore[union-attr]
    assert bounds["in.0.up.weight"] == bounds["in.0.up.bias"] == 0.25
    assert bounds["in.0.down.weight"] == bounds["in.0.down.bias"] == 0.125
    assert bounds["out.0.up.bias"] == 0.5 and bounds["out.0.down.weight"] == 0.125


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_an_expert_alone_is_exact(tmp_path: Path, dtype: DType) -> None:
    """Bit for bit the identity, and nothing on top of it."""
    embedding, head = (decoded(draw(seed, TOKENS, 8), dtype) for seed in (0, 1))
    found = fitted(tmp_path, tables(embedding, head), embedding, head, dtype=dtype)
    for name in ("in.0.linear", "out.0.linear"):
        assert found[f"{name}.weight"].tobytes() == np.eye(8, dtype=np.float32).tobytes()
    for name in ("in.0.linear.bias", "out.0.linear.bias", "in.0.down.weight", "in.0.down.bias"):
        assert found[name].tobytes() == np.zeros_like(found[name]).tobytes()
    assert np.abs(found["in.0.up.weight"]).sum() > 0  # what training can go on from


def decoded(values: np.ndarray, dtype: DType) -> np.ndarray:
    from tests.helpers.tiny import decode

    return decode(encode(values, dtype), dtype)


def test_proj_in_is_the_weighted_regression_on_the_units(tmp_path: Path) -> None:
    embedding, own = draw(0, 400, 8), draw(1, 400, 6)
    found = fitted(tmp_path, tables(own, own), embedding, draw(2, 400, 8))
    inner = embedding.astype(np.float64) @ found["in.0.up.weight"].T.astype(np.float64) + found["in.0.up.bias"]
    features = np.concatenate([embedding, np.ones((400, 1)), gelu(inner)], axis=1)
    shrink = np.sqrt(PENALTY * np.square(features).sum(axis=0))
    shrink[8] = 0
    rows = np.concatenate([features, np.diag(shrink)])
    targets = np.concatenate([own - embedding[:, :6], np.zeros((len(shrink), 6))])
    solution = np.linalg.lstsq(rows, targets, rcond=None)[0]
    np.testing.assert_allclose(found["in.0.linear.weight"], np.eye(6, 8) + solution[:8].T, atol=1e-4)
    np.testing.assert_allclose(found["in.0.linear.bias"], solution[8], atol=1e-4)
    np.testing.assert_allclose(found["in.0.down.weight"], solution[9:].T, atol=1e-4)
    assert not found["in.0.down.bias"].any()


def test_as_many_units_as_tokens_know_every_token(tmp_path: Path) -> None:
    embedding, own = draw(0, 30, 8), draw(1, 30, 8)
    found = fitted(tmp_path, tables(own, own), embedding, embedding)
    np.testing.assert_allclose(project(found, "in", embedding), own, atol=2e-3)


def test_proj_out_is_the_centred_regression_of_the_head_whatever_the_states(tmp_path: Path) -> None:
    """Dense: the logits of many states at once, each with an offset of its own, as one least-squares problem over W."""
    head, own, states = draw(0, 40, 5), draw(1, 40, 3), draw(2, 12, 3)
    found = fitted(tmp_path, tables(draw(3, 40, 3), own), draw(4, 40, 5), head)
    centred, target = head - head.mean(axis=0), own - own.mean(axis=0)
    problem = np.concatenate([np.kron(centred, state) for state in states.astype(np.float64)])
    wanted = np.concatenate([target @ state for state in states.astype(np.float64)])
    dense = np.linalg.lstsq(problem, wanted, rcond=None)[0].reshape(5, 3)
    np.testing.assert_allclose(found["out.0.linear.weight"], dense, atol=1e-5)
    assert not found["out.0.linear.bias"].any()


def test_logits_are_exact_where_the_shared_head_can_say_them(tmp_path: Path) -> None:
    """A head that is a map of the shared one, and a bias that is too, up to what softmax ignores."""
    head, mixing, push = draw(0, TOKENS, 8), draw(1, 8, 5), draw(2, 8)
    own, shared_bias = head @ mixing, draw(3, TOKENS)
    bias = shared_bias + head @ push + 3
    found = fitted(tmp_path, tables(draw(4, TOKENS, 5), own, bias), draw(5, TOKENS, 8), head, bias=shared_bias)
    states = draw(6, 20, 5)
    expected = states @ own.T + bias
    actual = project({k: v for k, v in found.items() if k.startswith("out")}, "out", states) @ head.T + shared_bias
    actual -= actual.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(actual, expected - expected.mean(axis=1, keepdims=True), atol=1e-3)


def test_a_narrower_expert_of_the_padded_average(tmp_path: Path) -> None:
    """Where the shared rows begin with the expert's own, as padding leaves them, nothing is to be corrected."""
    own, head = draw(0, TOKENS, 5), draw(1, TOKENS, 5)
    padded = [np.concatenate([table, np.zeros((TOKENS, 3), np.float32)], axis=1) for table in (own, head)]
    found = fitted(tmp_path, tables(own, head), *padded)
    assert (found["in.0.linear.weight"] == np.eye(5, 8)).all() and (found["out.0.linear.weight"] == np.eye(8, 5)).all()


@given(scale=st.sampled_from([2.0**-12, 0.25, 8.0, 2.0**10]))
def test_units_of_measurement_do_not_matter(tmp_path_factory: pytest.TempPathFactory, scale: float) -> None:
    folder = tmp_path_factory.mktemp("scaled")
    embedding, own = draw(0, TOKENS, 6), draw(1, TOKENS, 6)
    once = fitted(folder / "once", tables(own, own), embedding, embedding)
    scaled = fitted(folder / "scaled", tables(own * scale, own * scale), embedding * scale, embedding * scale)
    for side, rows in (("in", embedding), ("out", draw(2, 9, 6))):
        factor = scale if side == "in" else 1.0
        kept = {name: value for name, value in once.items() if name.startswith(side)}
        other = {name: value for name, value in scaled.items() if name.startswith(side)}
        np.testing.assert_allclose(
            project(other, side, rows * factor), project(kept, side, rows) * factor, rtol=1e-3, atol=scale * 1e-3
        )


def test_threads_change_nothing(tmp_path: Path) -> None:
    width = 140  # several panels of features
    arguments = tables(draw(0, 700, width), draw(1, 700, width)), draw(2, 700, width), draw(3, 700, width)
    alone, together = (fitted(tmp_path / str(n), *arguments, threads=n) for n in (1, 3))
    assert all(alone[name].tobytes() == together[name].tobytes() for name in alone)


def test_units_stand_for_single_tokens() -> None:
    rows, mean = draw(0, 12, 64), np.full(64, 0.3)
    units = token_detectors(rows, mean, 14, 0, "up")
    inner = rows @ units.up_NM.T + units.bias_N
    np.testing.assert_allclose(np.diag(inner), PRE_ACTIVATION, atol=1e-4)
    np.testing.assert_allclose(mean @ units.up_NM[:12].T + units.bias_N[:12], -PRE_ACTIVATION, atol=1e-4)
    assert (inner[:, :12] - PRE_ACTIVATION * np.eye(12) < 0.5 * PRE_ACTIVATION).all()
    assert (np.abs(units.up_NM[12:]) <= 1 / 8).all() and units.up_NM[12:].any()
    np.testing.assert_allclose(TokenDetectors(units.up_NM, units.bias_N).apply(rows), gelu(inner), atol=1e-5)


def test_a_token_at_the_mean_gets_a_unit_at_random() -> None:
    units = token_detectors(np.ones((1, 4)), np.ones(4), 1, 0, "up")
    assert np.isfinite(units.up_NM).all() and 0 < np.abs(units.up_NM).max() <= 0.5


def test_weights_are_the_share_in_the_expert_s_own_text() -> None:
    counts = {"math": np.array([6.0, 2, 0, 0]), "code": np.array([0.0, 1, 1, 0]), "empty": np.zeros(4)}
    np.testing.assert_allclose(smoothed(counts, "math", 4), 0.98 * np.array([0.75, 0.25, 0, 0]) + SMOOTHING / 4)
    np.testing.assert_allclose(smoothed(counts, "other", 4), 0.98 * np.array([0.375, 0.375, 0.25, 0]) + SMOOTHING / 4)
    assert smoothed({}, "math", 4).tolist() == [0.25] * 4


def test_broken_tables_are_refused(tmp_path: Path) -> None:
    own = draw(0, TOKENS, 4)
    own[3, 2] = np.nan
    with pytest.raises(InputError, match="math: tensor 'table' holds NaN or infinity, so nothing can be fitted to it"):
        fitted(tmp_path, tables(own, draw(1, TOKENS, 4)), draw(2, TOKENS, 4), draw(3, TOKENS, 4))


def test_the_regression_shrinks_each_feature_by_its_own_size() -> None:
    features, targets, weights = draw(0, 50, 4).astype(np.float64), draw(1, 50, 2).astype(np.float64), np.linspace(0.1, 2, 50)
    features[:, 3] = 0
    equations = NormalEquations(4, 2)
    equations.add(features[:20], targets[:20], weights[:20])
    equations.add(features[20:], targets[20:], weights[20:])
    root = np.sqrt(weights)[:, None]
    size = 0.3 * (weights[:, None] * features**2).sum(axis=0)
    rows = np.concatenate([features * root, np.diag(np.sqrt(size))[:1], np.diag(np.sqrt(size))[2:3]])
    expected = np.linalg.lstsq(rows[:, :3], np.concatenate([targets * root, np.zeros((2, 2))]), rcond=None)[0]
    actual = equations.solve(0.3, free=1)
    np.testing.assert_allclose(actual[:3], expected, rtol=1e-8)
    assert not actual[3].any()
