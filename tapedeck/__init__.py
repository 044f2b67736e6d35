"""The command line, the settings and the shell that every process of the line shares."""

__version__ = "0.1.0"
