"""Where servers and files are. A URI is written into configs, reports and registries, so it must hold no password."""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Mapping
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from posttrain.errors import ConfigError

_URI = re.compile(r"(?:[a-z]+:)?([A-Za-z][A-Za-z0-9+.-]*://\S*)")
"""Also behind a word that says what is there, as in `openenv:https://…`."""
_USER_INFO = re.compile(r"(?<=://)[^/?#\s]*@")
_CREDENTIALS = re.compile(r"\b(Basic|Bearer)\s+(?!\$)[^\s\"']+", re.IGNORECASE)
"""Not the name of a variable that holds them."""
_SECRET_NAME = re.compile(
    r"(.*[-_])?(pass(word|wd)?|pwd|token|secret|(api|access)[-_]?key|sig(nature)?|credentials?)", re.IGNORECASE
)
_NO_SECRET = re.compile(
    r"(bos|eos|unk|pad|sep|cls|mask|eot|eom|image|video|audio|boi|eoi)_token|additional_special_token", re.IGNORECASE
)
"""Tokens of a tokenizer."""
_WORKING_FOLDERS = frozenset({"PWD", "OLDPWD"})
_WEB = ("http", "https")
HIDDEN = "…"
_SHORTEST_SECRET = 6
_IN_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&#34;", "'": "&#39;"})
# Without its end, a scheme would be looked for from each letter of a long word to that word's end.
_URI_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,31}://[^\s\"'`<>]+")


def holds_secret(text: str) -> bool:
    """Whether `text` is a URI with a password, or with anything that may serve as one.

    A web address needs no user; a database may name one.
    """
    found = _URI.fullmatch(text.strip())
    if found is None:
        return False
    try:
        parts = urlsplit(found[1])
    except ValueError:
        return _USER_INFO.search(text) is not None
    user, at, _ = parts.netloc.rpartition("@")
    named = any(names_secret(name) for name, _ in parse_qsl(parts.query, keep_blank_values=True))
    return named or (bool(at) and (":" in user or parts.scheme.lower() in _WEB))


def names_secret(name: str) -> bool:
    """Whether what is called so may be a password: HF_TOKEN, MLFLOW_TRACKING_PASSWORD."""
    return _SECRET_NAME.fullmatch(name) is not None and _NO_SECRET.fullmatch(name) is None


def variable_names_secret(name: str) -> bool:
    """`names_secret` of an environment variable; the shell keeps its working folders in PWD and OLDPWD."""
    return name not in _WORKING_FOLDERS and names_secret(name)


def command_holds_secret(command: str) -> bool:
    """Whether a word of it is a URI with a password, or names one (`--api-key …`, `API_KEY=…`), or it has credentials of a header."""
    named = (word.partition("=") for word in command.split() if word.startswith("-") or "=" in word)
    return (
        _CREDENTIALS.search(command) is not None
        or any(map(holds_secret, command.split()))
        or any(names_secret(name.lstrip("-")) for name, _, _ in named)
    )


def refuse_secret(text: str) -> None:
    """Raises: ConfigError, which does not repeat it, for a URI that holds a password."""
    if holds_secret(text):
        raise ConfigError(SECRET_IN_URI)


SECRET_IN_URI = (
    "got a URI that holds a password or token, which would be copied into config.yaml, reports and the registry; expected one "
    "without. For MLflow set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; for a database "
    "what its driver reads (PGPASSWORD, ~/.pgpass, ~/.my.cnf)"
)


SECRET_IN_COMMAND = (
    "got a command that holds a password or token, which would be copied into config.yaml and reports; give it in a variable of "
    "the environment that you start posttrain in, which the server has too"
)


def without_secrets(text: str) -> str:
    """`text` without the user part of any URI and the credentials of any header, for messages that quote what was given or answered."""
    return _CREDENTIALS.sub(r"\1 …", _USER_INFO.sub("…@", text))


def clean_text(text: str) -> str:
    """`text` without passwords in URIs, and without what the environment keeps under a secret's name, in HTML too; half a surrogate pair written out."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    for name, value in os.environ.items():
        if variable_names_secret(name) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, HIDDEN).replace(value.translate(_IN_HTML), HIDDEN)
    return without_secrets(_URI_IN_TEXT.sub(lambda uri: HIDDEN if holds_secret(unescape(uri[0])) else uri[0], text))


def clean_value(value: Any) -> Any:
    """JSON data without secrets; a number that is not finite is null, as in `metrics.jsonl`."""
    match value:
        case str() | Path():
            return clean_text(str(value))
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {
                clean_text(str(key)): HIDDEN if isinstance(one, str) and names_secret(str(key)) else clean_value(one)
                for key, one in value.items()
            }
        case list() | tuple():
            return [clean_value(one) for one in value]
        case _:
            return value


def absolute_sqlite(uri: str) -> str:
    """`sqlite:///file.db` with its path below the working folder of now; every other URI as it is."""
    scheme, found, path = uri.partition("sqlite:///")
    return f"sqlite:///{Path(path).absolute()}" if found and not scheme else uri


def loopback(url: str) -> tuple[str, int]:
    """Host and port of a server on this machine. Raises: ConfigError for one elsewhere, and for what is no `http://host:port`."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
        parts = urlsplit("")
    if (
        parts.scheme != "http"
        or not host
        or port is None
        or parts.path not in ("", "/")
        or parts.query
        or "@" in parts.netloc
    ):
        raise ConfigError(
            f"got {without_secrets(url)!r}, expected http://HOST:PORT of this machine, such as http://127.0.0.1:8000"
        )
    if host != "localhost" and not _is_loopback(host):
        raise ConfigError(
            f"got a server on {host}, expected one on this machine: an inference server lets everybody who reaches it pause it, "
            "change its weights and call its workers, whatever its API key. Bring it here with ssh -L 8000:127.0.0.1:8000 "
            f"{host}, and give http://127.0.0.1:8000"
        )
    return host, port


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
