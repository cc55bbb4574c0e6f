"""The ASGI door: HTTP in, a call, HTTP out. No decisions."""
