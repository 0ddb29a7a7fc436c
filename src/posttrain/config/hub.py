"""Whether the Hugging Face hub can be reached: asked once, with one connection, before its client is used.

The client itself tries six times over half a minute before it gives up. Knows nothing of what is fetched.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies

log = logging.getLogger(__name__)

PATIENCE_S = 10.0
"""For finding the name and opening the connection. A slow link needs a second or two; how long a download takes is not asked."""


def prepare() -> str:
    """Where the hub cannot be reached, put its client into its own offline mode: what is cached is used, the rest fails at once.

    Returns why it cannot be reached, or nothing.
    """
    import huggingface_hub.constants as client

    if client.HF_HUB_OFFLINE:
        return "its client is set to offline"
    endpoint = client.ENDPOINT
    reason = "" if getproxies() else why_unreachable(endpoint)
    if reason:
        log.warning("%s cannot be reached (%s): only what its client has cached can be used", endpoint, reason)
        client.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for what is imported later
    return reason


@cache
def why_unreachable(endpoint: str, patience_s: float = PATIENCE_S) -> str:
    """Why no connection to `endpoint` opens, or nothing."""
    parts = urlsplit(endpoint)
    address = (parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443))
    outcome = [f"no answer within {patience_s:.0f} s"]

    def connect() -> None:
        try:
            with socket.create_connection(address, timeout=patience_s):
                outcome[0] = ""
        except TimeoutError:
            pass
        except OSError as error:
            outcome[0] = error.strerror or str(error)

    # In a thread: looking up a name has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(patience_s)
    return outcome[0]
