"""OpenAI-compatible endpoints asked in turns: tokens per second, waiting times, memory; and what a killed engine costs.

python bench/serve.py ours=URL other=URL --model ours=NAME --model other=NAME --pid ours=PID --pid other=PID
python bench/serve.py ours=URL --model ours=NAME --kill PID     # SIGKILL while 16 clients ask
"""

import argparse
import http.client
import json
import os
import signal
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CLIENTS = (1, 8, 64)
FEWEST_REQUESTS = 16


@dataclass(frozen=True)
class Endpoint:
    name: str
    url: str
    """Ends with /v1."""
    model: str

    def ask(self, number: int, max_tokens: int) -> tuple[float, int]:
        """Seconds and tokens of one answer."""
        question = f"Tom has {number % 80 + 11} pens and gets 12 more. How many?"
        messages = [{"role": "user", "content": question}]
        body = {"model": self.model, "seed": number, "max_tokens": max_tokens, "messages": messages}
        request = urllib.request.Request(
            f"{self.url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        begun = time.monotonic()
        with urllib.request.urlopen(request, timeout=600) as answer:
            found = json.load(answer)
        return time.monotonic() - begun, found["usage"]["completion_tokens"]


@dataclass(frozen=True)
class Round:
    """Tokens per second, and seconds that 50 % and 99 % of the requests waited at most."""

    tokens_per_s: float
    p50_s: float
    p99_s: float


def measure(endpoint: Endpoint, clients: int, max_tokens: int) -> Round:
    begun = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda n: endpoint.ask(n, max_tokens), range(max(FEWEST_REQUESTS, clients))))
    passed = time.monotonic() - begun
    waits = sorted(wait for wait, _ in answers)
    tokens = sum(count for _, count in answers)
    return Round(tokens / passed, statistics.median(waits), waits[round(0.99 * (len(waits) - 1))])


def compare(endpoints: Sequence[Endpoint], rounds: int, max_tokens: int) -> None:
    for endpoint in endpoints:
        measure(endpoint, 1, max_tokens)  # warm
    print(f"| clients | endpoint | tokens/s | p50 s | p99 s |   median (least to most) of {rounds} rounds")
    for clients in CLIENTS:
        found = [{e.name: measure(e, clients, max_tokens) for e in endpoints} for _ in range(rounds)]
        for endpoint in endpoints:
            mine = [one[endpoint.name] for one in found]
            rate = spread([one.tokens_per_s for one in mine], "{:.0f}")
            p50, p99 = (spread(values, "{:.2f}") for values in zip(*((m.p50_s, m.p99_s) for m in mine), strict=True))
            print(f"| {clients} | {endpoint.name} | {rate} | {p50} | {p99} |", flush=True)


def spread(values: Sequence[float], form: str) -> str:
    least, middle, most = (form.format(value) for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({least} to {most})"


def below(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found


def memory_mib(pid: int) -> float:
    """Of a process and its children; what they share counts once."""
    total = 0
    for one in below(pid):
        lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def kill(endpoint: Endpoint, pid: int, max_tokens: int) -> None:
    """Clients that ask one request after another, while the engine is killed: how each request ended."""
    ended, lock, over = Counter[str](), threading.Lock(), threading.Event()

    def client(first: int) -> None:
        for number in range(first, 1 << 30, FEWEST_REQUESTS):
            if over.is_set():
                return
            how = outcome(endpoint, number, max_tokens)
            with lock:
                ended[how] += 1

    with ThreadPoolExecutor(FEWEST_REQUESTS) as pool:
        clients = [pool.submit(client, first) for first in range(FEWEST_REQUESTS)]
        time.sleep(5)
        with lock:
            before = dict(ended)
        os.kill(pid, signal.SIGKILL)
        begun = time.monotonic()
        while outcome(endpoint, 0, 1) != "answered":
            time.sleep(0.1)
        print(f"answered again after {time.monotonic() - begun:.1f} s")
        time.sleep(3)
        over.set()
        for one in clients:
            one.result()
    print(f"before it was killed: {before}; in all, of {FEWEST_REQUESTS} clients: {dict(ended)}")


def outcome(endpoint: Endpoint, number: int, max_tokens: int) -> str:
    try:
        endpoint.ask(number, max_tokens)
    except urllib.error.HTTPError as error:
        return f"{error.code} {json.load(error)['error']['code']}"
    except (OSError, http.client.HTTPException) as error:
        return f"untold: {type(error).__name__}"
    return "answered"


def named(entries: Sequence[str]) -> Mapping[str, str]:
    return dict(entry.split("=", 1) for entry in entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("endpoints", nargs="+", metavar="NAME=URL", help="URL ends with /v1")
    parser.add_argument("--model", action="append", required=True, metavar="NAME=MODEL")
    parser.add_argument("--pid", action="append", default=[], metavar="NAME=PID", help="whose memory is told")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--kill", type=int, metavar="PID", help="of the engine's process, behind the first endpoint")
    options = parser.parse_args()
    models = named(options.model)
    endpoints = [Endpoint(name, url, models[name]) for name, url in named(options.endpoints).items()]
    if options.kill is not None:
        kill(endpoints[0], options.kill, options.max_tokens)
        return
    compare(endpoints, options.rounds, options.max_tokens)
    for name, pid in named(options.pid).items():
        print(f"{name}: {memory_mib(int(pid)):.0f} MiB")


if __name__ == "__main__":
    main()
