"""The one error of this package."""


class ConnectorStartError(ValueError):
    """vLLM can't start like this; the message says why, and what to do instead."""
