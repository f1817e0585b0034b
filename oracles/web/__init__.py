"""``web``: people judge on a page in their browsers (``oracles.web.oracle``)."""

from oracles.web.oracle import Closed, WebOracle

__all__ = ["Closed", "WebOracle"]
