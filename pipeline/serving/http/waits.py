"""Answers that stay open until a video has ended: their number per owner is limited across all replicas."""

import asyncio
from contextlib import suppress
from types import TracebackType
from uuid import uuid4

from anyio import CancelScope
from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from pipeline.serving.queue.records import Wait
from pipeline.serving.queue.store import BusyError, Store

MAX_WAITS = 50
"""Waits that one owner may have open."""

LEASE_S = 60.0
"""Time after which a wait counts no more whose replica was lost."""

RENEW_S = LEASE_S / 3


class OpenWait:
    """A wait of an owner, counted in the database from `begin` to the end of its `async with` block."""

    def __init__(self, store: Store, owner: str) -> None:
        self.store, self.id = store, uuid4().hex
        self._begin(owner)

    @classmethod
    async def begin(cls, store: Store, owner: str) -> "OpenWait":
        """Count a further wait of an owner; raises BusyError if `MAX_WAITS` are open."""
        return await run_in_threadpool(cls, store, owner)

    async def __aenter__(self) -> None:
        # beside the wait, which stands still while its client does not read
        self.keeping = asyncio.create_task(self._keep())

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.keeping.cancel()
        with CancelScope(shield=True):  # a client that goes away cancels the task
            await run_in_threadpool(self._end)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            with suppress(SQLAlchemyError):  # the next renewal may do better
                await run_in_threadpool(self._renew)

    def _begin(self, owner: str) -> None:
        now = self.store.clock()
        with self.store.counting() as transaction:
            transaction.execute(delete(Wait).where(Wait.lease_until <= now))
            num_open = transaction.scalar(select(func.count()).select_from(Wait).where(Wait.owner == owner)) or 0
            if num_open >= MAX_WAITS:
                raise BusyError("too_many_streams", f"{MAX_WAITS} of your streams and waits are open", 5)
            transaction.add(Wait(id=self.id, owner=owner, lease_until=now + LEASE_S))

    def _renew(self) -> None:
        with self.store.writer.begin() as transaction:
            statement = update(Wait).where(Wait.id == self.id)
            transaction.execute(statement.values(lease_until=self.store.clock() + LEASE_S))

    def _end(self) -> None:
        with self.store.writer.begin() as transaction:
            transaction.execute(delete(Wait).where(Wait.id == self.id))
