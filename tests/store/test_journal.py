"""Rows between a request's end and the store: what is added is there after any death, and goes to the store once."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from gateway.store.base import UsageRow
from gateway.store.journal import Journal
from tests.served import ROOT

SMALL = 4096  # bytes of a segment


def fields(number: int) -> tuple[object, ...]:
    """A `UsageRow` without its id."""
    return (
        1.5,
        f"req-{number}",
        "key_1",
        None,
        "tiny",
        "/v1/chat/completions",
        200,
        "completed",
        None,
        "tiny/0",
        number,
        5,
        0,
        0,
        None,
        0.25,
        1,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def drain(journal: Journal) -> list[UsageRow]:
    rows = []
    for batch in journal.batches(journal.cut()):
        rows += batch.rows
        batch.segment.finish(batch)
    return rows


def numbers(rows: list[UsageRow]) -> list[int]:
    return [row.prompt for row in rows]


def test_rows_come_out_as_they_went_in_once(folder: Path) -> None:
    journal = Journal(folder)
    journal.append(fields(7))
    rows = drain(journal)
    assert rows == [UsageRow(rows[0].row_id, *fields(7))]  # type: ignore[arg-type]
    assert drain(journal) == []
    assert journal.waiting == 0
    journal.close()


@pytest.mark.parametrize("on_disk", [True, False])
def test_more_rows_than_a_segment_holds(folder: Path, on_disk: bool) -> None:
    journal = Journal(folder if on_disk else None, SMALL)
    for number in range(1000):
        journal.append(fields(number))
    rows = drain(journal)
    assert numbers(rows) == list(range(1000))
    ids = [row.row_id for row in rows]
    assert ids == sorted(set(ids))
    assert not on_disk or len(list(folder.iterdir())) == 1  # what was drained is gone
    journal.close()
    assert not on_disk or list(folder.iterdir()) == []


def test_a_cut_leaves_what_came_after_it(folder: Path) -> None:
    journal = Journal(folder, SMALL)
    journal.append(fields(1))
    cut = journal.cut()
    for number in range(2, 100):
        journal.append(fields(number))
    rows = []
    for batch in journal.batches(cut):
        rows += batch.rows
        batch.segment.finish(batch)
    assert numbers(rows) == [1]
    assert numbers(drain(journal)) == list(range(2, 100))
    journal.close()


def test_what_was_not_stored_comes_again_under_the_same_ids(folder: Path) -> None:
    journal = Journal(folder, SMALL)
    for number in range(100):
        journal.append(fields(number))
    first = next(journal.batches(journal.cut()))  # the store failed: not finished
    again = drain(journal)
    assert again[: len(first.rows)] == first.rows
    journal.close()


def test_the_next_start_finds_what_waits(folder: Path) -> None:
    journal = Journal(folder, SMALL)
    for number in range(100):
        journal.append(fields(number))
    batch = next(journal.batches(journal.cut()))
    batch.segment.finish(batch)
    journal.close()
    later = Journal(folder, SMALL)
    assert later.adopt() > 0
    rows = drain(later)
    assert sorted(numbers(rows)) == list(range(len(batch.rows), 100))
    later.close()
    assert list(folder.iterdir()) == []


def test_a_living_process_keeps_its_own(folder: Path) -> None:
    mine, other = Journal(folder), Journal(folder)
    mine.append(fields(1))
    assert other.adopt() == 0
    assert mine.adopt() == 0
    assert numbers(drain(mine)) == [1]
    mine.close()
    other.close()


KILLED = """
import sys
from pathlib import Path
from gateway.store.journal import Journal
from tests.store.test_journal import fields
journal = Journal(Path(sys.argv[1]), 1 << 16)
for number in range(10**9):
    journal.append(fields(number))
    if number % 64 == 0:
        print(number, flush=True)
"""


def test_kill_9_loses_no_row_that_was_added(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{ROOT}"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 20_000:
            process.send_signal(signal.SIGKILL)
            break
    told = int(line)
    rest, _ = process.communicate()
    told = max([told, *map(int, rest.split(b"\n")[:-1])])  # lines that the pipe still held
    journal = Journal(folder)
    journal.adopt()
    found = sorted(numbers(drain(journal)))
    assert found == list(range(len(found)))
    assert len(found) > told
    journal.close()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_file_costs_the_damaged_rows_alone(data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "spool"
        journal = Journal(folder, SMALL)
        for number in range(15):
            journal.append(fields(number))
        path = next(folder.iterdir())
        journal.close()
        content = bytearray(path.read_bytes())
        start = data.draw(st.integers(16, content.rindex(b"\n")))
        length = data.draw(st.integers(1, 300))
        hit = content[16:start].count(b"\n"), content[16 : start + length].count(b"\n")
        content[start : start + length] = bytes(length)
        path.write_bytes(content[:SMALL])
        later = Journal(folder, SMALL)
        later.adopt()
        found = sorted(numbers(drain(later)))
        assert set(range(15)) - set(found) <= set(range(hit[0], hit[1] + 1))
        later.close()
        assert list(folder.iterdir()) == []


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files may not grow beyond a page, as on a disk without room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("full_disk")
def test_on_a_full_disk_rows_wait_in_memory(folder: Path) -> None:
    journal = Journal(folder, 4 * SMALL)
    for number in range(300):
        journal.append(fields(number))
    assert journal.lost == 0
    assert list(folder.iterdir()) == []
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    journal.tidy()
    journal.append(fields(300))
    assert len(list(folder.iterdir())) == 1  # and on disk again, once there is room
    journal.close()  # with the store still down
    later = Journal(folder, 4 * SMALL)
    later.adopt()
    assert sorted(numbers(drain(later))) == list(range(301))
    later.close()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "not" / "there")
    journal.append(fields(1))
    journal.tidy()
    assert numbers(drain(journal)) == [1]
    journal.close()


def test_memory_is_bounded_and_what_is_lost_is_counted() -> None:
    journal = Journal(None, SMALL, most_in_memory=3)
    for number in range(1000):
        journal.append(fields(number))
    kept = numbers(drain(journal))
    assert kept == list(range(len(kept)))
    assert journal.lost == 1000 - len(kept) > 0
    journal.append(fields(5))  # there is room again
    assert numbers(drain(journal)) == [5]
    journal.close()


def test_a_row_larger_than_a_segment_is_lost_alone() -> None:
    journal = Journal(None, SMALL)
    journal.append(("x" * SMALL, *fields(1)[1:]))
    journal.append(fields(2))
    assert numbers(drain(journal)) == [2]
    assert journal.lost == 1
    journal.close()
