"""`GET /v1/account`, `/v1/usage` and `/v1/keys`: an account, read with one of its own keys."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

import msgspec
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response

from unmask.accounts import Accounts, keys, people, usage
from unmask.accounts.keys import Key
from unmask.accounts.money import format_dollars
from unmask.accounts.taint import TaintedAnswers, tainted_answers, tainted_windows
from unmask.api.charging import Charging
from unmask.api.download import csv_file, csv_response
from unmask.api.errors import ApiError
from unmask.api.schema import AccountInfo, KeyInfo, KeyList, Minute, TaintedUsage, UsageReport, UsageRow
from unmask.errors import UsageError
from unmask.router import ModelRegistry, PublicNames
from unmask.storage.database import now_ms

_DEFAULT_DAYS = 30


@dataclass(frozen=True, eq=False)
class AccountRoutes:
    """The routes. Each reads the account of the key that calls, never an account that the request names.

    They cost nothing, so each counts as a request, and reads in the threads of reports.
    """

    accounts: Accounts
    models: ModelRegistry
    charging: Charging

    async def account(self, request: Request) -> Response:
        """Return the balance, the limits and the calling key."""
        caller = await self.charging.check_account_access(request)
        account = await self.accounts.read_report(lambda connection: people.account(connection, caller.account_id))
        info = AccountInfo(
            id=account.id,
            name=account.name,
            status=account.state,  # pyright: ignore[reportArgumentType] - the table allows no other
            plan=account.plan,
            per_minute=Minute(requests=caller.plan_requests_per_minute, tokens=caller.plan_tokens_per_minute),
            balance=format_dollars(account.balance),
            held=format_dollars(account.held),
            available=format_dollars(account.free),
            key=_key_info(caller.key),
        )
        return _json(info)

    async def keys(self, request: Request) -> Response:
        """Return all keys of the account."""
        caller = await self.charging.check_account_access(request)
        now = now_ms()
        own_keys = await self.accounts.read_report(
            lambda connection: keys.list_keys(connection, caller.account_id, now)
        )
        return _json(KeyList(data=[_key_info(key) for key in own_keys]))

    async def usage(self, request: Request) -> Response:
        """Return the usage of a range of days, grouped, as JSON or CSV.

        Raises:
            ApiError: 400 for a wrong parameter.
        """
        caller = await self.charging.check_account_access(request)
        start, end = date_range(request)
        group_by = request.query_params.get("group_by")
        groups = usage.DEFAULT_GROUPS if group_by is None else tuple(name for name in group_by.split(",") if name)
        format = request.query_params.get("format", "json")
        if format not in ("json", "csv"):
            raise ApiError(400, f"format={format[:80]!r} is not supported: choose json or csv.", param="format")
        with _parameter("start"):
            usage.check_days(start, end)
        with _parameter("group_by"):
            usage.check_groups(groups)

        def read_usage(connection: Connection) -> tuple[list[usage.UsageGroup], list[TaintedAnswers]]:
            used = usage.usage_totals(connection, caller.account_id, start, end, groups)
            windows = tainted_windows(connection, usage.day_start(start))
            return used, tainted_answers(connection, windows, caller.account_id)

        groups_used, tainted = await self.accounts.read_report(read_usage)
        names = self.models.public_names
        rows = [
            UsageRow(
                day=row.day.isoformat() if row.day else None,
                model=row.model,
                key=row.key,
                tier=row.tier,
                requests=row.requests,
                tokens=row.tokens,
                cost=format_dollars(row.cost),
                provider=names.public_name(row.provider) if row.provider is not None else None,
            )
            for row in groups_used
        ]
        if format == "csv":
            file = csv_file(UsageRow.__struct_fields__, map(msgspec.structs.astuple, rows))
            return csv_response("usage.csv", iter([file]))
        lines = [_tainted_usage(answers, names) for answers in tainted]
        return _json(UsageReport(start=start.isoformat(), end=end.isoformat(), data=rows, tainted=lines))


@contextmanager
def _parameter(name: str) -> Iterator[None]:
    """Answer a refused value with 400 and the name of its parameter."""
    try:
        yield
    except UsageError as error:
        raise ApiError(400, f"{error}.", param=name) from None


def _tainted_usage(answers: TaintedAnswers, names: PublicNames) -> TaintedUsage:
    first, last = (
        datetime.fromtimestamp(at / 1000, UTC).isoformat(timespec="seconds") for at in (answers.first, answers.last)
    )
    return TaintedUsage(
        provider=names.public_name(answers.window.provider),
        model=answers.window.model,
        key=answers.key,
        requests=answers.requests,
        tokens=answers.tokens,
        first=first,
        last=last,
    )


def date_range(request: Request) -> tuple[date, date]:
    """Return the first and the last day, as named by `start` and `end` in the query string. Default: the last 30 days.

    Raises:
        ApiError: 400 if one of them is not a day.
    """
    end = _day(request, "end", datetime.now(UTC).date())
    return _day(request, "start", max(date.min + timedelta(_DEFAULT_DAYS), end) - timedelta(_DEFAULT_DAYS - 1)), end


def _day(request: Request, name: str, default: date) -> date:
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).date()
    except ValueError:
        raise ApiError(400, f"{name}={text[:80]!r} is not a day: write it like 2026-01-31.", param=name) from None


def _key_info(key: Key) -> KeyInfo:
    settings = key.settings
    return KeyInfo(
        id=key.id,
        name=settings.name,
        status=key.state(now_ms()),  # pyright: ignore[reportArgumentType] - one of the three
        scopes=list(settings.scopes),
        models=None if settings.models is None else list(settings.models),
        networks=None if settings.networks is None else list(settings.networks),
        per_minute=Minute(requests=settings.requests_per_minute, tokens=settings.tokens_per_minute),
        spend_limit=None if settings.spend_limit is None else format_dollars(settings.spend_limit),
        spend_window=settings.spend_window,  # pyright: ignore[reportArgumentType] - checked by KeySettings
        spent=format_dollars(key.spent),
        created=key.created_at // 1000,
        expires=_seconds(settings.expires_at),
        last_used=_seconds(key.used_at),
    )


def _seconds(milliseconds: int | None) -> int | None:
    return None if milliseconds is None else milliseconds // 1000


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
