from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

import moerge
from moerge import InputError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
METHODS = ["average", "linear", "task_arithmetic", "ties", "dare", "slerp"]


def model(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (3, 5), "vector": (7,), "scalar": (), "empty": (0, 4), "three": (2, 3, 2)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def copies(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_torch_tensors_keep_type_and_shape_and_inputs_stay_as_they_are(method: str, dtype: torch.dtype) -> None:
    base, *experts = states = [model(seed, dtype) for seed in range(3)]
    before = [copies(state) for state in states]
    merged = moerge.merge_state_dicts(base, experts, method=method)
    assert list(merged) == list(base)
    for name, tensor in merged.items():
        assert isinstance(tensor, torch.Tensor)
        assert (tensor.dtype, tensor.shape) == (dtype, base[name].shape)
        assert bool(torch.isfinite(tensor).all())
    for state, original in zip(states, before, strict=True):
        for name, tensor in state.items():
            assert torch.equal(tensor, original[name])
    assert not torch.equal(merged["matrix"], base["matrix"])
    assert not torch.equal(merged["matrix"], experts[0]["matrix"])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("method", METHODS)
def test_numpy_arrays_give_the_same_numbers_as_torch_tensors(method: str, dtype: type) -> None:
    tensors = [model(seed, torch.float32 if dtype is np.float32 else torch.float16) for seed in range(3)]
    arrays = [{name: tensor.numpy() for name, tensor in state.items()} for state in tensors]
    merged = moerge.merge_state_dicts(arrays[0], arrays[1:], method=method)
    expected = moerge.merge_state_dicts(tensors[0], tensors[1:], method=method)
    for name, array in merged.items():
        assert type(array) is np.ndarray
        assert (array.dtype, array.shape) == (dtype, arrays[0][name].shape)
        np.testing.assert_array_equal(array, expected[name].numpy())


def test_bfloat16_arrays_of_ml_dtypes_work() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes, which gives NumPy a bfloat16, is not installed")
    experts = [{"w": np.array([1, 2, 3.0], ml_dtypes.bfloat16)}, {"w": np.array([2, 2, 4.0], ml_dtypes.bfloat16)}]
    merged = moerge.merge_state_dicts(None, experts, method="average")["w"]
    assert merged.dtype == ml_dtypes.bfloat16
    assert merged.astype(np.float32).tolist() == [1.5, 2, 3.5]


def test_the_result_takes_kind_and_type_from_the_base_where_one_is_used() -> None:
    base = {"w": torch.zeros(2, dtype=torch.bfloat16)}
    experts = [{"w": np.ones(2, np.float32)}, {"w": np.full(2, 3, np.float16)}]
    merged = moerge.merge_state_dicts(base, experts, method="task_arithmetic", scale=1)["w"]
    assert torch.equal(merged, torch.full((2,), 4, dtype=torch.bfloat16))
    averaged = moerge.merge_state_dicts(base, experts, method="average")["w"]
    assert type(averaged) is np.ndarray
    assert (averaged.dtype, averaged.tolist()) == (np.float32, [2, 2])


def test_types_are_kept_tensor_by_tensor() -> None:
    expert = {"norm": torch.ones(3), "matrix": torch.ones(2, 2, dtype=torch.bfloat16)}
    merged = moerge.merge_state_dicts(None, [expert, expert], method="average")
    assert {name: tensor.dtype for name, tensor in merged.items()} == {"norm": torch.float32, "matrix": torch.bfloat16}


def test_views_parameters_and_read_only_arrays_are_read_rightly() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    array.flags.writeable = False
    twice = moerge.merge_state_dicts(None, [{"w": array.T}, {"w": array[:, ::-1].T}], method="linear", normalize=False)["w"]
    np.testing.assert_array_equal(twice, array.T + array[:, ::-1].T)
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).to(torch.bfloat16))
    merged = moerge.merge_state_dicts(None, [{"w": parameter.T}, {"w": parameter.T}], method="average")["w"]
    assert torch.equal(merged, parameter.detach().T)
    assert not merged.requires_grad


def test_experts_by_name_draw_other_masks_than_by_position() -> None:
    base, expert = {"w": np.zeros(100, np.float32)}, {"w": np.ones(100, np.float32)}

    def merged(experts: Any) -> np.ndarray:
        return moerge.merge_state_dicts(base, experts, method="dare", density=0.5)["w"]

    np.testing.assert_array_equal(merged([expert]), merged({"expert0": expert}))
    assert not np.array_equal(merged([expert]), merged({"math": expert}))


def test_weights_follow_the_experts() -> None:
    one, two = {"w": np.float32([1])}, {"w": np.float32([2])}
    assert moerge.merge_state_dicts(None, [one, two], method="linear", weights=[3, 1])["w"].tolist() == [1.25]
    assert moerge.merge_state_dicts(None, {"b": two, "a": one}, method="linear", weights=[3, 1])["w"].tolist() == [1.75]


def test_no_tensors_give_no_tensors() -> None:
    assert moerge.merge_state_dicts(None, [{}, {}], method="average") == {}


def test_nothing_of_torch_is_imported_for_arrays() -> None:
    program = (
        "import sys, numpy, moerge; a = {'w': numpy.ones(3, 'float32')};"
        "moerge.merge_state_dicts(a, [a], method='ties'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def message_of(base: Any, experts: Any, **arguments: Any) -> str:
    with pytest.raises(InputError) as error:
        moerge.merge_state_dicts(base, experts, **arguments)
    return str(error.value)


def w(*values: float, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    return {"w": np.array(values, dtype)}


@pytest.mark.parametrize(
    ("base", "experts", "arguments", "message"),
    [
        (None, [], {"method": "average"}, "merge_state_dicts needs at least one expert"),
        (None, [w(1)], {"method": "averge"}, "unknown merge method 'averge': did you mean 'average'?"),
        (
            w(1),
            [w(1)],
            {"method": "ties", "densty": 0.5},
            "merge_state_dicts(method='ties'): densty: unknown key, did you mean 'density'?",
        ),
        (
            w(1),
            [w(1)],
            {"method": "dare", "density": 0},
            "merge_state_dicts(method='dare'): density should be greater than 0, not 0",
        ),
        (
            w(1),
            [w(1)],
            {"method": "dare", "density": 1.5},
            "merge_state_dicts(method='dare'): density should be less than or equal to 1, not 1.5",
        ),
        (None, [w(1)], {"method": "ties"}, "ties works on task vectors (expert minus base), so it needs a base"),
        (None, [w(1)] * 3, {"method": "slerp"}, "slerp merges exactly 2 state dicts, not 3"),
        (None, [w(1)] * 2, {"method": "linear", "weights": [1]}, "there are 2 experts but 1 weights"),
        (
            None,
            [w(1)] * 2,
            {"method": "linear", "weights": [1, float("nan")]},
            "expert1 has the weight nan: weights must be finite",
        ),
        (
            None,
            [w(1)] * 2,
            {"method": "linear", "weights": [1, -1]},
            "the weights sum to zero, so they cannot be normalized",
        ),
        (
            None,
            [w(1)] * 2,
            {"method": "average", "weights": [1, 2]},
            "average ignores weights: use 'linear', or leave them out",
        ),
        (
            None,
            {"math": w(1), "code": {**w(1), "bias": np.ones(1, np.float32)}},
            {"method": "average"},
            "code: tensor 'bias' is not in all state dicts",
        ),
        (w(1), {"math": {}}, {"method": "ties"}, "math: tensor 'w' is not in all state dicts"),
        (w(1, 2), {"math": w(1)}, {"method": "ties"}, "math: tensor 'w' has shape (1,), expected (2,)"),
        (
            None,
            {"math": w(1), "code": w(1, dtype=np.float64)},
            {"method": "average"},
            "code: tensor 'w' is float64; bfloat16, float16, float32 can be merged",
        ),
        (
            None,
            {"math": {"w": torch.ones(1, dtype=torch.int64)}},
            {"method": "average"},
            "math: tensor 'w' is torch.int64; bfloat16, float16, float32 can be merged",
        ),
        (
            None,
            {"math": {"w": [1.0]}},
            {"method": "average"},
            "math: tensor 'w' is list; bfloat16, float16, float32 can be merged",
        ),
    ],
)
def test_bad_input_is_named(base: Any, experts: Any, arguments: dict[str, Any], message: str) -> None:
    assert message_of(base, experts, **arguments) == message


@pytest.mark.parametrize("culprit", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_nan_and_infinity_are_named(method: str, dtype: torch.dtype, culprit: float) -> None:
    experts = {"math": model(1, dtype), "code": model(2, dtype)}
    experts["code"]["matrix"][1, 3] = culprit
    message = message_of(model(0, dtype), experts, method=method)
    assert message.startswith("code: tensor 'matrix' holds NaN or infinity: ")


def test_nan_in_the_base_is_named() -> None:
    assert message_of(w(float("nan")), [w(1)], method="ties").startswith("base: tensor 'w' holds NaN or infinity")


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties"])
def test_allow_nonfinite_merges_all_the_same(method: str) -> None:
    base, good, bad = w(0, 0, 0), w(1, 2, 3), w(1, float("nan"), 3)
    merged = moerge.merge_state_dicts(base, [good, bad], method=method, allow_nonfinite=True)["w"]
    expected = moerge.merge_state_dicts(base, [good, good], method=method)["w"]
    assert np.isnan(merged).tolist() == [False, True, False]
    np.testing.assert_array_equal(merged[[0, 2]], expected[[0, 2]])
