"""What `rollout.speculation: suffix` gains on the quickstart's prompts, beside plain decoding in turns, and how many completions differ.

python bench/speculation.py                     prompts that nobody asked before: siblings that are ahead and a row's own end are all there is
python bench/speculation.py --again             an epoch of the DPO model has answered them before; the GRPO model answers now
python bench/speculation.py --exact --batches 4
                                                under `rollout.exact`, where not a bit may differ

Models are those of `make demo`. Times are of a processor, on one thread, for others may use the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from posttrain.config.stages import ModelKeys
from posttrain.data.render import chat_ids
from posttrain.models.generation import stop_token_ids
from posttrain.models.load import load_policy
from posttrain.models.policy import Policy
from posttrain.rollout.drafts import Speculation
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.sampling import request_seed
from posttrain.types import Completion, Request, SamplingParams, in_order

QUICKSTART = Path(__file__).resolve().parents[1] / "examples" / "quickstart"
PROMPTS, GROUP, SEED = 8, 8, 42
PARAMS = SamplingParams(64)


def engine_of(policy: Policy, speculation: Speculation | None) -> EmbeddedEngine:
    stops = stop_token_ids(policy.base, policy.tokenizer)
    return EmbeddedEngine(policy, stop_token_ids=stops, batch_size=PROMPTS * GROUP, speculation=speculation)


def batches(policy: Policy, count: int, epoch: int) -> list[list[Request]]:
    with (QUICKSTART / "data" / "prompts.jsonl").open() as lines:
        asked = [chat_ids(policy.tokenizer, json.loads(next(lines))["prompt"], ()) for _ in range(PROMPTS * count)]
    return [
        [
            Request(tuple(asked[at]), request_seed(SEED, epoch, batch, at, sample))
            for at in range(PROMPTS * batch, PROMPTS * (batch + 1))
            for sample in range(GROUP)
        ]
        for batch in range(count)
    ]


def timed(engine: EmbeddedEngine, requests: list[Request]) -> tuple[float, list[Completion]]:
    begun = time.process_time()
    found = in_order(engine.generate(requests, PARAMS))
    return time.process_time() - begun, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--run", type=Path, default=QUICKSTART / "runs" / "word-problems")
    options = parser.parse_args()
    torch.set_num_threads(1)

    def load(stage: str) -> Policy:
        folder = options.run / "stages" / stage / "model"
        if not folder.is_dir():
            parser.error(
                f"{folder}: no such model; make it by `make demo`, or name another run of the quickstart with --run"
            )
        return load_policy(ModelKeys(base_model=str(folder)), trainable=False, exact=options.exact)

    before, now, speculation = load("02-dpo"), load("03-grpo"), Speculation()
    if options.again:
        for requests in batches(before, options.batches, epoch=0):
            timed(engine_of(before, speculation), requests)
    sides = [engine_of(now, None), engine_of(now, speculation)]
    asked = batches(now, options.batches, epoch=1)
    timed(engine_of(now, None), asked[0][:GROUP])
    speculation.take_counts()
    ratios, sums, differing = list[float](), [0.0, 0.0], 0
    for requests in asked:
        (plain_s, plain), (drafted_s, drafted) = (timed(side, requests) for side in sides)
        ratios.append(plain_s / drafted_s)
        sums = [sums[0] + plain_s, sums[1] + drafted_s]
        compared = [(a.ids, a.logp if options.exact else ()) == (b.ids, b.logp if options.exact else ()) for a, b in zip(plain, drafted, strict=True)]  # fmt: skip
        differing += compared.count(False)
    rows, offered, accepted = speculation.take_counts()
    print(
        f"{len(asked)} batches of {PROMPTS * GROUP}: {statistics.median(ratios):.2f}× ({min(ratios):.2f}–{max(ratios):.2f}), "
        f"{sums[0] / sums[1]:.2f}× of the sums; {accepted} of {offered} drafted tokens were right, {1 + accepted / rows:.2f} tokens a pass; "
        f"{differing} of {len(asked) * PROMPTS * GROUP} completions differ"
    )


if __name__ == "__main__":
    main()
