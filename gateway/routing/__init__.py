"""Which model, which replica: decisions over snapshots, without I/O."""
