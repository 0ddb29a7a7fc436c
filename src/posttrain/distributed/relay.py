"""A port that leads to a server's Unix socket for those who have its token, whatever they ask of it.

An engine's own key guards some of its paths; this guards all. What passes is not encrypted.
"""

from __future__ import annotations

import hmac
import socket
import threading
from contextlib import suppress
from pathlib import Path

_HEAD_BYTES = 1 << 16
_HEAD_S = 10.0
_PIECE = 1 << 16
_REFUSED = b"HTTP/1.1 401 Unauthorized\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class Relay:
    """Listens on `address` while it is open. Each connection carries one request."""

    def __init__(self, address: str, path: Path, token: str) -> None:
        self._path, self._token = path, token.encode()
        self._listening = socket.create_server((address, 0))
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True, name="relay").start()

    def close(self) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._pass_on, args=(connection,), daemon=True).start()

    def _pass_on(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(_HEAD_S)
            head = _head_of(connection)
            if not self._has_token(head):
                connection.sendall(_REFUSED)
                return
            connection.settimeout(None)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
                server.connect(str(self._path))
                server.sendall(head)
                back = threading.Thread(target=_copy, args=(server, connection), daemon=True)
                back.start()
                _copy(connection, server)
                back.join()

    def _has_token(self, head: bytes) -> bool:
        lines, whole, _ = head.partition(b"\r\n\r\n")
        given = [line.split() for line in lines.split(b"\r\n") if line.lower().startswith(b"authorization:")]
        return bool(whole) and len(given) == 1 and len(given[0]) == 3 and hmac.compare_digest(given[0][2], self._token)


def _head_of(connection: socket.socket) -> bytes:
    """What has come once the head of the request is whole."""
    head = b""
    while b"\r\n\r\n" not in head and len(head) < _HEAD_BYTES:
        data = connection.recv(_PIECE)
        if not data:
            break
        head += data
    return head


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Until either end hangs up; both then know."""
    with suppress(OSError):
        while data := source.recv(_PIECE):
            target.sendall(data)
    # Who hangs up on a request wants it ended, and the server sees only a whole connection close.
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
