"""Keys and usage, whatever happens to the store and to the gateway: real processes, real databases, real faults."""

import asyncio
import json
import os
import resource
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any, NamedTuple

import psutil
import pytest

from gateway.store.base import UsageSum
from tests.fake_engine import FakeEngine
from tests.flow.admin import ADMIN, ask
from tests.postgres import Postgres
from tests.served import DEADLINE, KEY, Penstock, chat_body, close, http_post, simple_config, until
from tests.stores import open_store

SOON = 5.0  # seconds in which a change must be in force everywhere
PROMPT = "whatnobodybuttheenginemayread"


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


def config(*urls: str, store: str, more: str = "") -> str:
    return simple_config(*urls, more=f"admin_key: {ADMIN}\nstore: {store}\n{more}")


def file_store(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/store.db"


async def make_key(gateway: Penstock, name: str = "made", **fields: object) -> tuple[str, str]:
    """Its id and the key itself."""
    made = await ask(gateway, "/keys", "POST", {"name": name, **fields})
    assert made.status == 201, made.body
    return made.json["id"], made.json["key"]


async def sums(store: str) -> UsageSum:
    """Of all usage that is in the store."""
    opened = await open_store(store)
    try:
        return next(iter(await opened.usage(0, 4e9, ())), UsageSum((), 0, 0, 0, 0, 0, 0))
    finally:
        await opened.close()


class Told(NamedTuple):
    status: int
    error: str | None


async def chat(gateway: Penstock, key: str, **fields: object) -> Told:
    answer = await gateway.chat("hi", key, **fields)
    return Told(answer.status, answer.error["code"] if answer.status >= 400 else None)


class Load:
    """Requests with a key, by `clients` at a time, until the block ends; what came of them."""

    def __init__(self, gateway: Penstock, key: Callable[[], str], clients: int = 4) -> None:
        self.told: Counter[int] = Counter()
        self._gateway = gateway
        self._key = key
        self._clients = clients
        self._stopping = False

    @property
    def requests(self) -> int:
        return self.told.total()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Load"]:
        async with asyncio.TaskGroup() as group:
            for _ in range(self._clients):
                group.create_task(self._ask())
            try:
                yield self
            finally:
                self._stopping = True

    async def _ask(self) -> None:
        while not self._stopping:
            more = f"authorization: Bearer {self._key()}\r\nconnection: close\r\n"
            answer = await self._gateway.raw(
                http_post("/v1/chat/completions", chat_body("a b", max_tokens=3), key=None, more=more)
            )
            self.told[int(answer.split(b" ", 2)[1])] += 1

    async def more(self, requests: int) -> None:
        wanted = self.requests + requests

        async def enough() -> bool:
            return self.requests >= wanted

        await until(enough, 60)


async def test_a_new_key_works_at_once_and_a_revoked_one_no_longer(tmp_path: Path) -> None:
    async with FakeEngine() as engine, Penstock(config(engine.url, store=file_store(tmp_path))) as gateway:
        await gateway.ready()
        key_id, key = await make_key(gateway)
        assert await chat(gateway, key) == Told(200, None)
        assert (await ask(gateway, f"/keys/{key_id}", "DELETE")).status == 200
        assert await chat(gateway, key) == Told(401, "invalid_api_key")
        assert await chat(gateway, KEY) == Told(200, None)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_changes_reach_every_process_within_seconds(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store = file_store(tmp_path) if kind == "sqlite" else request.getfixturevalue("postgres").new_database()
    async with FakeEngine() as engine:
        text = config(engine.url, store=store)
        async with Penstock(text) as here, Penstock(text) as there:
            await here.ready()
            await there.ready()
            key_id, key = await make_key(here)

            async def works() -> bool:
                return (await chat(there, key)).status == 200

            async def refused() -> bool:
                return await chat(there, key) == Told(401, "invalid_api_key")

            await until(works, SOON)
            await ask(here, f"/keys/{key_id}", "DELETE")
            await until(refused, SOON)


async def test_a_key_ends_when_it_expires(tmp_path: Path) -> None:
    async with FakeEngine() as engine, Penstock(config(engine.url, store=file_store(tmp_path))) as gateway:
        await gateway.ready()
        _, key = await make_key(gateway, expires_in_seconds=1)
        assert (await chat(gateway, key)).status == 200

        async def refused() -> bool:
            return await chat(gateway, key) == Told(401, "invalid_api_key")

        await until(refused, SOON)


async def test_rotations_under_load_cost_no_request(tmp_path: Path) -> None:
    async with FakeEngine() as engine, Penstock(config(engine.url, store=file_store(tmp_path))) as gateway:
        await gateway.ready()
        key_id, key = await make_key(gateway)
        load = Load(gateway, lambda: key, clients=8)
        async with load.running():
            for _ in range(5):
                await load.more(60)
                rotated = await ask(gateway, f"/keys/{key_id}/rotate", "POST", {"overlap_seconds": 60})
                assert rotated.status == 200
                key = rotated.json["key"]
            await load.more(60)
        assert set(load.told) == {200}


async def stored(gateway: Penstock, store: str, requests: int) -> None:
    """The store holds that many requests, and what they used."""

    async def there() -> bool:
        return (await sums(store)).requests >= requests

    await until(there, 60)
    found = await sums(store)
    assert (found.requests, found.errors, found.completion) == (requests, 0, 3 * requests)


async def test_postgresql_stopped_and_paused_under_load(postgres: Postgres) -> None:
    store = postgres.new_database()
    async with FakeEngine() as engine, Penstock(config(engine.url, store=store)) as gateway:
        await gateway.ready()
        _, key = await make_key(gateway)
        load = Load(gateway, lambda: key)
        async with load.running():
            for down, up in ((postgres.stop, postgres.start), (postgres.pause, postgres.resume)):
                await load.more(50)
                await asyncio.to_thread(down)
                try:

                    async def unsure() -> bool:
                        return await chat(gateway, "sk-unknown-key") == Told(503, "store_unavailable")

                    await until(unsure)
                    await load.more(200)
                finally:
                    await asyncio.to_thread(up)

                async def sure() -> bool:
                    return await chat(gateway, "sk-unknown-key") == Told(401, "invalid_api_key")

                await until(sure)
        assert set(load.told) == {200}
        await stored(gateway, store, load.requests)


async def test_a_full_disk_under_load(tmp_path: Path) -> None:
    store = file_store(tmp_path)
    async with FakeEngine() as engine, Penstock(config(engine.url, store=store)) as gateway:
        await gateway.ready()
        _, key = await make_key(gateway)
        load = Load(gateway, lambda: key)
        process = psutil.Process(gateway.pid)
        async with load.running():
            await load.more(50)
            process.rlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            await gateway.logged(lambda line: line["message"] == "usage waits for the store")
            await load.more(300)
            assert (await ask(gateway, "/keys", "POST", {"name": "another"})).status == 503
            process.rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            await gateway.logged(lambda line: line["message"] == "usage is in the store again")
            await load.more(50)
        assert set(load.told) == {200}
        await stored(gateway, store, load.requests)


async def test_a_store_that_cannot_be_written_to(tmp_path: Path) -> None:
    """As a read-only one, which root's own processes never see: every write fails, reading works."""
    store = file_store(tmp_path)
    async with FakeEngine() as engine, Penstock(config(engine.url, store=store)) as gateway:
        await gateway.ready()
        _, key = await make_key(gateway)
        load = Load(gateway, lambda: key)
        with sqlite3.connect(tmp_path / "store.db", isolation_level=None) as other:
            for table in ("usage", "keys", "state"):
                for what in ("INSERT", "UPDATE"):
                    other.execute(
                        f"CREATE TRIGGER no_{what}_{table} BEFORE {what} ON {table} "
                        "BEGIN SELECT RAISE(ROLLBACK, 'attempt to write a readonly database'); END"
                    )
            async with load.running():
                await gateway.logged(lambda line: line["message"] == "usage waits for the store")
                await load.more(200)
                assert await chat(gateway, "sk-unknown-key") == Told(401, "invalid_api_key")  # it can be looked up
                for table in ("usage", "keys", "state"):
                    for what in ("INSERT", "UPDATE"):
                        other.execute(f"DROP TRIGGER no_{what}_{table}")
                await gateway.logged(lambda line: line["message"] == "usage is in the store again")
        other.close()
        assert set(load.told) == {200}
        await stored(gateway, store, load.requests)


async def test_a_start_without_the_store(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    store = f"sqlite:///{folder}/store.db"
    async with FakeEngine() as engine:
        folder.mkdir()
        async with Penstock(config(engine.url, store=store)) as gateway:
            await gateway.ready()
            _, key = await make_key(gateway)
        folder.rename(tmp_path / "elsewhere")
        async with Penstock(config(engine.url, store=store)) as gateway:
            await gateway.ready()
            assert await chat(gateway, KEY) == Told(200, None)
            answer = await gateway.chat("hi", key)
            assert (answer.status, answer.error["code"]) == (503, "store_unavailable")
            assert int(answer.headers["retry-after"]) > 0
            (tmp_path / "elsewhere").rename(folder)

            async def works() -> bool:
                return (await chat(gateway, key)).status == 200

            await until(works, SOON)


async def test_a_budget_is_overrun_by_one_request_at_most(tmp_path: Path) -> None:
    store = file_store(tmp_path)
    async with FakeEngine() as engine, Penstock(config(engine.url, store=store)) as gateway:
        await gateway.ready()
        budgets = [{"amount": 200, "unit": "tokens", "period": "month"}]
        _, key = await make_key(gateway, budgets=budgets)
        answers = await asyncio.gather(
            *(gateway.chat("a b c d", key, max_tokens=10, fake={"delay": 0.002}) for _ in range(60))
        )
        while answers[-1].status != 429 or answers[-1].headers.get("x-should-retry") != "false":
            answers.append(await gateway.chat("a b c d", key, max_tokens=10))
        used = sum(answer.json["usage"]["total_tokens"] for answer in answers if answer.status == 200)
        largest = max(answer.json["usage"]["total_tokens"] for answer in answers if answer.status == 200)
        assert 200 <= used < 200 + largest
        refusals = [answer for answer in answers if answer.status != 200]
        assert {answer.status for answer in refusals} == {429}
        assert {answer.error["code"] for answer in refusals} == {"insufficient_quota"}
        assert {answer.error["type"] for answer in refusals} == {"insufficient_quota"}
        await gateway.logged(lambda line: line["message"] == "serving")
        gateway.signal(SIGKILL)
        await gateway.exit_code()
        # another process goes by what this one used
        async with Penstock(config(engine.url, store=store)) as later:
            await later.ready()
            assert await chat(later, key) == Told(429, "insufficient_quota")


async def test_money_is_what_the_config_s_prices_make_of_tokens(tmp_path: Path) -> None:
    store = file_store(tmp_path)
    async with FakeEngine() as engine:
        text = config(engine.url, store=store).replace(
            "aliases: [default]", "aliases: [default]\n    price: {prompt: 1.5, completion: 10}"
        )
        async with Penstock(text) as gateway:
            await gateway.ready()
            usage = (await gateway.chat("a b c", max_tokens=7)).json["usage"]

            async def there() -> bool:
                return (await sums(store)).requests == 1

            await until(there)
            assert (await sums(store)).cost == round(1.5 * usage["prompt_tokens"] + 10 * usage["completion_tokens"])
            models = (await ask(gateway, "/models")).json["data"]
            assert models[0]["price"] == {"prompt": 1.5, "completion": 10.0, "cached": 1.5}


async def test_an_ordinary_config_leaves_no_database(tmp_path: Path) -> None:
    async with FakeEngine() as engine, Penstock(simple_config(engine.url)) as gateway:
        await gateway.ready()
        assert (await gateway.chat()).status == 200
        assert not [path.name for path in gateway.folder.iterdir() if path.name.startswith("penstock.db")]


async def test_no_key_and_no_prompt_anywhere(tmp_path: Path) -> None:
    store = file_store(tmp_path)
    async with FakeEngine() as engine, Penstock(config(engine.url, store=store)) as gateway:
        await gateway.ready()
        key_id, key = await make_key(gateway)
        assert (await gateway.chat(PROMPT, key, max_tokens=2)).status == 200
        assert (await gateway.chat(PROMPT, KEY, max_tokens="many")).status == 400
        assert (await gateway.chat(PROMPT, "sk-wrong-" + PROMPT)).status == 401
        rotated = (await ask(gateway, f"/keys/{key_id}/rotate", "POST", {"overlap_seconds": 60})).json["key"]
        said = [
            (await ask(gateway, path)).body for path in ("/keys", f"/keys/{key_id}", "/requests", "/audit", "/config")
        ]
        said.append((await gateway.get("/metrics")).body)
        await gateway.access_log(3)
        gateway.signal(SIGKILL)
        await gateway.exit_code()
        said.append(json.dumps(gateway.log).encode())
        said += [path.read_bytes() for folder in (gateway.folder, tmp_path) for path in folder.rglob("*") if path.is_file() and path != gateway.config]  # fmt: skip
        everything = b"\n".join(said)
        assert key_id.encode() in everything
        for secret in (key, rotated, KEY, ADMIN, PROMPT):
            assert secret.encode() not in everything
            assert secret[6:-6].encode() not in everything


class Campaign:
    """Requests of every kind, and what their clients know of them, by request id."""

    KINDS: tuple[dict[str, Any], ...] = (
        {},
        {"stream": True},
        {"stream": True, "fake": {"cut_after": 2}},  # goes on elsewhere
        {"fake": {"status": 500}},
        {"fake": {"accept_then_close": True}},
        {"stream": True, "leave": True, "fake": {"delay": 0.01}},
        {"max_tokens": "many"},
    )

    def __init__(self) -> None:
        self.sent: set[str] = set()
        self.finished: set[str] = set()  # the whole answer came, of whatever kind
        self.left: set[str] = set()

    async def one(self, gateway: Penstock, number: int) -> None:
        fields = {"max_tokens": 5, **self.KINDS[number % len(self.KINDS)]}
        leave = fields.pop("leave", False)
        name = f"request-{number}"
        more = f"connection: close\r\nx-request-id: {name}\r\n"
        answer = b""
        with suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await gateway.connect()
            self.sent.add(name)
            try:
                writer.write(http_post("/v1/chat/completions", chat_body("a b", **fields), more=more))
                async with asyncio.timeout(DEADLINE):
                    if leave:
                        await reader.readuntil(b"t0")
                        self.left.add(name)
                    else:
                        answer = await reader.read(-1)
            finally:
                await close(writer)
        if answer.endswith((b"0\r\n\r\n", b"}")):
            self.finished.add(name)


@pytest.mark.slow
async def test_five_thousand_mixed_requests_and_five_kills_of_the_gateway(tmp_path: Path) -> None:
    requests, clients, kills = 5000, 16, 5
    store, campaign = file_store(tmp_path), Campaign()
    numbers = iter(range(requests))
    async with FakeEngine(replicas=2) as engine:
        text = config(*engine.urls, store=store)
        for part in range(1, kills + 2):
            end = part * requests // (kills + 1)
            async with Penstock(text) as gateway:
                await gateway.ready()
                dead = asyncio.Event()

                async def client(gateway: Penstock = gateway, end: int = end, dead: asyncio.Event = dead) -> None:
                    while not dead.is_set() and (number := next(numbers, None)) is not None:
                        await campaign.one(gateway, number)
                        if number >= end:
                            dead.set()

                async with asyncio.TaskGroup() as group:
                    for _ in range(clients):
                        group.create_task(client())
                    if part <= kills:
                        await dead.wait()
                        gateway.signal(SIGKILL)
                        await gateway.exit_code()
                if part > kills:
                    gateway.signal(SIGTERM)
                    assert await gateway.exit_code() == 0
    with sqlite3.connect(tmp_path / "store.db") as database:
        rows = database.execute("SELECT request_id, outcome, prompt, completion FROM usage").fetchall()
    database.close()
    ids = [row[0] for row in rows]
    assert len(ids) == len(set(ids))
    assert set(ids) <= campaign.sent
    # Only what was open at a kill may be unknown, and be it that its last bytes were just going out.
    assert len(campaign.finished - set(ids)) <= kills
    assert len(campaign.sent - campaign.left - set(ids)) <= kills * clients
    assert len(campaign.left - set(ids)) <= kills * clients  # whose leaving the gateway may not have seen yet
    assert len(campaign.sent) >= requests - kills * clients
    # Tokens are the engines' own count, each once, those of answers that went on elsewhere too.
    assert {row[2:] for row in rows if row[1] == "completed"} == {(2, 5)}  # "a b"
    assert {row[1] for row in rows} == {"completed", "client_cancelled", "engine_failed", "refused"}
    found = await sums(store)
    assert (found.requests, found.prompt, found.completion) == (len(rows), *map(sum, list(zip(*rows, strict=True))[2:]))
    assert os.listdir(tmp_path / "store.db.spool") == []
