"""Errors that a user can act on: shown as one line, without a stack trace."""


class TapedeckError(Exception):
    """Something outside failed (exit code 1): what happened, what it means, what to do."""

    exit_code = 1


class UsageError(TapedeckError):
    """Wrong use or configuration (exit code 2); trying again will not help."""

    exit_code = 2
