"""A server of chat completions that judges by a rule, for tests that must know what is right: real HTTP, no model."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CUT = "<cut>"
"""Ends an answer that is to end as one that was cut at max_tokens."""


@contextmanager
def judging(rule, failures=()):
    """`rule(question, body)` gives the judge's answer; `failures` are the statuses of the first requests. Yields (url, requests)."""
    requests, failures = [], list(failures)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            status = failures.pop(0) if failures else 200
            text = rule(body["messages"][-1]["content"], body)
            ended = "length" if text.endswith(CUT) else "stop"
            choice = {"message": {"role": "assistant", "content": text.removesuffix(CUT)}, "finish_reason": ended}
            said = {"choices": [choice], "usage": {"total_tokens": 7}}
            answer = json.dumps(said if status == 200 else {"error": {"message": "no"}}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
