"""What ends a command: one line on stderr, and exit code 1."""


class Problem(Exception):  # noqa: N818 - its text is for a person, not for a program
    """What is wrong, and what to do about it."""
