"""The commands, in the order that --help lists them. Each imports what it needs when it runs, so that `--help` stays instant."""

from moerge.cli.commands import (
    adapters,
    comparison,
    demo,
    doctor,
    evaluation,
    exporting,
    extending,
    hub,
    learning,
    merging,
    reducing,
    reporting,
    running,
    searching,
    statistics,
    tuning,
)

COMMANDS = (
    *merging.COMMANDS,
    *comparison.COMMANDS,
    *learning.COMMANDS,
    *reducing.COMMANDS,
    *extending.COMMANDS,
    *searching.COMMANDS,
    *tuning.COMMANDS,
    *adapters.COMMANDS,
    *running.COMMANDS,
    *statistics.COMMANDS,
    *evaluation.COMMANDS,
    *reporting.COMMANDS,
    *exporting.COMMANDS,
    *hub.COMMANDS,
    demo.demo,
    *doctor.COMMANDS,
)
