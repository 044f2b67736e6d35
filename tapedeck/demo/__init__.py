"""`tapedeck demo`: the whole line as child processes, a live table, and at the end the accounting."""

from tapedeck.demo.run import DemoOptions, run

__all__ = ["DemoOptions", "run"]
