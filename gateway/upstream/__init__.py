"""The only room that opens connections to engines for requests."""
