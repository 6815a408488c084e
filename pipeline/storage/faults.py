"""Why storage failed: the drivers' exceptions have no common base, so they are told apart by what they carry."""

import errno
import http.client
import logging
import ssl
from collections.abc import Iterator, Mapping
from enum import Enum, auto

from tenacity import RetryCallState

from pipeline.storage.redaction import brief, redacted
from pyramid_flow.errors import PyramidFlowError

logger = logging.getLogger(__name__)


class StorageError(PyramidFlowError):
    """A path is refused, or a folder or object store cannot be used; the cause is chained, its secrets removed."""


class StorageFullError(StorageError):
    """The disk, bucket or quota has no room left: trying again does not help, making room does."""


class Fault(Enum):
    FULL = auto()
    PERMANENT = auto()
    TRANSIENT = auto()


_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_CODES = {"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"}
_FULL_STATUS = 507

_TRANSIENT_STATUSES = {408, 429, 500, 502, 503, 504}
_TRANSIENT_ERRNOS = {errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.EHOSTUNREACH, errno.ENETUNREACH}
_TRANSIENT_CODES = {
    *("SlowDown", "SlowDownRead", "SlowDownWrite", "ServiceUnavailable", "InternalError", "RequestTimeout"),
    *("Throttling", "ThrottlingException", "RequestLimitExceeded", "BandwidthLimitExceeded", "ServerBusy"),
    *("OperationAborted", "OperationTimedOut"),
    *("IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"),  # damaged on the way
    "NoSuchUpload",  # the upload is over or was swept away: send the file again
}
_TRANSIENT_CLASSES = (TimeoutError, ConnectionError, http.client.HTTPException)
_TRANSIENT_CLASS_NAMES = {
    *("HTTPClientError", "ResponseParserError"),  # botocore
    *("ClientConnectionError", "ClientPayloadError"),  # aiohttp
    *("ServiceRequestError", "ServiceResponseError"),  # azure.core
    "TransportError",  # httpx, google.auth
    *("ConnectionError", "Timeout", "ChunkedEncodingError", "ProtocolError"),  # requests, urllib3
    "ChecksumError",  # gcsfs
}


def fault(error: BaseException) -> Fault:
    chain = list(_chain(error))
    codes = {code for link in chain for code in _codes(link)}
    statuses = {status for link in chain for status in _statuses(link)}
    errnos = {link.errno for link in chain if isinstance(link, OSError)}
    if codes & _FULL_CODES or _FULL_STATUS in statuses or errnos & _FULL_ERRNOS:
        return Fault.FULL
    if codes & _TRANSIENT_CODES or statuses & _TRANSIENT_STATUSES or errnos & _TRANSIENT_ERRNOS:
        return Fault.TRANSIENT
    if any(isinstance(link, ssl.SSLCertVerificationError) for link in chain):
        return Fault.PERMANENT
    for link in chain:  # outermost first: HTTP parsers give broken answers a status of their own
        if _is_broken_connection(link):
            return Fault.TRANSIENT
        if _statuses(link):
            return Fault.PERMANENT
    return Fault.PERMANENT


def _chain(error: BaseException) -> Iterator[BaseException]:
    # a StorageError in the chain is an earlier failure that the caller was handling
    link: BaseException | None = error
    while link is not None and not isinstance(link, StorageError):
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _is_broken_connection(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, _TRANSIENT_CLASSES) or bool(names & _TRANSIENT_CLASS_NAMES)


def _statuses(error: BaseException) -> set[int]:
    """Returns the HTTP status, wherever the driver keeps it."""
    response = getattr(error, "response", None)
    found = [getattr(holder, name, None) for holder in (error, response) for name in ("status", "status_code", "code")]
    if isinstance(response, Mapping):  # botocore
        found.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    return {int(text) for text in map(str, found) if text.isdigit()}


def _codes(error: BaseException) -> set[str]:
    """Returns the store's own name of the fault, wherever the driver keeps it."""
    response = getattr(error, "response", None)
    found = [getattr(error, name, None) for name in ("error_code", "code")]
    if isinstance(response, Mapping):  # botocore
        found.append(response.get("Error", {}).get("Code"))
    return {str(getattr(code, "value", code)) for code in found}


def lacks_bucket(error: BaseException) -> bool:
    return any("NoSuchBucket" in _codes(link) for link in _chain(error))


def presentable(error: Exception) -> Exception:
    """Returns the error itself, or a stand-in where a traceback of it would show a secret."""
    text = "\n".join(f"{link} {link!r}" for link in _chain(error))
    return error if redacted(text) == text else StorageError(brief(f"{type(error).__name__}: {error}"))


def _reason(error: BaseException) -> str:
    silent = "the store did not answer in time" if isinstance(error, TimeoutError) else type(error).__name__
    lines = str(error).strip().splitlines() or [silent]
    return brief(lines[0])


def explained(action: str, error: Exception, attempts: int = 1) -> StorageError:
    tries = f" ({attempts} attempts)" if attempts > 1 else ""
    if fault(error) is Fault.FULL:
        return StorageFullError(f"cannot {action}: there is no room left: {_reason(error)}{tries}")
    return StorageError(f"cannot {action}: {_reason(error)}{tries}")


def log_retry(action: str, attempts: int, state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    wait_s = state.next_action.sleep if state.next_action else 0.0
    reason = _reason(error) if error else "failed"
    logger.warning(
        "cannot %s: %s; attempt %d of %d, next in %.1f s", action, reason, state.attempt_number, attempts, wait_s
    )
