"""What has been used, by whom and of what: sums over the ledger."""

import csv
import io
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, get_args

from fastapi import APIRouter, Query
from pydantic import AfterValidator, ConfigDict, Field
from starlette.responses import Response

from gateway.admin.accounts import FROM_CONFIG, money
from gateway.admin.context import Admin
from gateway.admin.shapes import Asked, Said, instant, iso
from gateway.errors import GatewayError
from gateway.store.base import Group, UsageSum

GROUPS: Final[tuple[str, ...]] = get_args(Group)
SPAN: Final = 30 * 86_400  # seconds, where no `from` is given
LONGEST: Final = 10 * 366 * 86_400
SUMS: Final = ("requests", "errors", "prompt_tokens", "completion_tokens", "cached_tokens", "cost")

_DATE: Final = re.compile(r"\d{4}-\d\d-\d\d([Tt ]\d\d:\d\d(:\d\d(\.\d{1,6})?)?([Zz]|[+-]\d\d:\d\d))?")


def _date(value: str) -> str:
    if not _DATE.fullmatch(value):
        raise ValueError("must be a day such as 2026-12-31, or a time such as 2026-12-31T12:00:00Z")
    instant(value)
    return value


def _groups(value: str) -> str:
    names = value.split(",")
    if not set(names) <= set(GROUPS):
        raise ValueError(f"must be one or more of {', '.join(GROUPS)}, with commas between")
    if len(set(names)) != len(names):
        raise ValueError("must name each group once")
    return value


Date = Annotated[str, AfterValidator(_date)]


class UsageAsked(Asked):
    model_config = ConfigDict(strict=False)  # a query holds text alone

    start: Date | None = Field(default=None, alias="from", description="The first moment; by default, 30 days ago.")
    end: Date | None = Field(
        default=None, alias="to", description="The first moment that is not in it; by default, now."
    )
    group_by: Annotated[str, AfterValidator(_groups)] = Field(
        default="key", description=f"One or more of {', '.join(GROUPS)}, with commas between."
    )
    format: Literal["json", "csv"] = "json"


class Sums(Said):
    requests: int
    errors: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cost: float


class Usage(Said):
    start: str = Field(serialization_alias="from")
    end: str = Field(serialization_alias="to")
    group_by: list[Group]
    data: list[dict[str, Any]]
    total: Sums


def period(asked: UsageAsked, now: float) -> tuple[float, float]:
    """The first second and the first that is no longer meant: sums are kept by the hour, so it begins with a whole one.
    Raises `GatewayError`."""
    end = now if asked.end is None else instant(asked.end)
    start = end - SPAN if asked.start is None else instant(asked.start)
    start -= start % 3600
    if not start < end:
        raise GatewayError(400, "invalid_value", "Invalid value for 'from': must lie before 'to'.", param="from")
    if end - start > LONGEST:
        raise GatewayError(400, "invalid_value", "Invalid value for 'from': at most 10 years at once.", param="from")
    return start, end


def sums(one: UsageSum) -> dict[str, Any]:
    return dict(zip(SUMS, (*one[1:6], money(one.cost)), strict=True))


def rows(
    found: Iterable[UsageSum], groups: Sequence[str], name: Callable[[str, str], str | None]
) -> list[dict[str, Any]]:
    """`name`: from a group and what the store calls its members to what people call them."""
    return [
        {group: name(group, member) for group, member in zip(groups, one.group, strict=True)} | sums(one)
        for one in found
    ]


def total(found: Iterable[UsageSum]) -> UsageSum:
    columns = list(zip(*(one[1:] for one in found), strict=True))
    return UsageSum((), *map(sum, columns)) if columns else UsageSum((), 0, 0, 0, 0, 0, 0)


def as_csv(groups: Sequence[str], data: Iterable[dict[str, Any]]) -> str:
    """For spreadsheets: a text that one would take for a formula is marked as text."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow([*groups, *SUMS])
    for row in data:
        writer.writerow([_cell(row[name]) for name in (*groups, *SUMS)])
    return out.getvalue()


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value


def called(group: str, member: str, names: Mapping[str, str]) -> str | None:
    """A key or team by its name where it has one; nothing for what is in no team."""
    if group in ("key", "team"):
        return names.get(member, member.removeprefix(FROM_CONFIG)) or None
    return member


def router(admin: Admin) -> APIRouter:
    api = APIRouter()

    @api.get(
        "/usage",
        response_model=Usage,
        responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}, "description": "JSON or CSV"}},
    )
    async def usage(asked: Annotated[UsageAsked, Query()]) -> Any:
        """Sums by hour, day, key, team, model, or several of these."""
        start, end = period(asked, time.time())
        groups: list[Any] = asked.group_by.split(",")
        await admin.held.settle()
        found = await admin.store.usage(start, end, groups)
        names = {key.id: key.name for key in admin.held.keys.values()}
        names |= {team.id: team.name for team in admin.held.teams.values()}
        data = rows(found, groups, lambda group, member: called(group, member, names))
        if asked.format == "csv":
            name = f"usage-{iso(start)[:10]}-{iso(end)[:10]}.csv"
            return Response(
                as_csv(groups, data),
                media_type="text/csv; charset=utf-8",
                headers={"content-disposition": f'attachment; filename="{name}"'},
            )
        return Usage(start=iso(start), end=iso(end), group_by=groups, data=data, total=Sums(**sums(total(found))))

    return api
