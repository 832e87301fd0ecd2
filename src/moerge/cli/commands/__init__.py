"""The commands, in the order that --help lists them. Each imports what it needs when it runs, so that `--help` stays instant."""

from moerge.cli.commands import adapters, demo, hub, learning, merging, running, statistics

COMMANDS = (
    *merging.COMMANDS,
    *learning.COMMANDS,
    *adapters.COMMANDS,
    *running.COMMANDS,
    *statistics.COMMANDS,
    *hub.COMMANDS,
    demo.demo,
)
