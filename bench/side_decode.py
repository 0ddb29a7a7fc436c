"""Decoding by one engine, of bench/decode.py's rows: `python bench/side_decode.py JOB`, a call of all rows a turn. The first call is greedy, and its tokens are kept."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import torch

import decode
import gpu_work as work
from turns import Turns


def main() -> None:
    job = json.loads(sys.argv[1])
    turns = Turns(1)
    asked = Namespace(**job)
    shape = decode.SHAPES[asked.model]
    policy = work.random_policy(shape, torch.device("cpu"), bf16=False)
    prompts = decode.prompts_of(shape, asked.rows, asked)
    run = decode.SIDES[asked.side](policy, prompts, asked.tokens)
    Path(asked.answers).write_text(json.dumps(run(0.0)))
    for _ in range(asked.max_steps):
        turns.step_done(sum(map(len, run(1.0))))


if __name__ == "__main__":
    main()
