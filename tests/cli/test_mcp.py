"""`posttrain mcp`, asked by the protocol's own client over stdio; what its tools refuse is asked of the tools."""

import json
import sys
from importlib.util import find_spec

import pytest

from posttrain.cli.agent_acts import Act, ActTools
from posttrain.cli.agent_folder import ServedFolder
from posttrain.cli.agent_tools import ReadTools
from posttrain.cli.app import main
from posttrain.errors import ConfigError, DataError
from posttrain.evidence import EvalReport, ItemRecord
from posttrain.files import digest_bytes, digest_tree
from posttrain.gate import GateSpec, Primary, decide, save_verdict
from posttrain.registry import Manifest, Registry
from posttrain.tracking.jsonl import JsonlSink

needs_mcp = pytest.mark.skipif(find_spec("mcp") is None, reason="the protocol needs posttrain[mcp]")
SECRET = "hunter2-of-the-server"


def report(model, good):
    items = tuple(ItemRecord(f"q{row}", f"p{row}", (float(row < good),)) for row in range(1000))
    return EvalReport("heldout", "gate", "sha256:suite", model, "exact", items)


@pytest.fixture
def folder(tmp_path):
    """What is served: runs/first with a stage and a verdict, words@1 in the registry; a file beside it that is not served."""
    served = tmp_path / "served"
    model = served / "model"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_text("a" * 100)
    digest, base = digest_tree(model), digest_bytes(b"base")
    spec, reports = GateSpec(primary=(Primary("heldout", 0.05),)), (report(digest, 600), report(base, 500))
    verdict = decide(spec, {"heldout": reports[0]}, {"heldout": reports[1]})
    run = served / "runs" / "first"
    for name, side in zip(("sft", "base"), reports, strict=True):
        side.save(run / "evals" / name / "heldout")
    paths = [{"heldout": run / "evals" / name / "heldout"} for name in ("sft", "base")]
    save_verdict(run / "gates" / "final", verdict, spec, *paths)
    sink = JsonlSink(run / "stages" / "01-sft")
    for step in range(1, 31):
        sink.log(step, {"loss": 3.0 / step, "grad_norm": float("nan") if step == 30 else 1.0})
    sink.event("finding", 30, {"rule": "nonfinite", "message": f"{SECRET} of postgres://me:pw@host/db"})
    sink.close()
    stage = {"kind": "sft", "folder": "stages/01-sft", "status": "done"}
    gates = [{"after": "final", "folder": "gates/final", "verdict": "PASS"}]
    (run / "pipeline.json").write_text(
        json.dumps({"name": "first", "status": "passed", "stages": [stage], "gates": gates})
    )
    book = Registry(served / "registry")
    book.register("words", model, Manifest("sft", {"model": base}, {"model": digest}), verdict)
    book.close()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "pipeline.json").write_text("{}")
    return served


@pytest.fixture
def tools(folder):
    return ReadTools(ServedFolder(folder))


async def ask(client, tool, /, **arguments):
    said = await client.call_tool(tool, arguments)
    return said.is_error, [one.text for one in said.content]


@needs_mcp
def test_an_agent_reads_over_stdio_and_acts_by_command_lines_it_is_shown(folder, model_dir, data_dir):
    import anyio
    from mcp.client import Client
    from mcp.client.stdio import StdioServerParameters, stdio_client

    (folder / "sft.yaml").write_text(
        f"base_model: {model_dir('qwen3')}\ndatasets: [{{path: {data_dir / 'sft.jsonl'}}}]\nmax_steps: 1\nsequence_len: 64\n"
    )
    start = "from posttrain.cli.app import main; main()"
    server = StdioServerParameters(
        command=sys.executable, args=["-c", start, "mcp", "--folder", str(folder), "--allow-run"],
        env={"POSTTRAIN_SERVE_TOKEN": SECRET},
    )  # fmt: skip

    async def talk():
        async with Client(stdio_client(server)) as client:
            listed = {tool.name: tool for tool in (await client.list_tools()).tools}
            answers = {
                "runs": await ask(client, "runs"),
                "metrics": await ask(client, "metrics", run="runs/first", names=["loss", "grad_norm"], last=2),
                "verdicts": await ask(client, "verdicts", run="runs/first"),
                "registry": await ask(client, "registry"),
                "version": await ask(client, "registry", ref="words@1"),
                "plan": await ask(client, "plan", config="sft.yaml", gpus="8xH100"),
                "explain": await ask(client, "explain", key="learning_rate"),
                "outside": await ask(client, "metrics", run="../outside"),
                "typo": await ask(client, "metrics", run="runs/first", nmaes=["loss"]),
                "no tool": await ask(client, "delete", run="runs/first"),
                "promote": await ask(client, "promote", ref="words@1"),
                "refused": await ask(client, "rollback", name="words", reason="wrong answers"),
            }
            return listed, answers

    listed, answers = anyio.run(talk)
    read_only = [name for name, tool in listed.items() if tool.annotations.read_only_hint]
    assert read_only == ["runs", "metrics", "verdicts", "registry", "plan", "explain"]
    assert set(listed) - set(read_only) == {"run", "gate_decide", "promote", "rollback"}
    said = {name: json.loads(texts[0]) for name, (_, texts) in answers.items() if name in (*read_only, "version")}
    (run,) = said["runs"]
    assert (run["run"], run["status"], run["verdicts"][0]["verdict"]) == ("runs/first", "passed", "PASS")
    assert said["metrics"]["rows"] == [
        {"loss": 3.0 / 29, "grad_norm": 1.0, "step": 29},
        {"loss": 0.1, "grad_norm": None, "step": 30},
    ]
    assert said["verdicts"][0]["verdict"]["tests"][0]["suite"] == "heldout"
    assert [one["version"] for one in said["registry"]] == [1] and said["version"]["verdict"]["verdict"] == "PASS"
    assert said["plan"]["stages"][0]["fits"] is True and said["explain"]["key"] == "learning_rate"
    assert SECRET not in str(answers) and "pw@" not in str(answers)
    for name, words in {
        "outside": "leads out of the folder served",
        "typo": "nmaes: unexpected",
        "no tool": "got no tool",
    }.items():
        is_error, (line,) = answers[name]
        assert is_error and line.startswith("error: ") and words in line and "\n" not in line
    is_error, (command, output, ending) = answers["promote"]
    assert (is_error, command) == (
        False,
        "posttrain registry promote --alias=champion --registry=registry -- words@1",
    )
    assert "[champion]" in output and ending == "exit code 0: done, or PASS"
    is_error, (command, output, _) = answers["refused"]
    assert is_error and command.startswith("posttrain registry rollback") and output.startswith("error: ")


@needs_mcp
def test_without_allow_run_no_acting_verb_is_there(folder):
    import anyio
    from mcp.client import Client

    from posttrain.cli.mcp import make_mcp_server

    async def names():
        async with Client(make_mcp_server(ReadTools(ServedFolder(folder)).table, ())) as client:
            listed = [tool.name for tool in (await client.list_tools()).tools]
            return listed, await ask(client, "promote", ref="words@1")

    listed, (is_error, (line,)) = anyio.run(names)
    assert listed == ["runs", "metrics", "verdicts", "registry", "plan", "explain"]
    assert is_error and line.startswith("error: got no tool 'promote'; expected one of runs, metrics")


@pytest.mark.parametrize("path", ["../outside", "/etc", "runs/../../outside", "link", "runs/first/../../link"])
def test_no_path_leads_out_of_the_folder(tools, folder, path):
    (folder / "link").symlink_to(folder.parent / "outside")
    for call in (
        lambda: tools.runs(run=path), lambda: tools.verdicts(run=path), lambda: tools.registry(registry=path),
        lambda: tools.plan(config=path, gpus="8xH100"), lambda: ActTools(tools.place).run(config=path),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="leads out of the folder served"):
            call()


def test_no_link_and_no_record_of_a_run_leads_out_of_the_folder(tools, folder):
    run = folder / "runs" / "first"
    (folder.parent / "outside" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    record = (run / "pipeline.json").read_text()
    (run / "pipeline.json").write_text(record.replace("stages/01-sft", "../../../outside"))
    with pytest.raises(ConfigError, match="leads out"):
        tools.metrics(run="runs/first")
    (run / "pipeline.json").write_text(record)
    (run / "stages" / "01-sft" / "metrics.jsonl").unlink()
    (run / "stages" / "01-sft" / "metrics.jsonl").symlink_to(folder.parent / "outside" / "metrics.jsonl")
    with pytest.raises(ConfigError, match="leads out"):
        tools.metrics(run="runs/first")


@pytest.mark.parametrize(
    "text", ["base_model=/etc", "base_model=../x", "datasets=[{path: /etc/passwd}]", "base_model=~/x", "datasets.1.path=file:///etc/passwd"]
)  # fmt: skip
def test_no_override_names_a_place_outside(folder, text):
    with pytest.raises(ConfigError, match="folder served"):
        ServedFolder(folder).overrides([text])


def test_overrides_of_keys_and_hub_ids_are_taken(folder):
    sets = ["learning_rate=1e-5", "base_model=Qwen/Qwen3-0.6B", "reward_funcs=[rewards.py:fn]"]
    assert ServedFolder(folder).overrides(sets) == sets


def test_a_wrong_name_is_answered_with_the_right_ones(tools):
    with pytest.raises(DataError, match=r"got no metric lss; expected some of grad_norm, loss"):
        tools.metrics(run="runs/first", names=["lss"])
    with pytest.raises(DataError, match=r"got no stage '02-dpo'; expected one of 01-sft"):
        tools.metrics(run="runs/first", stage="02-dpo")


def test_a_run_goes_on_behind_its_call_and_its_error_comes_with_the_next(folder):
    (folder / "run.yaml").write_text("base_model: nowhere\nstages: []\n")
    acts = ActTools(ServedFolder(folder))
    first = acts.run(config="run.yaml", wait_s=0)
    assert (first.command, first.code) == ("posttrain run --on-change=refuse --quiet -- run.yaml", None)
    assert first.ending.startswith("still running")
    then = acts.run(config="run.yaml", wait_s=120)
    assert isinstance(then, Act) and then.is_refused and "run.yaml" in then.output


def test_a_stage_is_started_by_its_own_verb_and_only_shown_where_that_was_asked(folder):
    (folder / "prefer.yaml").write_text("base_model: nowhere\nloss_type: ipo\nbeta: 0.1\ndatasets: [{path: x}]\n")
    shown = ActTools(ServedFolder(folder), only_show=True).run(config="prefer.yaml")
    assert shown == Act("posttrain dpo --on-change=refuse --quiet -- prefer.yaml", None, "")


def test_words_that_look_like_options_stay_arguments(folder):
    said = ActTools(ServedFolder(folder)).promote(ref="--registry=/etc")
    assert said.is_refused and said.command.endswith("-- --registry=/etc") and "--registry=/etc" in said.output


def test_a_folder_that_is_not_there_is_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        main(["mcp", "--folder", str(tmp_path / "nowhere")])
    assert caught.value.code == 64 and "no such folder" in capsys.readouterr().err
