"""Tokens per second and waiting times of OpenAI-compatible endpoints, asked in turns: `python bench/serve.py ours=URL other=URL --model M`."""

import argparse
import json
import statistics
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor


def ask(url: str, model: str, number: int) -> tuple[float, int]:
    """Seconds and tokens of one answer."""
    question = f"Tom has {number % 80 + 11} pens and gets 12 more. How many?"
    body = {"model": model, "seed": number, "max_tokens": 64, "messages": [{"role": "user", "content": question}]}
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    begun = time.monotonic()
    with urllib.request.urlopen(request, timeout=600) as answer:
        found = json.load(answer)
    return time.monotonic() - begun, found["usage"]["completion_tokens"]


def measure(url: str, model: str, clients: int) -> tuple[float, float, float]:
    """Tokens per second, median and 99 % quantile of the waiting time in seconds."""
    begun = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda number: ask(url, model, number), range(max(16, 2 * clients))))
    passed = time.monotonic() - begun
    waits = sorted(wait for wait, _ in answers)
    return (
        sum(tokens for _, tokens in answers) / passed,
        statistics.median(waits),
        waits[round(0.99 * (len(waits) - 1))],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("endpoints", nargs="+", metavar="NAME=URL", help="URL ends with /v1")
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    endpoints = dict(entry.split("=", 1) for entry in options.endpoints)
    for url in endpoints.values():
        measure(url, options.model, 1)  # warm
    print("clients  endpoint        tokens/s   p50 s   p99 s   (medians of the rounds)")
    for clients in (1, 8, 64):
        rounds = [
            {name: measure(url, options.model, clients) for name, url in endpoints.items()}
            for _ in range(options.rounds)
        ]
        for name in endpoints:
            rate, middle, late = (statistics.median(one[name][place] for one in rounds) for place in range(3))
            print(f"{clients:7}  {name:14} {rate:9.0f} {middle:7.2f} {late:7.2f}")


if __name__ == "__main__":
    main()
