"""A base that does not stay as it was while the run goes on: no score and no verdict under another model's name."""

import shutil

import pytest

from posttrain.errors import ChangedInputsError
from posttrain.pipeline.run import Evals

SFT = {
    "datasets": [{"path": "sft.jsonl"}], "learning_rate": 1e-2, "max_steps": 8,
    "per_device_train_batch_size": 8, "lr_scheduler_type": "constant",
}  # fmt: skip
GATE = {"baseline": "alias:champion", "primary": [{"suite": "yes", "min_delta": 0.35}]}


def flip(base):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2] + b"\x07\x07")


@pytest.mark.parametrize(("change", "words"), [(flip, "it is sha256:"), (shutil.rmtree, "it is gone by now")])
def test_a_base_that_changes_while_the_run_goes_on_is_named_and_judged_by_nobody(
    project, model_dir, monkeypatch, change, words
):
    run = project([{"sft": SFT}], gate=GATE, register={"name": "yes"})
    base = shutil.copytree(model_dir("qwen3"), run.folder / "base")
    run.values["base_model"] = "./base"
    measure = Evals.measure

    def then(self, model, *rest):
        reports = measure(self, model, *rest)
        if model.name == "01-sft" and base.exists():
            change(base)
        return reports

    monkeypatch.setattr(Evals, "measure", then)
    with pytest.raises(ChangedInputsError, match=f"{base} changed while the run was under way: it was .*{words}"):
        run.run()
    assert (run.state.status, run.state.gates, run.state.registered) == ("error", (), None)
    monkeypatch.undo()
    shutil.rmtree(base, ignore_errors=True)
    shutil.copytree(model_dir("qwen3"), base)
    assert run.run().promoted, "put back, it goes on from where it was"
