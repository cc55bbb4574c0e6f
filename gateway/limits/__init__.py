"""Limits on requests, tokens and parallel requests."""
