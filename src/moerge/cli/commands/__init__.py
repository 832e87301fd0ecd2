"""The commands, in the order that --help lists them. Each imports what it needs when it runs, so that `--help` stays instant."""

from moerge.cli.commands import demo, merging, running

COMMANDS = (*merging.COMMANDS, *running.COMMANDS, demo.demo)
