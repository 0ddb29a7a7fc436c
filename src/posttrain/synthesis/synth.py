"""`posttrain data synth`: completions of a model, scored and written part by part, and the rows that are made of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import posttrain
from posttrain.checkpoint.lock import run_lock
from posttrain.config.synth import LEFT, ROWS, SynthKeys
from posttrain.data.curation import Leaving, eval_prompts, repeats, too_many, without
from posttrain.data.dataset import DataSummary
from posttrain.data.lint_input import plain_text
from posttrain.data.load import load_prompts
from posttrain.data.origin import data_origins, remove_rows, write_origin
from posttrain.data.selection import Attempts, Candidate, KeepSpec, Left, Picked, pick
from posttrain.data.template import template_digest
from posttrain.errors import ConfigError, DataError
from posttrain.evals.run import pass_at_k
from posttrain.evals.suite import load_suite, suite_file_digest
from posttrain.files import digest_json, read_json_lines, read_record, write_atomic, write_json
from posttrain.models.load import load_tokenizer
from posttrain.models.provenance import source_digest
from posttrain.models.text import decoder
from posttrain.names import told_apart
from posttrain.objectives.terms import spec_from
from posttrain.recipes.experience.engines import EngineSource, make_engine, named_engine, sampling_params
from posttrain.recipes.measure.learned import reward_pool
from posttrain.rewards.resolve import reward_digest
from posttrain.rollout.collect import sample_groups, score_groups
from posttrain.types import Origin, Prompt, PromptRow, RolloutGroup

REPORT = "report.json"
PROVENANCE_COLUMN = "provenance"
_SAMPLED = "sampled.json"
_SAMPLES = "samples"

SamplingProgress = Callable[[int, int], None]
_PromptsById = list[tuple[str, PromptRow]]
"""Prompts by id."""


@dataclass(frozen=True)
class _SynthRun:
    """What is asked of whom: all that a completion and its reward follow from is in `made_with`."""

    keys: SynthKeys
    folder: Path
    tokenizer: Any
    prompts: _PromptsById
    made_with: Mapping[str, Any]

    @classmethod
    def of(cls, keys: SynthKeys) -> tuple[_SynthRun, list[dict[str, Any]]]:
        """And the prompts that are not asked, each with why, where it stands or its id."""
        asked = keys.asked
        tokenizer = load_tokenizer(asked)
        data = load_prompts(asked, tokenizer)
        prompts, again = _distinct(data.rows)
        made_with = {
            "model": source_digest(keys.base_model),
            "revision": keys.revision,
            "engine": named_engine(keys.rollout) or "embedded",
            "bf16": keys.bf16,
            "template": template_digest(tokenizer),
            "prompts": digest_json([name for name, _ in prompts]),
            "prompts_per_part": keys.prompts_per_part,
            "num_generations": keys.num_generations,
            "seed": keys.seed,
            "sampling": _plain_params(keys),
            "rewards": reward_digest(keys.reward_funcs, keys.reward_kwargs, keys.reward_weights),
        }
        return cls(keys, Path(keys.output_dir), tokenizer, prompts, made_with), [*_skipped(data.summary), *again]

    def parts(self) -> list[_PromptsById]:
        size = self.keys.prompts_per_part
        return [self.prompts[start : start + size] for start in range(0, len(self.prompts), size)]


def synthesize(keys: SynthKeys, progress: SamplingProgress = lambda done, total: None) -> dict[str, Any]:
    """Rows, what is in none of them and why, and a report, in `output_dir`. Started again, it goes on with the part it was at.

    What decides only which samples are kept may be changed: nothing is sampled again. Raises: ConfigError, DataError.
    """
    sampling, again = _SynthRun.of(keys)
    suites = suite_prompts(keys.decontaminate)
    with run_lock(sampling.folder):
        _begun(sampling)
        attempts = _all_attempts(sampling, progress)
        picked, left = _selected(keys, attempts, suites)
        report = _report(keys, attempts, picked, [*again, *left])
        write_atomic(sampling.folder / LEFT, "".join(_line(row) for row in (*again, *left)))
        write_json(sampling.folder / REPORT, report)
        if not picked:
            remove_rows(sampling.folder / ROWS)
            raise DataError(
                f"{sampling.folder}: no row is left of {report['completions']} completions: {_counts(report['left'])}; "
                "lower correct_from or min_reward, widen difficulty, or raise num_generations"
            )
        path = sampling.folder / ROWS
        write_atomic(path, "".join(_line(_row(one, sampling)) for one in picked))
        write_origin(path, _origin(sampling))
    return report


def remake(keys: SynthKeys, lines: Sequence[int] = ()) -> list[tuple[int, bool]]:
    """Rows of `rows.jsonl` sampled and scored anew, and whether each is the same to the byte; all where no line is named.

    Raises: ConfigError where model, sampling or rewards are not those that made them, DataError for a line that is not there.
    """
    sampling, _ = _SynthRun.of(keys)
    path = sampling.folder / ROWS
    if not path.is_file():
        raise DataError(f"{path}: no such file; make it first: posttrain data synth CONFIG")
    _begun(sampling)
    stored = dict(read_json_lines(path))
    if missing := [line for line in lines if line not in stored]:
        raise DataError(f"{path}: has no line {missing[0]}; expected 1 to {len(stored)}")
    wanted = {line: stored[line] for line in lines or stored}
    names = {_asked_and_samples(row)[0] for row in wanted.values()}
    chosen = replace(sampling, prompts=[one for one in sampling.prompts if one[0] in names])
    parts = _sample(chosen, range(len(chosen.parts())))
    anew = {attempts.id: attempts for _, part in parts for attempts in part}
    return [(line, _is_made_again(row, anew, sampling)) for line, row in wanted.items()]


def _is_made_again(row: Mapping[str, Any], anew: Mapping[str, Attempts], sampling: _SynthRun) -> bool:
    name, samples = _asked_and_samples(row)
    if name not in anew or not set(samples) <= set(range(sampling.keys.num_generations)):
        return False
    parts = tuple(anew[name].candidates[number] for number in samples)
    return _line(_row(Picked(anew[name], parts), sampling)) == _line(row)


def _asked_and_samples(row: Mapping[str, Any]) -> tuple[str, list[int]]:
    """Prompt and samples of its provenance; an empty name where an edited row has lost it."""
    match row.get(PROVENANCE_COLUMN):
        case {"prompt": str(name), "samples": [*samples]} if all(type(number) is int for number in samples):
            return name, samples
        case _:
            return "", []


def _skipped(summary: DataSummary) -> list[dict[str, Any]]:
    """What is no prompt, or too long a one."""
    return [
        {"origin": str(Origin(source.path, line)), "reason": f"skipped: {reason}"}
        for source in summary.sources
        for reason, skipped in source.skipped.items()
        for line in skipped.lines
    ]


def _distinct(rows: Sequence[PromptRow]) -> tuple[_PromptsById, list[dict[str, Any]]]:
    """Each prompt once, under its id: samples are seeded by it, so asked twice it would give the same again."""
    found: dict[str, PromptRow] = {}
    again: list[dict[str, Any]] = []
    for prompt, ids in rows:
        name = prompt_id(prompt)
        if name in found:
            again.append({"prompt": name, "reason": f"duplicate prompt: {prompt.origin} asks what {found[name][0].origin} asks"})  # fmt: skip
        else:
            found[name] = (prompt, ids)
    return list(found.items()), again


def prompt_id(prompt: Prompt) -> str:
    """Of what is asked and its columns, wherever it stands. Raises: DataError for a column that is no JSON."""
    asked = prompt.prompt if isinstance(prompt.prompt, str) else [dict(message) for message in prompt.prompt]
    try:
        digest = digest_json([asked, dict(prompt.columns), [dict(tool) for tool in prompt.tools]])
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{prompt.origin}: a column is no JSON, which rows of samples are: {error}; write it as text, or take it out"
        ) from None
    return digest.removeprefix("sha256:")[:16]


def _plain_params(keys: SynthKeys) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(sampling_params(keys.asked)).items()}  # fmt: skip


# --- sampling ------------------------------------------------------------------------------------------------------


def _begun(sampling: _SynthRun) -> None:
    """Say with what the samples are made. Raises: ConfigError where those there were made otherwise."""
    path = sampling.folder / _SAMPLED
    if not path.exists():
        write_json(path, dict(sampling.made_with))
        return
    before = read_record(path, dict, f"delete {sampling.folder} and start again")
    now = json.loads(json.dumps(sampling.made_with))
    if moved := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
        raise ConfigError(
            f"{sampling.folder} has samples that were made with another {' and '.join(moved)}; put it back, or set another "
            "output_dir, or delete that folder"
        )


def _part_path(sampling: _SynthRun, number: int) -> Path:
    return sampling.folder / _SAMPLES / f"part-{number:05d}.json"


def _all_attempts(sampling: _SynthRun, progress: SamplingProgress) -> list[Attempts]:
    """Of every prompt, in order. The model is loaded only if a part is missing."""
    parts = sampling.parts()
    missing = [number for number in range(len(parts)) if not _part_path(sampling, number).exists()]
    for number, attempts in _sample(sampling, missing) if missing else ():
        record = [{"prompt": one.id, "candidates": [asdict(c) for c in one.candidates]} for one in attempts]
        write_json(_part_path(sampling, number), record)
        progress(len(parts) - sum(not _part_path(sampling, n).exists() for n in missing), len(parts))
    return [one for number, part in enumerate(parts) for one in _read_part(_part_path(sampling, number), part)]


def _read_part(path: Path, part: _PromptsById) -> list[Attempts]:
    def build(record: Any) -> list[Attempts]:
        found = {one["prompt"]: tuple(Candidate(**candidate) for candidate in one["candidates"]) for one in record}
        return [Attempts(name, prompt, found[name]) for name, (prompt, _) in part]

    return read_record(path, build, f"delete {path} and start again: it is sampled anew")


def _sample(sampling: _SynthRun, wanted: Sequence[int]) -> Iterator[tuple[int, list[Attempts]]]:
    """The parts of these numbers. A completion follows from seed, prompt and sample, whatever is asked beside it."""
    keys, asked = sampling.keys, sampling.keys.asked
    source = EngineSource(asked)
    made = make_engine(source, keys=keys.rollout, rows=keys.rollout_batch_size, folder=sampling.folder)
    decode, params = decoder(sampling.tokenizer), sampling_params(asked)
    with closing(made) as engine, reward_pool(asked) as pool:
        for number, part in enumerate(sampling.parts()):
            if number not in wanted:
                continue
            rows = [row for _, row in part]
            numbers = [int(name, 16) for name, _ in part]
            groups = sample_groups(engine, rows, keys.num_generations, params, (keys.seed,), numbers)
            scored = score_groups(rows, groups, decode, pool.score)
            yield number, [_attempts(name, group) for (name, _), group in zip(part, scored, strict=True)]


def _attempts(name: str, group: RolloutGroup) -> Attempts:
    candidates = [
        Candidate(sample, one.text, one.completion.finish, one.completion.num_sampled, one.reward.total, one.reward.error)
        for sample, one in enumerate(group.rollouts)
    ]  # fmt: skip
    return Attempts(name, group.prompt, tuple(candidates))


# --- rows ----------------------------------------------------------------------------------------------------------


def _selected(
    keys: SynthKeys, attempts: Sequence[Attempts], suites: Mapping[str, Sequence[str]]
) -> tuple[list[Picked], list[dict[str, Any]]]:
    """The rows, and each prompt or completion that is in none, with why."""
    spec = spec_from(KeepSpec, keys)
    picked, left = list[Picked](), list[dict[str, Any]]()
    for one in attempts:
        if reason := _too_easy_or_hard(one, keys):
            left.append({"prompt": one.id, "reason": reason})
            continue
        rows, rest = pick(one, spec)
        picked += rows
        left += [_left(entry) for entry in rest]
    texts = [_texts(one) for one in picked]

    def again(places: Sequence[int]) -> Leaving:
        return repeats([texts[p][1] for p in places], [_name(picked[p]) for p in places], keys.dedup)

    def asked_in_evals(places: Sequence[int]) -> Leaving:
        return eval_prompts([texts[p][0] for p in places], [texts[p][1] for p in places], suites)

    def unbalanced(places: Sequence[int]) -> Leaving:
        return too_many([_value(picked[p], keys.balance) for p in places], keys.balance_ratio, keys.seed) if keys.balance else {}  # fmt: skip

    staying, leaving = without(range(len(picked)), [again, asked_in_evals, unbalanced])
    for place, reason in leaving.items():
        one = picked[place]
        left += [_left((one.of, candidate, reason)) for candidate in one.parts or (None,)]
    return [picked[place] for place in staying], left


def _too_easy_or_hard(one: Attempts, keys: SynthKeys) -> str | None:
    window = keys.difficulty
    if (window.min, window.max) == (0.0, 1.0):
        return None
    scored, right = one.num_right(keys.correct_from)
    if scored < window.k:
        return f"difficulty: {scored} samples were scored, which is too few for pass@{window.k}"
    rate = pass_at_k(scored, right, window.k)
    return None if window.min <= rate <= window.max else f"difficulty: pass@{window.k} {rate:.3f}"


def _left(entry: Left) -> dict[str, Any]:
    attempts, candidate, reason = entry
    shown = (
        {}
        if candidate is None
        else {"sample": candidate.sample, "completion": candidate.text, "reward": candidate.reward}
    )
    return {"prompt": attempts.id, **shown, "reason": reason}


def _texts(one: Picked) -> tuple[str, str]:
    asked = plain_text(one.of.prompt.prompt)
    return asked, "\n".join([asked, *(part.text for part in one.parts)])


def _name(one: Picked) -> str:
    return " ".join([f"prompt {one.of.id}", *(f"sample {part.sample}" for part in one.parts)])


def _value(one: Picked, column: str) -> str:
    columns = one.of.prompt.columns
    if column not in columns:
        found = ", ".join(sorted(columns)) or "none"
        raise DataError(f"{one.of.prompt.origin}: balance: {column} is no column of this prompt; it has {found}")
    return str(columns[column])


def _row(one: Picked, sampling: _SynthRun) -> dict[str, Any]:
    """With all that it takes to make it again."""
    keys, k = sampling.keys, sampling.keys.difficulty.k
    scored, right = one.of.num_right(keys.correct_from)
    provenance = {
        "model": sampling.made_with["model"],
        "engine": sampling.made_with["engine"],
        "prompt": one.of.id,
        "samples": [part.sample for part in one.parts],
        "rewards": [part.reward for part in one.parts],
        "seed": keys.seed,
        "sampling": sampling.made_with["sampling"],
        f"pass@{k}": pass_at_k(scored, right, k) if scored >= k else None,
    }
    return {**one.row, PROVENANCE_COLUMN: provenance}


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _origin(sampling: _SynthRun) -> dict[str, Any]:
    keys = sampling.keys
    choice = ("keep", "correct_from", "min_reward", "min_margin", "max_per_prompt", "keep_truncated", "dedup", "balance", "balance_ratio")  # fmt: skip
    return {
        "made_by": "posttrain data synth",
        "posttrain": posttrain.__version__,
        "base_model": Path(keys.base_model).name if Path(keys.base_model).is_absolute() else keys.base_model,
        **sampling.made_with,
        "data_origins": data_origins([source.path for source in keys.datasets]),
        "kept": {**{name: getattr(keys, name) for name in choice}, "difficulty": keys.difficulty.model_dump()},
        "decontaminated": suite_digests(keys.decontaminate),
    }


def suite_prompts(paths: Sequence[str]) -> dict[str, list[str]]:
    """What each suite asks, by its name. Raises: EvalError."""
    found = {name: load_suite(name, Path(path)) for path, name in _suite_names(paths).items()}
    return {name: [plain_text(item.prompt) for item in suite.items] for name, suite in found.items()}


def suite_digests(paths: Sequence[str]) -> dict[str, str]:
    return {name: suite_file_digest(Path(path)) for path, name in _suite_names(paths).items()}


def _suite_names(paths: Sequence[str]) -> dict[str, str]:
    """Path → name: that of its file, with folders where two have one name."""
    stems = Counter(Path(path).stem for path in set(paths))
    return {path: Path(path).stem if stems[Path(path).stem] == 1 else name for path, name in told_apart(paths).items()}


def _report(
    keys: SynthKeys, attempts: Sequence[Attempts], picked: Sequence[Picked], left: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    rewards = [one.reward for each in attempts for one in each.candidates if one.reward is not None]
    counts = [(scored, right) for one in attempts for scored, right in [one.num_right(keys.correct_from)]]
    at = {
        k: [pass_at_k(n, c, k) for n, c in counts if n >= k]
        for k in sorted({1, keys.difficulty.k, keys.num_generations})
    }
    return {
        "prompts": len(attempts),
        "completions": sum(len(one.candidates) for one in attempts),
        "rows": len(picked),
        "prompts_in_rows": len({one.of.id for one in picked}),
        "mean_reward": sum(rewards) / len(rewards) if rewards else None,
        "pass_at": {str(k): sum(rates) / len(rates) for k, rates in at.items() if rates},
        "left": dict(Counter(str(one["reason"]).partition(":")[0] for one in left).most_common()),
        **(
            {"balance": dict(sorted(Counter(_value(one, keys.balance) for one in picked).items()))}
            if keys.balance
            else {}
        ),
    }


def _counts(left: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left.items()) or "none was sampled"
