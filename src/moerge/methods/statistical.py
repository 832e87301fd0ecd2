"""The base of methods that weigh experts by statistics of them over text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from moerge.methods.method import MergeMethod

if TYPE_CHECKING:
    from moerge.statistics.files import Statistics
    from moerge.tensors.tensor import Tensor


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Folder = Annotated[str, Field(min_length=1)]
Folders = Annotated[Folder | tuple[Folder, ...], BeforeValidator(_as_tuple)]


class StatisticsMethod(MergeMethod):
    """A method that is given one statistic for each expert: `block.extras`.

    `statistics` is the folder that `moerge stats` wrote, relative to the recipe, or several of them for different experts.
    Tensors that have no such statistic are averaged with the experts' weights, which must not be negative.
    """

    kind: ClassVar[Literal["fisher", "gram"]]
    statistics: Folders | None = None

    @property
    def divides_by_weights(self) -> bool:
        """True: the weights are relative to each other."""
        return True

    @property
    def folders(self) -> tuple[str, ...]:
        """Return the folders in which statistics are looked for."""
        return (self.statistics,) if isinstance(self.statistics, str) else self.statistics or ()

    def prepared(self, statistics: Statistics, tensor: str) -> Tensor | None:
        """An expert's statistic of a tensor as `merge` wants it, None where there is none."""
        raise NotImplementedError

    def adapted(self, statistics: Statistics, tensor: str) -> StatisticsMethod:
        """This method as it merges a tensor of such models."""
        return self

    def fits(self, statistic: Tensor, shape: tuple[int, ...]) -> bool:
        """Return whether a statistic belongs to a tensor of this shape."""
        return statistic.shape == shape
