"""`python -m tapedeck`."""

from tapedeck.cli import main

main()
