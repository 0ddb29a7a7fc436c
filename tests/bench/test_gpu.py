"""Check and bench of a GPU, rehearsed on a CPU with tiny shapes: every row runs to its end; no time is asserted."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

import gpu_bench
import gpu_check
import gpu_report
import gpu_work as work
import sections
from posttrain.models.batch import pack

CPU = torch.device("cpu")
FACTS = {
    "card": "a card", "packages": "torch 0", "missing": "vllm", "attention": "FA3", "decoding": "pages", "head": "by chunks",
}  # fmt: skip


OTHERS = ("trl", "vllm")
"""Rows that start other programs."""


def _run(bench, monkeypatch, tmp_path, *arguments):
    """`main()` on a CPU; the rows that it left on disk."""
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--out", str(tmp_path), *arguments])
    try:
        bench.main()
    except SystemExit as ended:
        assert ended.code == 0
    [path] = tmp_path.glob("*.jsonl")
    return {row["row"]: row for row in map(json.loads, path.read_text().splitlines()[1:])}


def test_the_check_runs_to_its_end_and_every_row_holds(monkeypatch, tmp_path, capsys):
    rows = _run(gpu_check, monkeypatch, tmp_path)
    assert list(rows) == list(gpu_check.ROWS)
    for name, row in rows.items():
        assert row.get("holds") or (name.startswith("head") and "posttrain[gpu]" in row["left_out"]), row


def test_the_bench_runs_to_its_end_and_every_row_of_our_own_is_measured(monkeypatch, tmp_path, capsys):
    own = [name for name in gpu_bench.ROWS if not name.startswith(OTHERS)]
    rows = _run(gpu_bench, monkeypatch, tmp_path, *(f"--row={name}" for name in own))
    assert list(rows) == own
    assert all(row["tokens_per_s"] > 0 for row in rows.values())
    assert all(rows[name]["ratio"] > 0 for name in own if "rollouts" in name or "grpo training half 0.6" in name)
    printed = capsys.readouterr().out
    assert work.FORMULA in printed and "decoding: the loop of a CPU" in printed and "missing: " in printed


@pytest.mark.slow
@pytest.mark.parametrize("other, module", [("vllm", "vllm"), ("trl", "trl")])
def test_the_bench_runs_to_its_end_beside(other, module, tmp_path):
    pytest.importorskip(module)
    command = [sys.executable, gpu_bench.__file__, "--device=cpu", f"--row={other}", f"--out={tmp_path}"]
    subprocess.run(command, check=True, timeout=900)
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()[1:]]
    assert [row["row"] for row in rows] == [name for name in gpu_bench.ROWS if name.startswith(other)]
    assert all(row["ratio"] > 0 for row in rows)


def test_rows_beside_what_is_not_installed_say_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_bench, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_bench, "installed", lambda: None)
    rows = _run(gpu_bench, monkeypatch, tmp_path, "--row=vllm", "--row=trl sft 0.6 B, documents")
    assert ["pip install" in row["left_out"] for row in rows.values()] == [True, True]


def test_a_check_does_not_hold_where_the_kernel_is_wrong(monkeypatch):
    """A window one token too long."""
    from posttrain.models.tree_attention import Window

    row = gpu_check.ROWS["attention, sliding window, float32"]
    monkeypatch.setattr(Window, "reach", lambda window, position: torch.full_like(position, window.size + 1))
    assert not row(gpu_check.Setting(CPU, True)).holds


def test_a_kernel_that_does_not_run_fails_its_row_and_no_other(monkeypatch, tmp_path, capsys):
    def broken(setting):
        raise RuntimeError("no kernel image is available")

    rows = {"broken": broken, "attention": gpu_check.ROWS["attention, trees, bf16"]}
    monkeypatch.setattr(gpu_check, "ROWS", rows)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == 1
    found = [json.loads(line) for line in (tmp_path / "check.jsonl").read_text().splitlines()[1:]]
    assert found[0]["raised"] == "RuntimeError: no kernel image is available" and found[1]["holds"]


def test_gradients_that_are_no_numbers_do_not_hold(monkeypatch):
    """The output, which is compared first, is right."""

    def lost(value):
        value.register_hook(lambda grad: grad * torch.nan)
        return value

    ours = gpu_check.ragged_attention
    monkeypatch.setattr(
        gpu_check, "ragged_attention",
        lambda module, query, *rest, **options: ours(module, lost(query * 1), *rest, **options),
    )  # fmt: skip
    assert not gpu_check.ROWS["attention, trees, float32"](gpu_check.Setting(CPU, True)).holds


def test_a_loss_that_is_no_number_does_not_hold(monkeypatch):
    def diverging(policy, *_, **__):
        with torch.no_grad():
            for _, parameter in policy.trainable():
                parameter.fill_(torch.nan)

    monkeypatch.setattr(work, "train_step", diverging)
    assert not gpu_check.ROWS["steps lower the loss"](gpu_check.Setting(CPU, True)).holds


@pytest.mark.parametrize("bench", [gpu_bench, gpu_check])
@pytest.mark.parametrize("error", [AssertionError(), KeyError("tokens"), OSError("no compiler\nset CXX")])
def test_whatever_a_row_raises_the_rows_after_it_are_run(bench, error, monkeypatch, tmp_path, capsys):
    def raising(setting):
        raise error

    [last] = [name for name in bench.ROWS if name.startswith(("attention, trees, float32", "head of"))]
    monkeypatch.setattr(bench, "ROWS", {"raising": raising, last: bench.ROWS[last]})
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--out", str(tmp_path)])
    try:
        bench.main()
    except SystemExit as ended:
        assert bench is gpu_check and ended.code == 1
    [path] = tmp_path.glob("*.jsonl")
    first, second = map(json.loads, path.read_text().splitlines()[1:])
    assert type(error).__name__ in first.get("raised", first.get("left_out"))
    assert second["row"] == last and ("seconds" in second or "step_s" in second)


def test_a_side_that_ends_leaves_its_row_out_by_the_reason_that_it_printed(monkeypatch, tmp_path, capsys):
    import vs_trl

    (tmp_path / "side.py").write_text("raise MemoryError('the card is full')")
    monkeypatch.setattr(gpu_bench, "find_spec", lambda name: True)
    monkeypatch.setattr(vs_trl, "job_of", lambda row, options: {})
    monkeypatch.setattr(vs_trl, "HERE", tmp_path)
    for side in ("side_posttrain.py", "side_trl.py"):
        shutil.copy(tmp_path / "side.py", tmp_path / side)
    rows = _run(gpu_bench, monkeypatch, tmp_path / "out", "--row=trl sft 0.6 B, documents", "--row=dpo 0.6")
    found, after = rows.values()
    assert found["left_out"] == "SideError: a side of the comparison ended with status 1: MemoryError: the card is full"
    assert after["tokens_per_s"] > 0


def test_a_row_that_is_asked_for_alone_joins_those_that_the_run_before_it_left(monkeypatch, tmp_path, capsys):
    asked = [name for name in gpu_check.ROWS if name.startswith("attention")][:2]
    _run(gpu_check, monkeypatch, tmp_path, f"--row={asked[0]}")
    with (tmp_path / "check.jsonl").open("a") as file:
        file.write('{"row": "cut off whi')
    assert list(_run(gpu_check, monkeypatch, tmp_path, f"--row={asked[1]}")) == asked
    assert list(_run(gpu_check, monkeypatch, tmp_path, f"--row={asked[0]}")) == [asked[1], asked[0]]
    facts, *lines = (tmp_path / "check.jsonl").read_text().splitlines()
    other = json.dumps(json.loads(facts) | {"card": "another"})
    (tmp_path / "check.jsonl").write_text("\n".join([other, *lines, ""]))
    assert list(_run(gpu_check, monkeypatch, tmp_path, f"--row={asked[0]}")) == [asked[0]]


@pytest.mark.parametrize("bench", [gpu_bench, gpu_check])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--row=stf"], "--row stf: no row begins so; there are:"),
        (["--doc"], "--doc with --device cpu: a rehearsal measures nothing"),
        (["--out=FILE/below"], "no rows can be written there"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line_before_anything_runs(
    bench, arguments, said, monkeypatch, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    arguments = [argument.replace("FILE", str(tmp_path / "file")) for argument in arguments]
    before = sections.DOC.read_text()
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", f"--out={tmp_path}", *arguments])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code and said in str(ended.value.code) + capsys.readouterr().err
    assert sections.DOC.read_text() == before and not list(tmp_path.glob("*.jsonl"))


def test_the_bench_prints_its_formula_and_goes_on_past_a_row_that_cannot_run(monkeypatch, tmp_path, capsys):
    def too_large(setting):
        raise torch.OutOfMemoryError("CUDA out of memory")

    name = "head of 4 B, 8k tokens, with entropy"
    monkeypatch.setattr(gpu_bench, "ROWS", {"too large": too_large, name: gpu_bench.ROWS[name]})
    monkeypatch.setattr(sys, "argv", ["gpu_bench.py", "--device", "cpu", "--out", str(tmp_path)])
    gpu_bench.main()
    assert work.FORMULA in capsys.readouterr().out
    first, second = (json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()[1:])
    assert first["left_out"] == "OutOfMemoryError: CUDA out of memory"
    assert (second["row"], second["tokens_per_s"] > 0) == (name, True)


def test_rows_are_on_disk_as_they_end_and_in_the_document_at_the_end(tmp_path):
    document = shutil.copy(sections.DOC, tmp_path / "performance.md")
    lines = gpu_report.Lines(tmp_path / "bench.jsonl", FACTS)
    lines.add({"row": "sft", "tokens_per_s": 12_345.6, "mfu": 0.41, "peak_gib": 9.87, "ratio": 2.5, "beside": "chunks"})
    assert json.loads((tmp_path / "bench.jsonl").read_text().splitlines()[1])["row"] == "sft"
    lines.add({"row": "trl", "left_out": "not installed"})
    lines.write_doc("gpu bench", gpu_bench.table, document)
    text = (tmp_path / "performance.md").read_text()
    assert "| sft | 12,346 | 41 % |  | 9.9 GiB | **2.50×** | chunks |" in text
    assert "Left out: trl (not installed)." in text
    checked = gpu_report.Lines(tmp_path / "check.jsonl", FACTS)
    checked.add({"row": "head", "error": 0.5, "limit": 0.02, "seconds": 0.0015, "holds": False})
    checked.add({"row": "a kernel", "holds": False, "raised": "RuntimeError: not on this card"})
    checked.write_doc("gpu check", gpu_check._table, document)
    assert "| a kernel | | | **RuntimeError: not on this card** | |" in (tmp_path / "performance.md").read_text()
    assert "| head | 5.0e-01 | 2e-02 | **does not hold** | 1.5 |" in (tmp_path / "performance.md").read_text()


def test_the_arithmetic_of_a_step_by_hand():
    """P = 2 · (2·8·4·(2+1) + 3·8·16) + 10·8 = 1,232. Prompt 3, two answers of 2: T = 7 less 2 that predict nothing,
    A = 6 + 2 · (1 + 3) pairs. 6·P·T + 12·2·2·4·A."""
    shape = work.Shape(hidden=8, intermediate=16, layers=2, heads=2, kv_heads=1, head_dim=4, vocab=10)
    assert shape.weights == 1232
    batch = pack(work.families(10_000, 1, 2, prompt=3, answer=2))
    assert batch.input_ids_N.numel() == 5
    assert work.step_flops(shape, batch) == 6 * 1232 * 5 + 12 * 2 * 2 * 4 * (6 + 2 * 4)
    forward = 2 * 1232 * 5 + 4 * 2 * 2 * 4 * (6 + 2 * 4)
    assert work.step_flops(shape, batch, reference=True) - work.step_flops(shape, batch) == forward
    assert work.step_flops(shape, batch, frozen=True) == 4 * 1232 * 5 + 12 * 2 * 2 * 4 * (6 + 2 * 4)


def test_what_trees_are_compared_with_shares_nothing():
    policy = work.random_policy(work.SHAPES["tiny"], CPU, bf16=False)
    groups = work.families(300, 2, 4, prompt=40, answer=10)
    assert work.packed(groups, policy).input_ids_N.numel() == 2 * (40 + 4 * 9)
    assert work.untreed(groups, policy).input_ids_N.numel() == 8 * 49


def test_a_card_is_found_by_its_name():
    assert work.data_sheet_rate("NVIDIA H100 80GB HBM3") == 989e12
    assert work.data_sheet_rate("NVIDIA H100 PCIe") == 756e12
    assert work.data_sheet_rate("NVIDIA L40S") == 362e12
    assert work.data_sheet_rate("Some other card") is None
