"""The configuration file: its schema, and the way from text to a checked `Config`."""
