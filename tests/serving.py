# pyright: reportMissingImports=false
"""A server of ours on a model folder, in a thread, for tests of those who ask it. Needs posttrain[serve]."""

import queue
import threading
from contextlib import contextmanager

from posttrain.serve.options import ServeOptions
from posttrain.serve.run import run_server
from posttrain.serve.setup import ServedNames, make_router


@contextmanager
def serving(folder, token=None):
    options = ServeOptions(port=0, follow_s=0.05, drain_s=5.0)
    opened = queue.Queue()
    names = ServedNames([str(folder)], folder.parent / "none", name="teacher")
    thread = threading.Thread(
        target=run_server, args=(options, lambda: make_router(names, options), opened.put), daemon=True
    )
    thread.start()
    server = opened.get(timeout=120)
    try:
        yield server.address
    finally:
        server.stop()
        thread.join(30)
