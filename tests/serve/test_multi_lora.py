"""Many adapters over one base: each answer is that of its adapter alone, whatever is swapped meanwhile."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import httpx
import pytest

from posttrain import evidence
from posttrain.config.stages import ModelKeys
from posttrain.errors import ConfigError, ModelError, PosttrainError
from posttrain.evidence import GateVerdict, Verdict
from posttrain.files import digest_bytes, digest_tree
from posttrain.models.adapters import load_adapter
from posttrain.models.load import load_policy
from posttrain.registry import Manifest, Registry
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.sampling import request_seed
from posttrain.serve.backends import of_folder
from posttrain.serve.setup import ServedNames
from posttrain.serve.sources import RegistryAdapters
from posttrain.types import Request, SamplingParams, in_order

PROMPTS = ["What", "What is 1 plus", "The answer", "a b c"]
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def adapters(folder, make_adapter, tmp_path_factory):
    made = tmp_path_factory.mktemp("adapters")
    return [make_adapter(made / f"a{n}", folder, n) for n in range(8)]


@pytest.fixture(scope="module")
def alone(folder, adapters, tokenizer):
    """`alone(n)(prompt, seed)`: text and log-probs of adapter n by itself on the base; None: of the base."""
    made = {}

    def make(number):
        if number not in made:
            policy = load_policy(ModelKeys(base_model=str(folder)), trainable=False)
            if number is not None:
                policy.model = load_adapter(policy.model, adapters[number]).eval()
            made[number] = EmbeddedEngine(policy, stop_token_ids=(2,))
        engine = made[number]

        def ask(prompt, seed):
            request = Request(tuple(tokenizer(prompt)["input_ids"]), request_seed("serve", seed, 0))
            [found] = in_order(engine.generate([request], SamplingParams(MAX_TOKENS)))
            ended = found.finish == "stop"
            ids, logp = (values[: len(found.ids) - ended] for values in (found.ids, found.logp))
            return tokenizer.decode([i for i in ids if i not in (0, 1, 2)]), logp

        return ask

    return make


def asked(address, model, prompt, seed):
    body = {"model": model, "prompt": prompt, "seed": seed, "max_tokens": MAX_TOKENS, "logprobs": 0}
    answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


@dataclass(frozen=True)
class Heard:
    begun: float
    ended: float
    digest: str
    prompt: str
    seed: int
    text: str
    logp: list


def heard(address, model, number):
    prompt, begun = PROMPTS[number % len(PROMPTS)], time.monotonic()
    found = asked(address, model, prompt, number)
    [choice] = found["choices"]
    return Heard(
        begun,
        time.monotonic(),
        found["system_fingerprint"],
        prompt,
        number,
        choice["text"],
        choice["logprobs"]["token_logprobs"],
    )


def is_right(one, ask):
    text, logp = ask(one.prompt, one.seed)
    # The last token may be a special one, whose text is empty.
    assert one.text == text and one.logp == pytest.approx(list(logp)[: len(one.logp)], abs=1e-5)


def test_64_at_once_over_8_adapters_of_which_3_fit_are_each_what_they_are_alone(running, folder, adapters, alone):
    loras = {adapter.name: adapter for adapter in adapters}
    with running(ServedNames([str(folder)], folder, loras=loras, name="base"), max_loras=3) as serving:
        models = ["base", *loras]
        with ThreadPoolExecutor(64) as pool:
            found = list(pool.map(lambda n: heard(serving.address, models[n % 9], n), range(72)))
        assert len(serving.service.router.ids) <= 4
    for number, one in enumerate(found):
        is_right(one, alone(number % 9 - 1 if number % 9 else None))


def passing(candidate, baseline):
    test = evidence.TestResult(
        "primary", "heldout", "exact", 1000, 1000, 0.4, 0.5, 0.1, 0.07, 0.13, 0.075, 0.05, 0.001, Verdict.PASS, "as measured",
        (150, 50),
    )  # fmt: skip
    return GateVerdict(Verdict.PASS, "as measured", candidate, baseline, digest_bytes(b"spec"), 0.05, (test,))


@pytest.fixture
def registered(tmp_path, folder, adapters):
    """A registry of `math`, whose versions are the adapters; the models themselves are stand-ins, since none is loaded."""
    base, models = digest_tree(folder), []
    with closing(Registry(tmp_path / "registry")) as book:
        for number, adapter in enumerate(adapters):
            model = tmp_path / f"model-{number}"
            shutil.copytree(folder, model)
            (model / "number").write_text(str(number))
            models.append(digest_tree(model))
            outputs = {"model": models[-1], "adapter_total": digest_tree(adapter)}
            chain = [Manifest("sft", {"model": base, "data": base}, outputs)]
            book.register("math", model, chain, evidence={"adapter_total": adapter})
        book.promote("math", 1, "champion", passing(models[0], base))
    return tmp_path / "registry", models


@pytest.mark.parametrize(
    ("at_once", "rounds", "least_s"), [(12, 1, 0), pytest.param(64, 99, 60, marks=pytest.mark.slow)], ids=["short", "a minute"]
)  # fmt: skip
def test_swaps_under_load_answer_with_the_version_that_the_alias_means(
    running, folder, adapters, alone, registered, at_once, rounds, least_s
):
    """Every promotion and a rollback while `at_once` requests are under way; the long form then moves the alias to and fro."""
    registry, models = registered
    digests = [digest_tree(adapter) for adapter in adapters]
    found, swaps = [], [(time.monotonic(), time.monotonic(), digests[0])]
    with (
        running(ServedNames(["math"], registry, base=folder), max_loras=3) as serving, ThreadPoolExecutor(64) as pool,
        closing(Registry(registry)) as book,
    ):  # fmt: skip
        begun, number = time.monotonic(), 0
        moves = [("promote", version) for version in range(2, 9)] + [("roll back", 7)]
        again = [("set", version) for version in (1, 8, 3, 5, 2, 7)] * rounds
        for kind, version in moves + again[: len(again) if least_s else 0]:
            asking = []
            for _ in range(at_once):
                model = ("math", "math@champion", f"math@{1 + number % 8}")[number % 3]
                asking.append((model, pool.submit(heard, serving.address, model, number)))
                number += 1
            moving = time.monotonic()
            if kind == "promote":
                book.promote("math", version, "champion", passing(models[version - 1], models[version - 2]))
            elif kind == "roll back":
                book.rollback("math", "champion", "a test")
            else:
                book.rows.set_alias("math", "champion", version, 1, book.alias_epoch("math", "champion") + 1, None)
            ids = lambda: {m["id"]: m["digest"] for m in httpx.get(f"{serving.address}/v1/models").json()["data"]}  # noqa: E731
            until_s = time.monotonic() + 60
            while ids()["math@champion"] != digests[version - 1]:
                assert time.monotonic() < until_s
                time.sleep(0.02)
            swaps.append((moving, time.monotonic(), digests[version - 1]))
            found += [(model, future.result()) for model, future in asking]
            if least_s and time.monotonic() - begun > least_s:
                break
        found += [("math", heard(serving.address, "math", n)) for n in range(3)]
    for model, one in found:
        place = digests.index(one.digest)
        is_right(one, alone(place))
        if model[5:].isdecimal():
            assert place == int(model[5:]) - 1
        else:
            ends = [seen for _, seen, _ in swaps[1:]] + [float("inf")]
            spans = [
                (moving, end) for (moving, _, digest), end in zip(swaps, ends, strict=True) if digest == one.digest
            ]
            assert any(moving <= one.ended and one.begun <= end for moving, end in spans)


def test_a_prompt_cached_for_one_adapter_is_not_anothers(running, folder, adapters, alone):
    loras = {"a0": adapters[0], "a1": adapters[1]}
    names = ServedNames([str(folder)], folder, loras=loras, name="base")
    with running(names) as serving, ThreadPoolExecutor(12) as pool:
        models = [("base", "a0", "a1")[n % 3] for n in range(12)]
        texts = list(pool.map(lambda m: asked(serving.address, m, PROMPTS[1], 5)["choices"][0]["text"], models))
    for number, text in enumerate(texts):
        assert text == alone((None, 0, 1)[number % 3])(PROMPTS[1], 5)[0]


def test_an_adapter_has_its_own_chat_template(running, folder, adapters, tokenizer, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(adapters[0], own)
    changed = type(tokenizer).from_pretrained(folder)
    changed.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    changed.save_pretrained(own)
    with running(ServedNames([str(folder)], folder, loras={"own": own}, name="base")) as serving:

        def tokens(model):
            body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
            return httpx.post(f"{serving.address}/tokenize", json=body).json()["tokens"]

        assert tokens("own") == [1, *tokenizer("hi")["input_ids"]] and len(tokens("base")) > len(tokens("own"))


def test_a_champion_without_an_adapter_stops_its_own_name_alone(registered, folder, tmp_path):
    registry, models = registered
    base = of_folder("base", folder)
    source = RegistryAdapters(registry, ["math"], base)
    before, lost = source.names()
    assert lost == {} and before["math"] == before["math@1"]
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    (whole / "number").write_text("whole")
    with closing(Registry(registry)) as book:
        made = Manifest("sft", {"model": base.digest, "data": base.digest}, {"model": digest_tree(whole)})
        entry = book.register("math", whole, [made])
        book.promote("math", entry.version, "champion", passing(entry.digest, models[0]))
    found, lost = source.names()
    assert found["math@1"] == before["math@1"] and not found.keys() & {"math", "math@champion"}
    assert set(lost) == {"math", "math@champion"} and "leave --base out" in str(lost["math"])


def test_what_cannot_be_served_together_is_refused(running, folder, adapters, registered, tmp_path):
    registry, _ = registered
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "more").write_text("")
    cases = [
        (ServedNames(["math"], registry, base=other), PosttrainError, "serve it whole: leave --base out"),
        (ServedNames(["math@1"], registry, base=folder), ConfigError, "write the name alone"),
        (ServedNames(["math"], registry, loras={"a": adapters[0]}), ConfigError, "needs the base"),
        (ServedNames([str(folder)], registry, loras={"a": folder}), ModelError, "no adapter_config.json"),
        (ServedNames([str(folder)], registry, loras={"x": adapters[0]}, name="x"), ConfigError, "x names two models"),
        (ServedNames([str(adapters[0])], registry), ModelError, "is an adapter; serve it with its base"),
    ]
    for names, error, said in cases:
        with pytest.raises(error, match=said), running(names):
            pass
