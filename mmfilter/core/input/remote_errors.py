"""What the clients of remote stores raise, put into one line: they are told apart by name, since none of them need be
installed."""

from __future__ import annotations

from collections.abc import Iterator

from mmfilter.errors import ShardError

_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_NO_CREDENTIALS = (
    "needs credentials and there are none: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; "
    "FSSPEC_S3_ANON=true for a public one"
)
_NO_BUCKET = (
    "is in a bucket that does not exist; check its name, and AWS_ENDPOINT_URL_S3 where the store is not Amazon's"
)
_NO_TLS = {"ClientSSLError", "ClientConnectorCertificateError", "SSLError"}
_NO_CONNECTION = {
    "ClientConnectorError",
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ConnectError",
    "ConnectionRefusedError",
}
_BROKEN = {"ClientConnectionError", "ClientPayloadError", "TimeoutError", "ConnectionError", "IncompleteRead"}
_LONGEST = 200


def url_error(url: str, error: BaseException) -> ShardError:
    """Why a URL cannot be read."""
    names = _names(error)
    status = status_of(error)
    said = one_line(_telling(error))
    if "NoCredentialsError" in names:
        return ShardError(url, _NO_CREDENTIALS)
    if "NoSuchBucket" in _codes(error):
        return ShardError(url, _NO_BUCKET)
    if status == 404:
        return ShardError(url, "does not exist; check the URL")
    if status in (401, 403):
        return ShardError(
            url, f"is refused ({status}{': ' + said if said else ''}); check the credentials, and that they may read it"
        )
    if names & _NO_TLS:
        return ShardError(
            url,
            f"cannot be reached over TLS ({said}); check the certificate, or write http:// where the server has none",
        )
    if names & _NO_CONNECTION:
        return ShardError(url, f"cannot be reached ({said}); check the host, and the network or proxy")
    if "FSTimeoutError" in names:
        return ShardError(url, "has not answered for half a minute; check the host, and the network or proxy")
    return ShardError(url, f"cannot be read{_otherwise(error, status, said)}")


def _otherwise(error: BaseException, status: int | None, said: str) -> str:
    """What to say of an error that none of the cases above is, after the words that something cannot be read."""
    if status is not None:
        return f": the server answers {status}{' (' + said + ')' if said else ''}; try again later"
    if "OfflineModeIsEnabled" in _names(error):
        return ": HF_HUB_OFFLINE says to stay offline; unset it"
    if isinstance(_telling(error), ValueError):
        return f" ({said.rstrip('.')}); check how the URL is written"
    return f": {type(_telling(error)).__name__}{': ' + said if said else ''}; try again later"


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error stands for, None where there was no answer."""
    for part in _chain(error):
        response = getattr(part, "response", None)
        about = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        of_google = getattr(part, "code", None) if type(part).__name__ == "HttpError" else None
        for status in (
            getattr(part, "status", None),
            about.get("HTTPStatusCode"),
            getattr(response, "status_code", None),
            of_google,
        ):
            if isinstance(status, int) and 400 <= status < 600:
                return status
    if _names(error) & (_NO_TLS | _NO_CONNECTION | _BROKEN):
        return None
    kinds = {FileNotFoundError: 404, PermissionError: 403}
    return next((status for part in _chain(error) for kind, status in kinds.items() if isinstance(part, kind)), None)


def is_transient(error: BaseException) -> bool:
    """Whether another try may go well: the server is busy, or the connection broke."""
    status, names = status_of(error), _names(error)
    if status is not None:
        return status in _TRANSIENT
    return bool(names & (_NO_CONNECTION | _BROKEN)) and not names & (_NO_TLS | {"FSTimeoutError"})


def knows_no_ranges(error: BaseException) -> bool:
    """Whether a web server gave a whole file where a part was asked for, as fsspec says it."""
    return any(isinstance(part, ValueError) and "range requests" in str(part) for part in _chain(error))


def one_line(error: BaseException) -> str:
    text = " ".join(str(getattr(error, "message", None) or error).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _telling(error: BaseException) -> BaseException:
    """The error of a chain that says why: fsspec's for HTTP says of everything that there is no such file."""
    chain = list(_chain(error))
    return next((part for part in chain if not isinstance(part, FileNotFoundError)), chain[0])


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it came from."""
    seen: set[int] = set()
    part: BaseException | None = error
    while part is not None and id(part) not in seen:
        seen.add(id(part))
        yield part
        part = part.__cause__ or part.__context__


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for part in _chain(error) for kind in type(part).__mro__}


def _codes(error: BaseException) -> set[str]:
    """Codes of S3's errors."""
    responses = [getattr(part, "response", None) for part in _chain(error)]
    return {str(response.get("Error", {}).get("Code")) for response in responses if isinstance(response, dict)}
