"""One error type for everything that a client may be told. Messages hold no address, stack trace, key or prompt."""

from enum import Enum
from typing import Final


class Fault(Enum):
    """Whose fault it is: decides whether another replica may be tried and who is alerted."""

    CLIENT = "client"
    GATEWAY = "gateway"
    ENGINE = "engine"


INVALID: Final = "invalid_request_error"
SERVER: Final = "server_error"


class GatewayError(Exception):
    """An answer other than success, as CONTRACT.md §6 lists them.

    `retry_after` is in seconds; None sends no header. `should_retry` False tells SDKs that waiting is no help.
    `headers` are further reply headers, names in lower case.
    """

    def __init__(
        self,
        status: int,
        code: str | None,
        message: str,
        *,
        type: str = INVALID,  # noqa: A002 - the field's name in the error object
        param: str | None = None,
        fault: Fault = Fault.CLIENT,
        retry_after: float | None = None,
        should_retry: bool | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.type = type
        self.param = param
        self.fault = fault
        self.retry_after = retry_after
        self.should_retry = should_retry
        self.headers = headers

    def __repr__(self) -> str:
        return f"GatewayError({self.status}, {self.code!r}, {self.message!r}, param={self.param!r})"


def no_healthy_engine(model: str, retry_after: float = 5) -> GatewayError:
    return GatewayError(
        503,
        "no_healthy_engine",
        f"The model '{model}' has no healthy engine at the moment. Please try again.",
        type=SERVER,
        fault=Fault.ENGINE,
        retry_after=retry_after,
    )


def engine_failed(
    message: str = "The engine failed while it was answering, and the answer cannot be continued.",
) -> GatewayError:
    return GatewayError(502, "engine_failed", message, type=SERVER, fault=Fault.ENGINE)


class EngineStalledError(GatewayError):
    """The engine is there and says nothing: it hangs, and its health check may be good all the same."""

    def __init__(self) -> None:
        super().__init__(
            502,
            "engine_failed",
            "The engine stopped answering in mid-stream.",
            type=SERVER,
            fault=Fault.ENGINE,
        )


def upstream_error(message: str = "The engine gave an answer that makes no sense.") -> GatewayError:
    return GatewayError(502, "upstream_error", message, type=SERVER, fault=Fault.ENGINE)


def timeout(message: str = "The engine did not answer in time.") -> GatewayError:
    return GatewayError(504, "timeout", message, type=SERVER, fault=Fault.ENGINE)


def overloaded(model: str) -> GatewayError:
    return GatewayError(
        503,
        "overloaded",
        f"The engines of the model '{model}' are overloaded. Please try again.",
        type=SERVER,
        fault=Fault.ENGINE,
        retry_after=1,
    )


def draining() -> GatewayError:
    return GatewayError(
        503,
        "draining",
        "The gateway is shutting down. Please try again.",
        type=SERVER,
        fault=Fault.GATEWAY,
        retry_after=1,
    )


def store_unavailable() -> GatewayError:
    return GatewayError(
        503,
        "store_unavailable",
        "This API key cannot be looked up at the moment. Please try again.",
        type=SERVER,
        fault=Fault.GATEWAY,
        retry_after=2,
    )


def internal() -> GatewayError:
    return GatewayError(
        500, "internal_error", "The gateway failed. Please try again.", type=SERVER, fault=Fault.GATEWAY
    )
