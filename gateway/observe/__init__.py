"""What operators see: metrics, the program's log, the access log."""
