"""The service's tables: what is kept of a video that was asked for, and the right to write about it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, Index
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

ID_PREFIX = "video_"


class Status(StrEnum):
    """How far a job is; the last three are ends."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_end(self) -> bool:
        """Whether nothing happens to the job any more."""
        return self not in (Status.QUEUED, Status.IN_PROGRESS)


class Priority:
    """Of what waits, the least number is taken first."""

    INTERACTIVE = 0
    BATCH = 1


PRIORITIES = {"interactive": Priority.INTERACTIVE, "batch": Priority.BATCH}
"""By the names that clients know."""


class Base(DeclarativeBase):
    """What SQLAlchemy knows of the tables."""


class VideoRecord(Base):
    """One video.

    owner: name of the API key that asked; replay: marks a request that may come twice, unique per owner; content: a
    hash of all that was asked for; request: the resolved request, and given: the one as it was asked for, both without
    image bytes; shape: what jobs of one sampling batch have in common; image: where its bytes lie in the storage. Times
    in seconds since 1970. progress: percent; result: what the metadata say of a finished video; followed: whether
    someone wants to see the video while it is made; fragments: how many of it can be seen; announced: whether its end
    has been told to a webhook.
    """

    __tablename__ = "videos"

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    replay: Mapped[str | None] = mapped_column(default=None)
    content: Mapped[str] = mapped_column(default="")
    model: Mapped[str]
    priority: Mapped[int] = mapped_column(default=Priority.INTERACTIVE)
    given: Mapped[dict[str, Any]] = mapped_column(JSON)
    request: Mapped[dict[str, Any]] = mapped_column(JSON)
    shape: Mapped[str] = mapped_column(default="")
    image: Mapped[str | None] = mapped_column(default=None)
    remixed_from: Mapped[str | None] = mapped_column(default=None)
    status: Mapped[str] = mapped_column(default=Status.QUEUED)
    fence: Mapped[int] = mapped_column(default=0)
    attempts: Mapped[int] = mapped_column(default=0)
    deaths: Mapped[int] = mapped_column(default=0)
    lease_until: Mapped[float | None] = mapped_column(default=None)
    progress: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[float]
    completed_at: Mapped[float | None] = mapped_column(default=None)
    expires_at: Mapped[float | None] = mapped_column(default=None)
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON, default=None)
    followed: Mapped[bool] = mapped_column(default=False)
    fragments: Mapped[int] = mapped_column(default=0)
    announced: Mapped[bool] = mapped_column(default=False)
    announce_attempts: Mapped[int] = mapped_column(default=0)
    announce_after: Mapped[float] = mapped_column(default=0.0)
    error_code: Mapped[str | None] = mapped_column(default=None)
    error_message: Mapped[str | None] = mapped_column(default=None)

    __table_args__ = (
        Index("videos_replay", "owner", "replay", unique=True),
        Index("videos_queue", "status", "priority", "created_at", "id"),
        Index("videos_owner", "owner", "created_at", "id"),
        Index("videos_announced", "announced", "status"),
    )

    @property
    def has_ended(self) -> bool:
        """Whether nothing happens to the job any more."""
        return Status(self.status).is_end

    @property
    def claim(self) -> "Claim":
        """The right to write about the job, as it stands."""
        return Claim(self.id, self.fence)


class RateLimitEvent(Base):
    """That a job was asked for: counts against its owner's limit for a minute, even if the job is deleted."""

    __tablename__ = "asks"

    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str]
    asked_at: Mapped[float] = mapped_column(index=True)


class Session(Base):
    """The sign-in of a browser, which stands for an API key; the browser alone knows the session's id.

    id_hash and key_hash: SHA-256 of the id and of the key, so that the database gives access to nobody.
    """

    __tablename__ = "sessions"

    id_hash: Mapped[str] = mapped_column(primary_key=True)
    key_hash: Mapped[str]
    expires_at: Mapped[float] = mapped_column(index=True)


class Wait(Base):
    """An answer that stays open until a video has ended; counts against its owner's limit until its lease is over."""

    __tablename__ = "waits"

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(index=True)
    lease_until: Mapped[float]


@dataclass(frozen=True)
class Claim:
    """The right to write about a job, until someone else claims it."""

    id: str
    fence: int

    @property
    def row_id(self) -> str:
        """The id of the job's row in the stages, and of its files: another one each time that it is claimed."""
        return f"{self.id.removeprefix(ID_PREFIX)}-{self.fence}"

    @classmethod
    def of_row(cls, row_id: str) -> "Claim":
        """Inverse of `row_id`."""
        name, _, fence = row_id.rpartition("-")
        return cls(ID_PREFIX + name, int(fence))
