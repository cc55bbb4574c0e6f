"""Counting tokens: what a request will cost, what it did cost, and the books."""
