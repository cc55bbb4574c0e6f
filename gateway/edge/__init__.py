"""The fast door: a uvicorn protocol class that guards the socket and short-cuts the inference endpoints."""
