"""Oracles: one file an oracle."""
