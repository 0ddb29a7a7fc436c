"""`posttrain data instruct`: prompts that a teacher writes, from prompts or from answers; each answer is kept as it comes."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import posttrain
from posttrain.checkpoint.lock import run_lock
from posttrain.config.datasets import RowKind
from posttrain.config.instruct import InstructKeys
from posttrain.config.synth import LEFT, ROWS
from posttrain.data.curation import Leaving, eval_prompts, repeats, without
from posttrain.data.formats import Noun, detect_format, parse_rows
from posttrain.data.lint_input import answers_of, prompt_of
from posttrain.data.opened import read_source
from posttrain.data.origin import data_origins, remove_rows, write_origin
from posttrain.data.sources import short_path
from posttrain.errors import DataError
from posttrain.files import digest_json, write_atomic, write_json
from posttrain.grading.slots import visible
from posttrain.models.provenance import source_digest
from posttrain.names import told_apart
from posttrain.recipes.measure.judges import JudgeReply, asked_judge
from posttrain.rollout.sampling import request_seed
from posttrain.synthesis.synth import PROVENANCE_COLUMN, REPORT, suite_digests, suite_prompts

_ALONE = "Answer with it alone: no introduction, no answer to it."
_SELF_INSTRUCT = (
    f"Here are some tasks.\n\n{{shown}}\n\nWrite one new task of the same kind that is none of these. {_ALONE}"
)
_EVOLVE = (
    "Make this task harder by one more constraint.",
    "Make this task ask for more depth.",
    "Replace a general notion in this task by a specific one.",
    "Rewrite this task so that it takes more steps of reasoning.",
    "Write a rarer task of the same field as this one.",
)
_BACK = f"Here is a text.\n\n{{shown}}\n\nWrite the instruction to which this text is the ideal answer. {_ALONE}"


@dataclass(frozen=True, slots=True)
class ShownRows:
    """What one question shows, and in which words it asks."""

    rows: tuple[int, ...]
    form: str


def _draw_some(made: random.Random, number: int, count: int, num_shown: int) -> ShownRows:
    """Source: Self-Instruct, arXiv 2212.10560."""
    return ShownRows(tuple(made.sample(range(count), min(num_shown, count))), _SELF_INSTRUCT)


def _draw_one(made: random.Random, number: int, count: int, num_shown: int) -> ShownRows:
    """Source: Evol-Instruct (WizardLM), arXiv 2304.12244."""
    return ShownRows((number % count,), f"{made.choice(_EVOLVE)}\n\n{{shown}}\n\n{_ALONE}")


def _take_answer(made: random.Random, number: int, count: int, num_shown: int) -> ShownRows:
    """Source: instruction back-translation, arXiv 2308.06259."""
    return ShownRows((number % count,), _BACK)


INSTRUCT_METHODS: Mapping[str, tuple[RowKind, Callable[[random.Random, int, int, int], ShownRows]]] = {
    "self_instruct": ("prompts", _draw_some),
    "evolve": ("prompts", _draw_one),
    "back_translate": ("examples", _take_answer),
}
"""`method` → the rows it reads, and what question number n shows of them."""


def write_instructions(keys: InstructKeys) -> dict[str, Any]:
    """Rows, what left and why, and a report, in `output_dir`. Started again, nothing is asked twice. Raises: DataError, RewardError."""
    kind, draw = INSTRUCT_METHODS[keys.method]
    nouns, skipped, digests = _read(keys, kind)
    seen = [_answer(noun) if kind == "examples" else prompt_of(noun) for noun in nouns]
    names = told_apart(noun.origin.path for noun in nouns)
    stands = [f"{names[noun.origin.path]}:{noun.origin.line}" for noun in nouns]
    count = keys.num_instructions or len(nouns)
    seeds = [request_seed("instruct", keys.seed, number) for number in range(count)]
    shown = [draw(random.Random(seed), n, len(nouns), keys.num_shown) for n, seed in enumerate(seeds)]
    # Half the bits: some servers take no more.
    asked = [(_question(one, seen, keys.prompt), seed >> 33) for one, seed in zip(shown, seeds, strict=True)]
    folder = Path(keys.output_dir)
    suites = suite_prompts(keys.decontaminate)
    with run_lock(folder):
        teacher = asked_judge(keys.asked(str(folder / "replies")))
        try:
            replies = teacher.replies(asked)
        finally:
            teacher.close()
        rows = [
            _row(keys, reply, [stands[row] for row in one.rows], seed)
            for reply, one, (_, seed) in zip(replies, shown, asked, strict=True)
        ]
        staying, left = _sorted_out(keys, rows, replies, [prompt_of(noun) for noun in nouns], suites)
        gone = skipped + [
            {"instruction": rows[n]["prompt"], "reason": left[n], PROVENANCE_COLUMN: rows[n][PROVENANCE_COLUMN]}
            for n in sorted(left)
        ]
        reasons = dict(Counter(one["reason"].partition(":")[0] for one in gone).most_common())
        write_atomic(folder / LEFT, "".join(map(_json_line, gone)))
        write_json(folder / REPORT, report := {"asked": count, "rows": len(staying), "left": reasons})
        if not staying:
            remove_rows(folder / ROWS)
            raise DataError(
                f"{folder}: no instruction is left of {count}: {next(iter(left.values()))}; see left.jsonl there"
            )
        write_atomic(folder / ROWS, "".join(_json_line(_written(rows[n], nouns, shown[n])) for n in staying))
        write_origin(folder / ROWS, _origin(keys, digests))
    return report


def _read(keys: InstructKeys, kind: RowKind) -> tuple[list[Noun], list[dict[str, Any]], dict[str, str]]:
    """What can be shown, what cannot with why, and the digest of each source. Raises: DataError."""
    nouns, skipped, digests = list[Noun](), list[dict[str, Any]](), dict[str, str]()
    for source in keys.datasets:
        read = read_source(source)
        found, skips = parse_rows(read.rows, detect_format(read.rows, kind, source.type).name, source)
        if not found:
            raise DataError(
                f"{short_path(source.path)}: has no row that can be shown to a teacher: {skips[0].reason} ({skips[0].origin} "
                "and the others); expected at least one"
            )
        nouns += found
        skipped += [{"origin": str(skip.origin), "reason": f"skipped: {skip.reason}"} for skip in skips]
        digests[source.path] = read.digest
    return nouns, skipped, digests


def _question(one: ShownRows, seen: Sequence[str], form: str | None) -> list[dict[str, str]]:
    text = "\n\n".join(seen[row] for row in one.rows)
    return [{"role": "user", "content": (form or one.form).replace("{shown}", text)}]


def _answer(noun: Noun) -> str:
    """Raises: DataError for an example of several answers."""
    answers = answers_of(noun)
    if len(answers) != 1:
        raise DataError(
            f"{noun.origin}: has {len(answers)} answers; back_translate asks what one answer answers; expected one"
        )
    return answers[0]


def _row(keys: InstructKeys, reply: JudgeReply, shown: Sequence[str], seed: int) -> dict[str, Any]:
    provenance = {
        "teacher": _teacher(keys),
        "method": keys.method,
        "shown": list(shown),
        "seed": seed,
        "sampling": {"temperature": keys.temperature, "max_tokens": keys.max_tokens},
    }
    return {"prompt": (visible(reply.text or "") or "").strip(), PROVENANCE_COLUMN: provenance}


def _teacher(keys: InstructKeys) -> str:
    """At a server by its name there; else by its digest, for where it lies is nobody's business."""
    return source_digest(keys.model) if keys.url is None else keys.model


def _written(row: Mapping[str, Any], nouns: Sequence[Noun], one: ShownRows) -> dict[str, Any]:
    """A prompt for `grpo` and `data synth`; of back-translation the instruction with the text that it asks for."""
    asked, provenance = {"role": "user", "content": row["prompt"]}, row[PROVENANCE_COLUMN]
    if provenance["method"] != "back_translate":
        return {"prompt": [asked], PROVENANCE_COLUMN: provenance}
    answer = {"role": "assistant", "content": _answer(nouns[one.rows[0]])}
    return {"messages": [asked, answer], PROVENANCE_COLUMN: provenance}


def _sorted_out(
    keys: InstructKeys, rows: Sequence[Mapping[str, Any]], replies: Sequence[JudgeReply], seen: Sequence[str],
    suites: Mapping[str, Sequence[str]],
) -> tuple[list[int], dict[int, str]]:  # fmt: skip
    def texts(places: Sequence[int]) -> list[str]:
        return [rows[place]["prompt"] for place in places]

    def unusable(places: Sequence[int]) -> Leaving:
        found = Leaving()
        for n, place in enumerate(places):
            reply, text = replies[place], rows[place]["prompt"]
            if reply.text is None:
                found[n] = f"unanswered: {reply.error}"
            elif reply.cut and not keys.keep_truncated:
                found[n] = f"cut: at max_tokens {keys.max_tokens}"
            elif not text or len(text) > keys.max_chars:
                found[n] = f"length: {len(text)} characters"
        return found

    def again(places: Sequence[int]) -> Leaving:
        """Also of what was shown: that stands first, and does not leave."""
        names = [
            *(f"row {n + 1} of datasets" for n in range(len(seen))),
            *(f"instruction {place + 1}" for place in places),
        ]
        found = repeats([*seen, *texts(places)], names, keys.dedup, keys.near)
        return {place - len(seen): why for place, why in found.items() if place >= len(seen)}

    def asked_in_evals(places: Sequence[int]) -> Leaving:
        return eval_prompts(texts(places), texts(places), suites)

    return without(range(len(rows)), [unusable, again, asked_in_evals])


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _origin(keys: InstructKeys, digests: Mapping[str, str]) -> dict[str, Any]:
    names = told_apart(source.path for source in keys.datasets)
    return {
        "made_by": "posttrain data instruct",
        "posttrain": posttrain.__version__,
        "teacher": _teacher(keys),
        "method": keys.method,
        "seed": keys.seed,
        "data": {names[path]: digest for path, digest in digests.items()},
        "data_origins": data_origins([source.path for source in keys.datasets]),
        "asked": digest_json([keys.prompt, keys.num_shown, keys.temperature, keys.max_tokens]),
        "decontaminated": suite_digests(keys.decontaminate),
    }
