"""Proves the rewards of an RL stage on its own prompts and its own starting policy, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

from posttrain.config.rl import RLKeys
from posttrain.data.load import load_prompts
from posttrain.distributed.ranks import SingleProcess
from posttrain.errors import RewardError
from posttrain.files import read_record
from posttrain.grading.learned import named_stage
from posttrain.models.load import load_tokenizer
from posttrain.recipes.experience.engines import EngineSource, make_engine, sampling_params
from posttrain.recipes.measure.evaluate import ALONE, Asking
from posttrain.recipes.measure.learned import reward_pool
from posttrain.rewards.cases import Case, PolicySample, cases_of
from posttrain.rewards.certificate import Certificate, check_rewards
from posttrain.rewards.resolve import reward_digest
from posttrain.rewards.workers import RewardPool
from posttrain.rewards.written import write
from posttrain.rollout.collect import sample_groups
from posttrain.types import Completion

T = TypeVar("T")

_NUM_CASES = 50
_NUM_SAMPLES = 200
_PIECE = 10_000


def certify(keys: RLKeys, path: Path, asking: Asking = ALONE) -> Certificate:
    """Check the rewards as training will call them, with completions of the starting policy; write `path`.

    On the held-out prompts where there are any. The samples are groups of the size that training will use, so that
    the forecast is of its groups. All ranks of `asking` call it; each samples its share of the groups, and rank 0 checks.
    """
    if asking.ranks.world_size > 1 and not asking.dealt(keys.rollout):
        return asking.ranks.main_only(partial(certify, keys, path, replace(asking, ranks=SingleProcess())))
    tokenizer = load_tokenizer(keys)
    rows, cases = _asked(keys, tokenizer)
    chosen = rows[: min(len(cases), max(1, _NUM_SAMPLES // keys.num_generations))]
    mine = asking.ranks.share(range(len(chosen)))

    def sample() -> list[tuple[int, list[Completion]]]:
        source = EngineSource(keys.model_copy(update={"adapter": "none"}))
        made = make_engine(source, keys=keys.rollout, rows=keys.rollout_batch_size, folder=path.parent)
        with closing(made) as engine:
            groups = sample_groups(
                engine, [chosen[number] for number in mine], keys.num_generations, sampling_params(keys), (keys.seed, -1), mine
            )  # fmt: skip
        return list(zip(mine, groups, strict=True))

    shares = asking.ranks.each(partial(_ended, asking, sample))
    samples = [
        PolicySample(case, str(tokenizer.decode(list(completion.ids), skip_special_tokens=True)))
        for case, group in sorted((numbered for share in shares for numbered in share), key=itemgetter(0))
        for completion in group
    ]

    def check() -> Certificate:
        certificate = _checked(keys, tokenizer, cases, samples)
        write(certificate, path)
        return certificate

    return asking.ranks.main_only(partial(_ended, asking, check))


def _ended(asking: Asking, work: Callable[[], T]) -> T:
    with asking.ending():
        return work()


def check_ahead(keys: RLKeys) -> Certificate:
    """The same without completions, whose policy is not trained yet: what can be known before any training.

    Reward models that earlier stages train are left out; there is another reward.
    """
    keys = keys.with_rewards([spec if named_stage(spec) is None else None for spec in keys.reward_funcs])
    tokenizer = load_tokenizer(keys)
    return _checked(keys, tokenizer, _asked(keys, tokenizer)[1])


def _asked(keys: RLKeys, tokenizer: Any) -> tuple[Sequence[Any], Sequence[Case]]:
    """Prompts with their tokens, and the cases made of them."""
    rows = load_prompts(keys, tokenizer, sources=keys.eval_datasets or None).rows
    return rows, cases_of([prompt for prompt, _ in rows], limit=_NUM_CASES)


def _checked(keys: RLKeys, tokenizer: Any, cases: Sequence[Case], samples: Sequence[PolicySample] = ()) -> Certificate:
    with reward_pool(keys) as pool:
        return check_rewards(pool, cases, samples, tokenize=partial(token_ids, tokenizer))


def certified_before(keys: RLKeys, path: Path) -> Certificate | None:
    """The certificate of an earlier start of the same stage at `path`, if these rewards may start on it."""
    if not path.exists():
        return None
    found = read_certificate(path)
    rewards = reward_digest(keys.reward_funcs, keys.reward_kwargs, keys.reward_weights)
    return found if found.matches(rewards) else None


def read_certificate(path: Path) -> Certificate:
    """Raises: DamagedFileError."""
    return read_record(path, Certificate.from_json, f"delete {path} and start again: the rewards are checked anew")


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of any string, also of one that no tokenizer takes (lone surrogates are part of the battery).

    In pieces: rewards only look at the length, and tokenisers are slower than linear on a megabyte.
    """
    clean = text.encode("utf-8", "replace").decode("utf-8")
    pieces = [clean[start : start + _PIECE] for start in range(0, len(clean), _PIECE)]
    return [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]


def require(certificate: Certificate) -> None:
    """Raises: RewardError, listing what failed, unless the rewards passed (or passed as far as they could be checked)."""
    if certificate.verdict == "fail":
        reasons = "\n".join(f"  - {reason}" for reason in certificate.failures[:8])
        raise RewardError(
            f"the rewards did not pass their check, so RL does not start:\n{reasons}\n"
            "fix the reward (posttrain rewards check CONFIG shows every case), or set reward_check: off to train a model "
            "that cannot be promoted"
        )


def require_match(folder: Path, rewards: RewardPool) -> None:
    """Raises: RewardError unless the certificate in the stage's folder, if it has one, is for exactly these rewards."""
    path = folder / "certificate.json"
    certified = read_certificate(path).reward_digest if path.exists() else rewards.digest
    if certified != rewards.digest:
        raise RewardError(
            f"{path} is for rewards {certified[:19]}, those of this run are {rewards.digest[:19]}: a reward file, its "
            "options or a package it imports changed since the check; start again, which checks them anew"
        )
