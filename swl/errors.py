"""The errors that are swl's own; everything else is a plain ValueError, TypeError or RuntimeError."""


class BackendUnavailable(RuntimeError):  # noqa: N818 - the name is public API and reads as a state
    """A backend was asked for that cannot run here; the message gives the cause and the remedy."""
