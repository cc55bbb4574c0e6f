"""A config as it may be shown. Pure."""

import re
from collections.abc import Mapping
from typing import Any, Final

MASK: Final = "***"

# A field with one of these words in its name holds a secret, wherever it stands: in the config itself, in an engine's flags.
_SECRET: Final = frozenset(
    [
        "apikey",
        "apikeys",
        "bearer",
        "credential",
        "credentials",
        "key",
        "keys",
        "passphrase",
        "passwd",
        "password",
        "secret",
        "secrets",
        "token",
    ]
)
_USERINFO: Final = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_QUERY: Final = re.compile(r"(?<=[?&])((?:password|passwd|sslpassword|token|key)=)[^&#\s]+", re.IGNORECASE)


def masked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with every secret replaced by `MASK`; what is absent stays absent.

    Of an engine's environment only the names are shown: no rule knows which of its values are secrets.
    """
    return {name: _value(name, value) for name, value in config.items()}


def _value(name: str, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, Mapping):
        if name == "env":
            return dict.fromkeys(value, MASK)
        return masked(value)
    if isinstance(value, list | tuple):
        return [_value(name, one) for one in value]
    if isinstance(value, bool | int | float):
        return value
    if not _SECRET.isdisjoint(re.split(r"[-_.]", name.lower())):
        return MASK
    return _QUERY.sub(r"\1" + MASK, _USERINFO.sub(MASK, value)) if isinstance(value, str) else str(value)
