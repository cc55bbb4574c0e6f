"""Penstock: an OpenAI-compatible serving gateway for LLMs."""

from gateway import compiled

__version__ = "0.1.0"

COMPILED = compiled.use()  # before any of what it finds is imported
