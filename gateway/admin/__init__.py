"""The admin API and the dashboard: what an operator sees and does. Off the request path."""
