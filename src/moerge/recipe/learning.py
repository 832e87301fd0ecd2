"""The recipe's `learn` section."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]

_LARGEST = 1e6
"""Of what AdamW multiplies by, which has to fit float32 with room to spare."""


def _or_else(message: str) -> WrapValidator:
    """One sentence where none of several types fits, instead of what the first of them says."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("none_fits", message) from None

    return WrapValidator(check)


class Learning(BaseModel):
    """The settings of learned coefficients. Defaults are the paper's or its code's (arXiv 2509.25712), unless said otherwise.

    `objective: alignment` is Expert Merging's, `entropy` AdaMerging's (Yang et al. 2024), which asks the experts nothing.
    `granularity: tensor` learns one coefficient for each tensor and expert (the code), `layer` one for each layer and expert
    (the paper's text). `extra` is Expert Merging++: the number of further coefficients, as a fraction of the first stage's.
    Of each expert at most `texts` documents of at most `tokens` tokens are used; a fraction `heldout` of them is not trained
    on but says when to stop (ours): after `patience` looks at it without improvement, and the best of them counts.
    `gamma` weighs the mean distance of the coefficients from their initial value, which is the `scale` of the recipe's merge
    method; infinity keeps them there. `hidden_layers` are numbers of layers, counted from 1, after which hidden states are
    compared; `targets` keeps all logits of the experts or as many of the largest. `threads` are torch's on the processor, its
    own number if not given; the last bits of sums depend on it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    objective: Literal["alignment", "entropy"] = "alignment"
    granularity: Literal["tensor", "layer"] = "tensor"
    extra: NonNegative = 0.0
    roles: tuple[str, ...] = Field(default=("attention", "ffn"), min_length=1, strict=False)
    texts: Count = 10
    tokens: Annotated[int, Field(ge=2)] = 512
    epochs: Count = 1
    learning_rate: Annotated[float, Field(gt=0, le=_LARGEST)] = 0.5
    weight_decay: Annotated[float, Field(ge=0, le=_LARGEST)] = 1e-5
    accumulation: Count = 8
    clip: Positive = 1.0
    temperature: Positive = 1.0
    hidden_weight: NonNegative = 1.0
    hidden_layers: Annotated[
        Literal["middle"] | Annotated[tuple[Count, ...], Field(strict=False, min_length=1)],
        _or_else("should be 'middle' or a list of layers, counted from 1"),
    ] = "middle"
    gamma: Annotated[float, Field(ge=0)] = 0.8
    task_weights: dict[str, NonNegative] = Field(default_factory=dict)
    heldout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    patience: Annotated[int, Field(ge=0)] = 10
    targets: Annotated[Literal["full"] | Count, _or_else("should be 'full' or a whole number of at least 1")] = "full"
    seed: int = 0
    device: str = "cpu"
    threads: Count | None = None
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
