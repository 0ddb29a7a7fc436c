"""What a client saves goes on here: eval, gate, serve and PEFT take it, with its lineage."""

import json
import os

import pytest
import tinker
from tests.serve.conftest import make_client
from tests.serve.conftest import running as serve_names
from typer.testing import CliRunner

from posttrain.cli.app import main
from posttrain.cli.gate import app as gate
from posttrain.errors import RunLockedError
from posttrain.files import nobody_reading
from posttrain.models.provenance import check_base, source_digest
from posttrain.recipes.run.run_folder import StageResult
from posttrain.serve.backends import of_folder
from posttrain.serve.setup import ServedNames


@pytest.fixture(scope="module")
def saved(running, bases, client_of, datum, tmp_path_factory):
    """The folder of a model that learned one answer by heart, saved for sampling."""
    folder = tmp_path_factory.mktemp("saved")
    with running(bases, folder) as serving, client_of(serving) as client:
        training = client.create_lora_training_client(base_model="tiny", rank=4, seed=3).result()
        tokenizer = training.get_tokenizer()
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What?"}], add_generation_prompt=True, tokenize=False
        )
        asked, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + "7<|im_end|>")
        data = [datum(whole, [0] * (len(asked) - 1) + [1] * (len(whole) - len(asked)))]
        for _ in range(12):
            training.forward_backward(data, "cross_entropy")
            training.optim_step(tinker.AdamParams(learning_rate=2e-2)).result()
        path = training.save_weights_for_sampler("last").result().path
        training.save_state("last").result()
        rest = tinker.RestClient(base_url=serving.address, api_key="tml-nothing")
        listed = rest.list_checkpoints(training.model_id).result().checkpoints
        info = rest.get_weights_info_by_tinker_path(path).result()
        run = rest.get_training_run(training.model_id).result()
        yield serving.service.shelf.resolve(path)[2], (listed, info, run)


def test_it_is_a_stage_whose_lineage_begins_at_the_base(saved, bases):
    folder, _ = saved
    made = StageResult.load(folder)
    assert (made.kind, made.steps) == ("tinker", 12)
    assert made.parent_digest == source_digest(str(bases["tiny"]))
    assert of_folder("x", folder / "model").digest == made.model_digest
    assert json.loads((folder / "model" / "posttrain.json").read_text())["base_digest"] == made.parent_digest
    check_base(folder / "adapter_total", bases["tiny"])
    assert made.adapter_total is not None
    assert not made.adapter_total.refused
    rows = [json.loads(line) for line in (folder.parents[1] / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_eval_scores_it_and_the_gate_judges_it(saved, bases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = {
        "messages": [{"role": "user", "content": "What?"}],
        "target": "7",
        "split": "gate",
        "scorer": "last_number",
    }
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps({"id": f"q{n}", **asked}) + "\n" for n in range(48)))
    for name, model in {"last": saved[0] / "model", "base": bases["tiny"]}.items():
        arguments = ["eval", str(model), "--suite", "heldout.jsonl", "--out", f"evals/{name}", "--max-tokens", "4"]
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
    (tmp_path / "gate.yaml").write_text("primary: [{suite: heldout, min_delta: 0.3}]\n")
    judged = CliRunner().invoke(gate, ["evals/last", "evals/base", "--spec", "gate.yaml"])
    assert judged.exit_code == 0, judged.output
    assert judged.output.splitlines()[-1].startswith("PASS")


@pytest.mark.parametrize("whole", [True, False], ids=["merged", "as an adapter"])
def test_it_is_served_to_the_openai_client_and_says_what_it_learned(saved, bases, tmp_path, whole):
    folder = saved[0]
    base = ServedNames([str(bases["tiny"])], tmp_path, loras={"last": folder / "adapter_total"})
    with serve_names(ServedNames([str(folder / "model")], tmp_path, name="last") if whole else base) as serving:
        asked = {"messages": [{"role": "user", "content": "What?"}], "temperature": 0, "max_tokens": 4}
        answer = make_client(serving).chat.completions.create(model="last", **asked)
    [choice] = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("7", "stop")
    assert answer.model.startswith("last@sha256:")


def test_a_base_stays_where_it_is_while_a_server_may_merge_onto_it(serving, bases):
    with pytest.raises(RunLockedError, match=f"is read by process {os.getpid()}"), nobody_reading(bases["tied"]):
        pass


def test_it_is_listed_with_what_it_is(saved):
    _, (listed, info, run) = saved
    assert {(c.checkpoint_id, c.checkpoint_type) for c in listed} == {
        ("sampler_weights/last", "sampler"), ("weights/last", "training"),
    }  # fmt: skip
    assert all(c.size_bytes for c in listed)
    assert (info.base_model, info.lora_rank, info.train_unembed) == ("tiny", 4, True)
    assert (run.base_model, run.is_lora, run.corrupted) == ("tiny", True, False)
    assert run.last_checkpoint.tinker_path.endswith("/weights/last")


def test_a_name_that_is_no_folders_and_one_that_is_taken_are_refused(client, serving, datum):
    training = client.create_lora_training_client(base_model="tiny", rank=2, seed=3).result()
    for name in ("../out", "a/b", ".hidden"):
        with pytest.raises(tinker.RequestFailedError, match="the name of a save: got"):
            training.save_state(name).result()
    training.save_state("one").result()
    with pytest.raises(
        tinker.RequestFailedError, match="weights/one is there already; give another name, or overwrite"
    ):
        training.save_state("one").result()
    training.forward_backward([datum((5, 9, 40))], "cross_entropy")
    training.optim_step(tinker.AdamParams()).result()
    path = training.save_state("one", overwrite=True).result().path
    resumed = client.create_training_client_from_state_with_optimizer(path).result()
    assert serving.service.shelf.present(resumed.model_id).tenant.step == 1
    for wrong in ("tinker://nobody:train:0/weights/one", f"{path}x", "tinker://a/b"):
        with pytest.raises(tinker.BadRequestError, match="no such"):
            client.create_training_client_from_state(wrong).result()
