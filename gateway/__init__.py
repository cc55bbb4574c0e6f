"""Penstock: an OpenAI-compatible serving gateway for LLMs."""

__version__ = "0.1.0"
