"""Our engines as a model of lm-eval, for its tasks here and for its Python API: `simple_evaluate(model=EngineLM(…), …)`.

Needs the extra `[eval]`. Encodings, windows and stop strings are those of lm-eval's `hf` model, so that numbers are equal item by item.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from posttrain.config.pipeline import SuiteKeys
from posttrain.errors import EvalError
from posttrain.evals.harness import TaskSuite
from posttrain.evals.run import prompt_digest
from posttrain.evals.suite import Item
from posttrain.evidence import ItemRecord
from posttrain.protocols import Engine
from posttrain.rollout.sampling import request_seed
from posttrain.types import Completion, Request, SamplingParams, in_order

_SAMPLING = {"do_sample", "temperature", "top_p", "top_k", "min_p"}


class EngineLM(TemplateLM):
    """`window`: the most tokens that the model reads. `max_gen_toks`: of an answer, where its task says nothing. Source: lm_eval/models/huggingface.py of 0.4.13, whose answers end at the
    model's own ends; here they end at the chat template's end of turn too.
    """

    def __init__(self, engine: Engine, tokenizer: Any, window: int, *, max_gen_toks: int = 256, seed: int = 0) -> None:
        super().__init__()
        self.engine, self.tokenizer, self.max_length = engine, tokenizer, window
        self._max_gen_toks, self._seed = max_gen_toks, seed
        self.completions: dict[str, list[Completion]] = {}
        """Prompt → what was sampled for it."""

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False  # a chat template has written it already
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **special)

    # --- scores ----------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [self._fitted(context, continuation) for _, context, continuation in requests]
        logps = self._scores(pairs)
        greedy = self._greedy(pairs)
        return [(logp, greedy[tuple(ids[:start])][: len(ids) - start] == ids[start:]) for logp, (ids, start) in zip(logps, pairs, strict=True)]  # fmt: skip

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        found: list[float] = []
        for request in requests:
            [text] = request.args
            windows: Any = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            pairs = [
                self._fitted(context, continuation) for context, continuation in map(make_disjoint_window, windows)
            ]
            found.append(sum(self._scores(pairs)))
        return found

    def _fitted(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[list[int], int]:
        """The ids that fit, cut from the left, and where the continuation begins."""
        ids = [*context, *continuation][-(self.max_length + 1) :]
        start = len(ids) - len(continuation)
        if start < 1:
            raise EvalError(
                f"a choice of {len(continuation)} tokens does not fit the model's window of {self.max_length}"
            )
        return ids, start

    def _scores(self, pairs: Sequence[tuple[list[int], int]]) -> list[float]:
        """Texts that are asked about several times are scored once."""
        unique = list(dict.fromkeys((tuple(ids), start) for ids, start in pairs))
        logp = dict(zip(unique, (sum(values) for values in self.engine.score(unique)), strict=True))
        return [logp[tuple(ids), start] for ids, start in pairs]

    def _greedy(self, pairs: Sequence[tuple[list[int], int]]) -> dict[tuple[int, ...], list[int]]:
        """What the model itself says behind each context, for as long as one of its continuations could be that."""
        wanted: dict[tuple[int, ...], list[list[int]]] = {}
        for ids, start in pairs:
            wanted.setdefault(tuple(ids[:start]), []).append(ids[start:])
        found = self._sampled(dict.fromkeys(wanted, 1))
        longer = {
            context: max(len(c) for c in continuations if c[:1] == found[context])
            for context, continuations in wanted.items()
            if any(len(c) > 1 and c[:1] == found[context] for c in continuations)
        }
        return found | self._sampled(longer)

    def _sampled(self, lengths: Mapping[tuple[int, ...], int]) -> dict[tuple[int, ...], list[int]]:
        found: dict[tuple[int, ...], list[int]] = {}
        for length in sorted(set(lengths.values())):
            contexts = [context for context, own in lengths.items() if own == length]
            answers = self.engine.generate([Request(ids, 0) for ids in contexts], SamplingParams(length, 0.0))
            found |= {ids: list(answer.ids) for ids, answer in zip(contexts, in_order(answers), strict=True)}
        return found

    # --- answers ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Requests that are sampled alike at once."""
        alike: dict[str, list[int]] = {}
        asked: list[Any] = [request.args for request in requests]
        for place, (_, kwargs) in enumerate(asked):
            alike.setdefault(repr(kwargs), []).append(place)
        texts: dict[int, str] = {}
        for places in alike.values():
            contexts = [asked[place][0] for place in places]
            texts |= dict(zip(places, self._answers(contexts, asked[places[0]][1]), strict=True))
        return [texts[place] for place in range(len(requests))]

    def _answers(self, contexts: Sequence[str], asked: Mapping[str, Any]) -> Iterator[str]:
        kwargs: dict[str, Any] = {**normalize_gen_kwargs(dict(asked), self._max_gen_toks)}
        until, max_tokens = list(kwargs.pop("until", None) or []), kwargs.pop("max_gen_toks")
        if unknown := sorted(set(kwargs) - _SAMPLING):
            raise EvalError(
                f"generation_kwargs: {unknown[0]} is not known to our sampling; expected {', '.join(sorted(_SAMPLING))}"
            )
        if max_tokens >= self.max_length:
            raise EvalError(
                f"max_gen_toks {max_tokens} leaves no room for a prompt in the model's window of {self.max_length}"
            )
        stops = handle_stop_sequences(list(until), self.tokenizer.decode(self.eot_token_id))
        params = SamplingParams(
            max_tokens, float(kwargs["temperature"] if kwargs["do_sample"] else 0.0), kwargs.get("top_p", 1.0), kwargs.get("top_k", 0),
            kwargs.get("min_p", 0.0), stop=tuple(stop for stop in until if stop),
        )  # fmt: skip
        most = self.max_length - max_tokens
        asking = [
            Request(tuple(self.tok_encode(context)[-most:]), request_seed("lm-eval", self._seed, number))
            for number, context in enumerate(contexts)
        ]
        for context, answer in zip(contexts, in_order(self.engine.generate(asking, params)), strict=True):
            self.completions.setdefault(context, []).append(answer)
            text = self.tokenizer.decode(list(answer.ids), skip_special_tokens=True)
            yield postprocess_generated_text(text, stops, None)


# --- a task as a suite ---------------------------------------------------------------------------------------------


def ask(suite: TaskSuite, keys: SuiteKeys, engine: Engine, tokenizer: Any, config: Any) -> list[ItemRecord]:
    """Raises: EvalError for keys that the task itself decides, and for a metric that is no number of each document."""
    _check_keys(suite, keys)
    window = resolve_max_length(config, tokenizer)
    lm, spec = EngineLM(engine, tokenizer, window, max_gen_toks=keys.max_tokens, seed=keys.seed), suite.spec
    with _random_numbers_kept():
        found: Any = simple_evaluate(
            model=lm, tasks=[suite.task], apply_chat_template=spec.apply_chat_template, fewshot_as_multiturn=spec.fewshot_as_multiturn,
            bootstrap_iters=0, log_samples=True, task_manager=TaskManager(include_defaults=False),
        )  # fmt: skip
    [samples] = found["samples"].values()
    wanted = spec.filter or samples[0]["filter"]
    by_doc = {sample["doc_id"]: sample for sample in samples if sample["filter"] == wanted}
    if not by_doc:
        filters = ", ".join(sorted({sample["filter"] for sample in samples}))
        raise EvalError(f"suite {suite.name}: the task has no filter {wanted}; it has {filters}")
    return [_record(suite, item, by_doc[int(item.id)], lm) for item in suite.items]


def _check_keys(suite: TaskSuite, keys: SuiteKeys) -> None:
    given = [
        name for name, value in (("num_samples", keys.num_samples - 1), ("temperature", keys.temperature)) if value
    ]
    if given:
        raise EvalError(
            f"evals.{suite.name}.{given[0]}: a task of lm-eval says itself how often and how warm it is sampled (repeats, "
            "generation_kwargs); leave it out"
        )


def _record(suite: TaskSuite, item: Item, sample: Mapping[str, Any], lm: EngineLM) -> ItemRecord:
    metric = suite.spec.metric or sample["metrics"][0]
    score = sample.get(metric)
    if not isinstance(score, (bool, int, float)):
        raise EvalError(
            f"suite {suite.name}: metric {metric} of document {item.id} is {score!r}, no number that models are compared by; name "
            f"another with ?metric=, of {', '.join(sample['metrics'])}"
        )
    if suite.task.OUTPUT_TYPE != "generate_until":
        return ItemRecord(item.id, prompt_digest(item), (float(score),))
    prompt = sample["arguments"][0][0]
    answers = lm.completions[prompt][: len(sample["resps"][0])]
    return ItemRecord(
        item.id, prompt_digest(item), (float(score),), None, tuple(sample["resps"][0]), tuple(a.finish for a in answers),
        tuple(len(a.ids) for a in answers),
    )  # fmt: skip


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """lm-eval seeds the generators of the whole process."""
    python, numpy, own = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(own)
