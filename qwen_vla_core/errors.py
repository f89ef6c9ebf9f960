"""One exception for what a user can fix; everything else is a bug and keeps its traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a file, flag or set-up. The message is one line that names the key or flag and the fix."""
