"""`python -m moerge`."""

from moerge.cli import main

main()
