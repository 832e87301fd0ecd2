"""The building blocks of a page: sections of blocks, without a word of HTML. The template has a macro for each kind of block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


@dataclass(frozen=True)
class Column:
    """A table's column; `unit` stands in its heading. Numbers stand to the right and sort by value; `long` is for sentences."""

    name: str
    unit: str = ""
    numeric: bool = False
    long: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell's text, and the value it sorts by where that is not the text.

    `tone` is "", "best", "quiet", or a verdict's "good", "care" or "apart"; `heat` in [-1, 1] colors the cell's ground.
    """

    text: str
    value: float | None = None
    tone: str = ""
    heat: float | None = None

    @property
    def strength(self) -> int:
        """The heat as a percentage of full colour."""
        return round(100 * min(1.0, abs(self.heat or 0.0)))


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of a row is its heading."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A chart with its caption, a description for those who do not see it, and its data as tables."""

    kind: ClassVar[str] = "figure"
    title: str
    description: str
    draw: Callable[[], Drawing]
    data: Sequence[Table] = ()


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` between backticks. `tone` is "", "note", "advice" or "warning"."""

    kind: ClassVar[str] = "text"
    text: str
    tone: str = ""


@dataclass(frozen=True)
class Listing:
    """A list of short texts."""

    kind: ClassVar[str] = "listing"
    items: Sequence[str]


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    kind: ClassVar[str] = "facts"
    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    """Preformatted text."""

    kind: ClassVar[str] = "code"
    text: str
    label: str


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Fold:
    """Blocks that open on demand."""

    kind: ClassVar[str] = "fold"
    summary: str
    blocks: Sequence[Block]
    note: str = ""


Block = Table | Figure | Text | Listing | Facts | Code | Heading | Fold


@dataclass(frozen=True)
class Section:
    """A part of the page; `id` is its anchor, `glance` what the summary on top says of it."""

    id: str
    title: str
    blocks: Sequence[Block]
    glance: Sequence[str] = field(default=())


def words(text: str, tone: str = "") -> Cell:
    """A cell of text."""
    return Cell(text, tone=tone)


def count(value: int) -> Cell:
    """A whole number."""
    return Cell(f"{value:,}", value)


def number(value: float | None, digits: int = 3, tone: str = "", heat: float | None = None) -> Cell:
    """A number with so many digits after the point; a dash where there is none."""
    if value is None:
        return Cell("–", None, "quiet")
    return Cell(f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}"), value, tone, heat)


def percent(share: float | None, digits: int = 0, tone: str = "") -> Cell:
    """A fraction as a percentage, whose unit is in the column's heading."""
    return number(None if share is None else 100 * share, digits, tone)
