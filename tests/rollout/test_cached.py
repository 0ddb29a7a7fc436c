import re
import shlex
import tempfile

import pytest

from posttrain.c_compiler import find_compiler
from posttrain.cli import doctor
from posttrain.errors import ModelError
from posttrain.models import packed
from posttrain.models.native import NativeStep, built, kernels
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


@pytest.mark.usefixtures("compiler")
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


@pytest.mark.usefixtures("compiler")
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


@pytest.fixture
def built_anew():
    """What was built, or could not be, is forgotten before and after."""
    built.cache_clear()
    yield
    built.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "why"), [(None, "there is no C compiler"), ("echo no such flag >&2; exit 1", "does not build the kernels: no such flag"), ("exit 0", "does not build the kernels: .*native.so: cannot open")]
)  # fmt: skip
def test_without_a_compiler_the_key_says_why_and_nothing_else_changes(
    shared_policy, monkeypatch, tmp_path, caplog, compiler, why, built_anew
):
    policy, requests, params = shared_policy("qwen3"), [Request((5, 6, 7), 1)], SamplingParams(max_tokens=6)
    plain = in_order(EmbeddedEngine(policy, stop_token_ids=()).generate(requests, params))
    monkeypatch.delenv("CC", raising=False)
    if compiler is not None:
        (tmp_path / "cc").write_text(f"#!/bin/sh\necho >> {tmp_path}/asked\n{compiler}\n")
        (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    engine = EmbeddedEngine(policy, stop_token_ids=(), shortcuts=KERNELS)
    assert "rollout.native_kernels: no effect, because" in caplog.text and re.search(why, caplog.text)
    assert in_order(engine.generate(requests, params)) == plain
    with pytest.raises(ModelError, match=why):
        kernels(32)
    if compiler is not None:
        assert len((tmp_path / "asked").read_text()) == 1, "asked again in each call"
    [found] = doctor.decode_kernels()
    assert found.status == "note" and re.search(why, found.text)


@pytest.mark.usefixtures("compiler")
def test_the_compiler_of_cc_may_have_arguments_and_a_folder_that_cannot_be_written_is_said(
    monkeypatch, tmp_path, built_anew
):
    compiler = tmp_path / "my cc"
    compiler.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/first\nexec {shlex.join(find_compiler())} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", f"'{compiler}' -DUNUSED")
    kernels(32)
    assert (tmp_path / "first").read_text() == "-DUNUSED\n"
    built.cache_clear()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(ModelError, match=r"does not build the kernels: .*absent"):
        kernels(32)


def test_a_model_with_other_layers_says_so(shared_policy, caplog):
    for family, why in (("gemma2", "decodes by its own modules"), ("mamba", "decodes row by row")):
        caplog.clear()
        EmbeddedEngine(shared_policy(family), stop_token_ids=(), shortcuts=KERNELS)
        assert "rollout.native_kernels: no effect, because" in caplog.text and why in caplog.text
