"""The one exception of this room."""


class DataError(ValueError):
    """Something about the user's data is wrong. The message says what, where, and what to do; the CLI prints it alone and exits with 2."""
