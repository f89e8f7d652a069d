"""Errors that a user can act on.

`UserError` is the base of everything that is the user's to mend: wrong params, a missing file, a
model that cannot fit. The command line prints its text without a traceback and exits with 2, so the
text names the thing and the way out.
"""


class UserError(ValueError):
    """Something the user asked for cannot be done; the message says what to change."""


class ArtifactError(UserError):
    """An artifact is missing, damaged, foreign or of another version."""
