"""All sections of a report in order, with one set of colours."""

from __future__ import annotations

from moerge.reporting import palette
from moerge.reporting.blocks import Section
from moerge.reporting.data import Collected
from moerge.reporting.sections.checkpoints import checkpoints
from moerge.reporting.sections.learning import learning, tuning
from moerge.reporting.sections.measured import measured
from moerge.reporting.sections.routing import routing
from moerge.reporting.sections.runs import runs
from moerge.reporting.sections.similarity import similarity


def sections(found: Collected) -> list[Section]:
    """Return the sections that have something to show; an expert has the same colour in all of them."""
    colours = palette.numbered(
        [
            *(expert for checkpoint in found.checkpoints for expert in checkpoint.experts),
            *(expert for comparison in found.comparisons for expert in comparison.experts),
            *(expert for route in found.routes for expert in route.experts),
        ]
    )
    made = [
        measured(found),
        similarity(found, colours),
        checkpoints(found),
        routing(found, colours),
        learning(found, colours),
        tuning(found),
        runs(found),
    ]
    return [section for section in made if section is not None]
