"""All sections of a report in order."""

from __future__ import annotations

from moerge.reporting.blocks import Section
from moerge.reporting.data import Collected
from moerge.reporting.sections.checkpoints import checkpoints
from moerge.reporting.sections.learning import learning, tuning
from moerge.reporting.sections.measured import measured
from moerge.reporting.sections.routing import routing
from moerge.reporting.sections.runs import runs
from moerge.reporting.sections.similarity import similarity


def sections(found: Collected) -> list[Section]:
    """Return the sections that have something to show."""
    made = [
        measured(found),
        similarity(found),
        checkpoints(found),
        routing(found),
        learning(found),
        tuning(found),
        runs(found),
    ]
    return [section for section in made if section is not None]
