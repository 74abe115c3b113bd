"""The one error of this package."""


class HubError(Exception):
    """One sentence that tells the user what is missing and what would help."""
