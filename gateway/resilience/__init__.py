"""What happens when an engine does not: decisions only, no I/O."""
