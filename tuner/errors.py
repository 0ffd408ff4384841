"""The errors a user may see. Each message is one line: what, which value, what was expected, the way out."""


class TunerError(Exception):
    """Something failed while running; the command line prints the message and exits with 1."""

    exit_code = 1


class UsageError(TunerError):
    """The request itself is wrong (unsupported head dim, unknown format, ...); exit code 2."""

    exit_code = 2
