"""How the tables came to be: alembic's, run by `gateway.store.db` on a connection that holds the lock."""
