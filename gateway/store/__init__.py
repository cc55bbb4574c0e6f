"""Keys, teams, use and the audit trail: the only SQL."""
