"""Keys and teams: from what an operator asks for to what the store keeps, and back. Pure."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from gateway.admin.shapes import Asked, Said, instant, iso
from gateway.errors import GatewayError
from gateway.keys import Status, make_id, make_secret, status
from gateway.limits.base import Limits
from gateway.limits.memory import BudgetUse
from gateway.store.base import Budget, KeyRecord, Period, Spent, TeamRecord, Unit

FROM_CONFIG: Final = "config:"  # how ids of keys begin that stand in the config
NOTHING: Final = Spent()
MICRO: Final = 1_000_000  # micro-units in a unit of money
MAX_AMOUNT: Final = 1e12
MAX_SECONDS: Final = 10 * 366 * 86_400

_PATTERN: Final = re.compile(r"[A-Za-z0-9*][A-Za-z0-9._:/@*-]{0,127}")
_MOMENT: Final = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d(:\d\d(\.\d{1,6})?)?([Zz]|[+-]\d\d:\d\d)")


# ---- what comes in


def _text(value: str) -> str:
    if value != value.strip() or not value.isprintable():
        raise ValueError("must be text on one line, without control characters and without spaces around it")
    return value


def _pattern(value: str) -> str:
    if not _PATTERN.fullmatch(value):
        raise ValueError("must be the name of a model or an alias, in which * stands for any characters")
    return value


def _moment(value: object) -> float:
    if not isinstance(value, str) or not _MOMENT.fullmatch(value):
        raise ValueError("must be a time with its offset from UTC, such as 2026-12-31T23:59:59Z")
    return instant(value)


Name = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_text)]
Note = Annotated[str, Field(max_length=1000), AfterValidator(_text)]
Pattern = Annotated[str, AfterValidator(_pattern)]
Patterns = Annotated[list[Pattern], Field(min_length=1, max_length=100)]
Moment = Annotated[
    float,
    BeforeValidator(_moment, json_schema_input_type=Annotated[str, Field(json_schema_extra={"format": "date-time"})]),
]


class LimitsAsked(Asked):
    """An absent limit stays as it is; null is no limit."""

    requests_per_minute: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1, le=1_000_000_000_000)] | None = None
    parallel_requests: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


class BudgetAsked(Asked):
    amount: float = Field(gt=0, le=MAX_AMOUNT, description="Tokens, or money in the unit of the config's prices.")
    unit: Unit
    period: Period = Field(description="Days and months are UTC's.")

    @model_validator(mode="after")
    def _is_countable(self) -> Self:
        if self.unit == "tokens" and self.amount != int(self.amount):
            raise ValueError("amount must be a whole number of tokens")
        if self.unit == "money" and not round(self.amount * MICRO):
            raise ValueError(f"amount must be at least {1 / MICRO:f}")
        return self


def _budgets_differ(budgets: list[BudgetAsked]) -> list[BudgetAsked]:
    if len({(one.unit, one.period) for one in budgets}) != len(budgets):
        raise ValueError("must hold at most one budget of each unit and period")
    return budgets


Budgets = Annotated[list[BudgetAsked], Field(max_length=6), AfterValidator(_budgets_differ)]


class TeamAsked(Asked):
    """Fields to set; what is absent stays as it is, null clears."""

    name: Name = ""
    note: Note | None = None
    models: Patterns | None = None
    limits: LimitsAsked | None = None
    budgets: Budgets | None = None


class KeyAsked(TeamAsked):
    """Fields to set; what is absent stays as it is, null clears."""

    team: Name | None = Field(default=None, description="A team's name.")
    owner: Note | None = None
    expires_at: Moment | None = None
    expires_in_seconds: Annotated[int, Field(ge=1, le=MAX_SECONDS)] | None = None


class NewTeam(TeamAsked):
    """A team to make."""

    name: Name


class NewKey(KeyAsked):
    """A key to make."""

    name: Name


class RotationAsked(Asked):
    overlap_seconds: Annotated[int, Field(ge=0, le=365 * 86_400, description="So long the old key still works.")] = 0


# ---- what is kept


def judge_models(patterns: Sequence[str], known: Collection[str]) -> None:
    """Raises `GatewayError` for a name that is no model, alias or pattern."""
    for index, pattern in enumerate(patterns):
        if "*" not in pattern and pattern not in known:
            raise GatewayError(
                400,
                "invalid_value",
                f"Invalid value for 'models[{index}]': there is no model or alias '{pattern}'. "
                f"Known are: {', '.join(sorted(known)[:30])}.",
                param=f"models[{index}]",
            )


def expiry(asked: KeyAsked, now: float, before: float | None) -> float | None:
    """Seconds since the epoch. Raises `GatewayError` for a time that has passed, and for two of them."""
    if asked.expires_in_seconds is not None:
        if asked.expires_at is not None:
            raise GatewayError(
                400,
                "invalid_value",
                "Invalid value for 'expires_in_seconds': 'expires_at' is given as well; send one of the two.",
                param="expires_in_seconds",
            )
        return now + asked.expires_in_seconds
    if not {"expires_at", "expires_in_seconds"} & asked.model_fields_set:
        return before
    if asked.expires_at is not None and asked.expires_at <= now:
        raise GatewayError(
            400, "invalid_value", "Invalid value for 'expires_at': must lie in the future.", param="expires_at"
        )
    return asked.expires_at


def _limits(asked: TeamAsked, before: Limits) -> Limits:
    if "limits" not in asked.model_fields_set:
        return before
    if asked.limits is None:
        return Limits()
    return before._replace(**asked.limits.model_dump(exclude_unset=True))


def _budgets(asked: TeamAsked, before: tuple[Budget, ...]) -> tuple[Budget, ...]:
    if "budgets" not in asked.model_fields_set:
        return before
    return tuple(
        Budget(round(one.amount * (MICRO if one.unit == "money" else 1)), one.unit, one.period)
        for one in asked.budgets or ()
    )


def _common(asked: TeamAsked, before: TeamRecord | KeyRecord) -> dict[str, Any]:
    given = asked.model_fields_set
    return {
        "name": asked.name if "name" in given else before.name,
        "note": (asked.note or "") if "note" in given else before.note,
        "models": tuple(dict.fromkeys(asked.models or ["*"])) if "models" in given else before.models,
        "limits": _limits(asked, before.limits),
        "budgets": _budgets(asked, before.budgets),
    }


def changed_team(before: TeamRecord, asked: TeamAsked) -> TeamRecord:
    return replace(before, **_common(asked, before))


def changed_key(before: KeyRecord, asked: KeyAsked, team_id: str | None, now: float) -> KeyRecord:
    """`team_id`: of the team that is asked for, where one is. Raises `GatewayError`."""
    given = asked.model_fields_set
    return replace(
        before,
        **_common(asked, before),
        team_id=team_id if "team" in given else before.team_id,
        owner=(asked.owner or "") if "owner" in given else before.owner,
        expires_at=expiry(asked, now, before.expires_at),
    )


def blank_team(now: float) -> TeamRecord:
    return TeamRecord(make_id("team"), "", "", ("*",), Limits(), (), now)


def blank_key(key: str, now: float) -> KeyRecord:
    return KeyRecord(make_id("key"), "", (make_secret(key),), None, "", "", ("*",), Limits(), (), now, None, None)


# ---- what goes out


class LimitsShown(Said):
    requests_per_minute: int | None
    tokens_per_minute: int | None
    parallel_requests: int | None


class BudgetShown(Said):
    amount: int | float
    unit: Unit
    period: Period
    used: int | float
    resets_at: str | None


class UsedNow(Said):
    """In the current minute; null where it is not counted."""

    requests: int | None
    tokens: int | None
    parallel: int | None


class KeyShown(Said):
    id: str
    name: str
    team: str | None
    owner: str | None
    note: str | None
    models: list[str]
    limits: LimitsShown
    budgets: list[BudgetShown]
    last4: str | None
    created_at: str | None
    expires_at: str | None
    revoked_at: str | None
    status: Status
    source: Literal["store", "config"]
    now: UsedNow


class KeyMade(KeyShown):
    key: str = Field(description="The whole key. It is shown this once.")


class KeyRotated(KeyMade):
    old_valid_until: str | None = Field(description="null: the old key has ended.")


class Keys(Said):
    data: list[KeyShown]


class TeamShown(Said):
    id: str
    name: str
    note: str | None
    models: list[str]
    limits: LimitsShown
    budgets: list[BudgetShown]
    created_at: str
    keys: int


class Teams(Said):
    data: list[TeamShown]


def resets_at(period: Period, now: float) -> float | None:
    """When a budget's period ends; None: never."""
    today = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        return (today + timedelta(days=1)).timestamp()
    if period == "month":
        return (today.replace(day=1) + timedelta(days=32)).replace(day=1).timestamp()
    return None


def money(micro: int) -> float:
    return micro / MICRO


def limits_shown(limits: Limits) -> LimitsShown:
    return LimitsShown(**limits._asdict())


def budget_use(budgets: Sequence[Budget], spent: Mapping[Period, Spent], now: float) -> list[BudgetUse]:
    """As the store knows it."""
    return [
        BudgetUse(one, spent.get(one.period, NOTHING)[one.unit == "money"], resets_at(one.period, now))
        for one in budgets
    ]


def budgets_shown(used: Iterable[BudgetUse]) -> list[BudgetShown]:
    return [
        BudgetShown(
            amount=money(one.budget.amount) if one.budget.unit == "money" else one.budget.amount,
            unit=one.budget.unit,
            period=one.budget.period,
            used=money(one.spent) if one.budget.unit == "money" else one.spent,
            resets_at=_iso_or_none(one.resets_at),
        )
        for one in used
    ]


def key_shown(record: KeyRecord, team: str | None, budgets: Iterable[BudgetUse], used: UsedNow, now: float) -> KeyShown:
    return KeyShown(
        id=record.id,
        name=record.name,
        team=team,
        owner=record.owner or None,
        note=record.note or None,
        models=list(record.models),
        limits=limits_shown(record.limits),
        budgets=budgets_shown(budgets),
        last4=record.secrets[0].last4 if record.secrets else None,
        created_at=iso(record.created_at),
        expires_at=_iso_or_none(record.expires_at),
        revoked_at=_iso_or_none(record.revoked_at),
        status=status(record, now),
        source="store",
        now=used,
    )


def team_shown(record: TeamRecord, budgets: Iterable[BudgetUse], keys: int) -> TeamShown:
    return TeamShown(
        id=record.id,
        name=record.name,
        note=record.note or None,
        models=list(record.models),
        limits=limits_shown(record.limits),
        budgets=budgets_shown(budgets),
        created_at=iso(record.created_at),
        keys=keys,
    )


def _iso_or_none(seconds: float | None) -> str | None:
    return None if seconds is None else iso(seconds)
