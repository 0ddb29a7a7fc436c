import pytest

from posttrain.cli import doctor
from posttrain.errors import ModelError
from posttrain.models import packed
from posttrain.models.native import NativeStep, kernels
from posttrain.rollout import kv
from posttrain.rollout.cached import Shortcuts
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.types import Request, SamplingParams, in_order

KERNELS = Shortcuts(native_kernels=True)


def _sizes(monkeypatch):
    """Rows of each step in which the kernels attend."""
    sizes, one_each = [], NativeStep.one_each
    monkeypatch.setattr(
        NativeStep, "one_each", lambda step, ids, *rest: (sizes.append(len(ids)), one_each(step, ids, *rest))[1]
    )
    return sizes


@pytest.mark.parametrize(
    ("family", "prepack"), [("llama", False), ("mistral", False), ("qwen2", False), ("qwen3", False), ("qwen3", True)]
)
def test_the_kernels_give_the_tokens_and_the_trainers_log_probs(shared_policy, monkeypatch, family, prepack):
    """Groups and single rows, of one length and of others, which come and go; two architectures have a window of 6 tokens."""
    policy, sizes = shared_policy(family), _sizes(monkeypatch)
    monkeypatch.setattr(packed, "_LEAST_WORK", 0)
    prompts = [tuple(range(9 + n, 9 + n + length)) for n, length in enumerate((1, 3, 3, 3, 21, 21, 40))]
    requests = [Request(prompt, n, max_tokens=3 + 9 * n) for n, prompt in enumerate([*prompts, *prompts[2:5]])]
    params = SamplingParams(max_tokens=90)
    plain = in_order(EmbeddedEngine(policy, stop_token_ids=(2,), batch_size=6).generate(requests, params))
    assert not sizes
    engine = EmbeddedEngine(
        policy, stop_token_ids=(2,), batch_size=6, shortcuts=Shortcuts(prepack=prepack, native_kernels=True)
    )
    found = in_order(engine.generate(requests, params))
    assert [c.ids for c in found] == [c.ids for c in plain]
    assert max(sizes) == 6 and sizes[-1] == 1
    scored = engine.score([((*r.prompt_ids, *c.ids), len(r.prompt_ids)) for r, c in zip(requests, found, strict=True)])
    for completion, logp in zip(found, scored, strict=True):
        assert completion.logp == pytest.approx(logp, abs=1e-5)


def test_a_prompt_that_is_long_for_its_rows_is_attended_to_as_without_kernels(shared_policy, monkeypatch):
    policy, sizes = shared_policy("qwen3"), _sizes(monkeypatch)
    monkeypatch.setattr(kv, "_LEAST_SHARED", 3 * 5)
    requests = [Request((5, 6, 7, 8, 9), n, max_tokens=4 + n) for n in range(4)]
    engine = EmbeddedEngine(policy, stop_token_ids=(), shortcuts=KERNELS)
    found = in_order(engine.generate(requests, SamplingParams(max_tokens=9)))
    # Four and three rows are too many for the prompt's five tokens; the last token of a row is sampled, not read.
    assert sizes == [2, 1]
    plain = in_order(EmbeddedEngine(policy, stop_token_ids=()).generate(requests, SamplingParams(max_tokens=9)))
    assert [c.ids for c in found] == [c.ids for c in plain]


@pytest.mark.parametrize(
    ("compiler", "why"), [(None, "there is no C compiler"), ("echo no such flag >&2; exit 1", "does not build the kernels: no such flag")]
)  # fmt: skip
def test_without_a_compiler_the_key_says_why_and_nothing_else_changes(
    shared_policy, monkeypatch, tmp_path, caplog, compiler, why
):
    policy, requests, params = shared_policy("qwen3"), [Request((5, 6, 7), 1)], SamplingParams(max_tokens=6)
    plain = in_order(EmbeddedEngine(policy, stop_token_ids=()).generate(requests, params))
    kernels.cache_clear()
    monkeypatch.delenv("CC", raising=False)
    if compiler is not None:
        (tmp_path / "cc").write_text(f"#!/bin/sh\n{compiler}\n")
        (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    engine = EmbeddedEngine(policy, stop_token_ids=(), shortcuts=KERNELS)
    assert "rollout.native_kernels: no effect, because" in caplog.text and why in caplog.text
    assert in_order(engine.generate(requests, params)) == plain
    with pytest.raises(ModelError, match=why):
        kernels(32)
    [found] = doctor.decode_kernels()
    assert found.status == "note" and why in found.text


def test_a_model_with_other_layers_says_so(shared_policy, caplog):
    for family, why in (("gemma2", "decodes by its own modules"), ("mamba", "decodes row by row")):
        caplog.clear()
        EmbeddedEngine(shared_policy(family), stop_token_ids=(), shortcuts=KERNELS)
        assert "rollout.native_kernels: no effect, because" in caplog.text and why in caplog.text
