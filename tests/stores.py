"""Opening a store for a test."""

from gateway.store.db import Store


async def open_store(url: str) -> Store:
    """One that is there and up to date. Raises what its first call raises."""
    store = Store(url)
    try:
        await store.version()
    except BaseException:
        await store.close()
        raise
    return store
