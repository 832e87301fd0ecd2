"""Base classes of results: one frozen model for each file of results, which writes it and reads it.

A reader ignores keys that it does not know, so that files of newer versions still show. Numbers are finite on both sides.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from moerge.formatting import Displayed

Share = Annotated[float, Field(ge=-1e-6, le=1 + 1e-6)]
Amount = Annotated[float, Field(ge=0)]


class Data(BaseModel):
    """A part of a result."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, populate_by_name=True)


class Result(Displayed, Data):
    """The content of a file. Its fields are the file's keys, in their order."""

    __str__ = Displayed.__repr__

    def to_json(self) -> dict[str, Any]:
        """Return the content for `--json` and the file."""
        return self.model_dump(mode="json", by_alias=True)
