"""The one error that a user of the embedded services is meant to see."""

from tapedeck.errors import TapedeckError


class EmbeddedError(TapedeckError):
    """A service can't be prepared, started or stopped.

    Its message says what happened, what that means and what to do: print it without a stack trace.
    """
