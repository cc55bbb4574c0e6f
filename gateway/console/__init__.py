"""The admin API from a terminal: `penstock keys`, `teams`, `usage`, `requests`, `engines`, `reload`, `top`."""
