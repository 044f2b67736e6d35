"""Figures, measured by programs that print a table: `make bench`, or one of them with `python -m bench.NAME`."""
