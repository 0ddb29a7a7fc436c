"""A run that is started again on another number of processes goes on with the rows per step that it was begun with."""

import pytest

RESUMED = [
    pytest.param("sft", 2, 1, id="sft 2 to 1"),
    pytest.param("sft", 1, 2, id="sft 1 to 2", marks=pytest.mark.slow),
    pytest.param("sft", 2, 4, id="sft 2 to 4", marks=pytest.mark.slow),
    pytest.param("dpo", 2, 1, id="dpo 2 to 1", marks=pytest.mark.slow),
    pytest.param("dpo", 1, 2, id="dpo 1 to 2", marks=pytest.mark.slow),
    pytest.param("dpo", 2, 4, id="dpo 2 to 4", marks=pytest.mark.slow),
    pytest.param("grpo", 2, 1, id="grpo 2 to 1", marks=pytest.mark.slow),
    pytest.param("grpo", 1, 2, id="grpo 1 to 2", marks=pytest.mark.slow),
    pytest.param("grpo", 2, 4, id="grpo 2 to 4", marks=pytest.mark.slow),
]


def same_run(runner, one, two):
    mine, theirs = runner.rows(one), runner.rows(two)
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a == pytest.approx(b, abs=1e-5, rel=1e-4), a["step"]
    expected, found = runner.weights(one), runner.weights(two)
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < 2e-5, name


@pytest.mark.parametrize(("kind", "before", "after"), RESUMED)
def test_a_run_keeps_its_rows_per_step_on_other_ranks(
    kind, before, after, write_yaml, torchrun, killed, runner, tmp_path
):
    resumed, stage = write_yaml(kind), tmp_path / f"run/stages/01-{kind}"
    killed(before, stage, 2, kind, resumed)
    again = torchrun(after, kind, resumed)
    said = f"begun with {before} process(es), going on with {after}: the rows of an optimizer step stay as they were"
    assert again.stderr.count(said) == 1
    straight = write_yaml(kind, name="straight.yaml", output_dir=str(tmp_path / "straight"), num_processes=before)
    torchrun(1, kind, straight)
    same_run(runner, tmp_path / f"straight/stages/01-{kind}", stage)


@pytest.mark.slow
def test_another_global_batch_is_refused_by_the_command_with_both(write_yaml, killed, refused, tmp_path):
    path, stage = write_yaml("sft"), tmp_path / "run/stages/01-sft"
    killed(2, stage, 2, "sft", path)
    done = refused(1, "sft", path, "--set", "num_processes=1", "-q")
    assert done.returncode == 64
    assert "num_processes: 2 → 1" in done.stderr, done.stderr
    assert not (stage / "result.json").exists()


def test_a_checkpoint_of_another_global_batch_is_refused_with_both(runner, model_dir, data_dir, tmp_path):
    """Without a pipeline around it nobody remembers how many processes there were but the checkpoint."""

    def run(**options):
        keys = runner.keys_of("sft", model_dir("llama"), data_dir, per_device_train_batch_size=2, **options)
        return runner.run_stage("sft", tmp_path, keys)

    keys = runner.keys_of("sft", model_dir("llama"), data_dir, per_device_train_batch_size=2, num_processes=2)
    assert runner.run_stage("sft", tmp_path, keys, stop_after=2) is None
    with pytest.raises(OSError, match=r"4 rows per optimizer step, on 1 process\(es\); this start makes it 2, on 1"):
        run()
    assert run(gradient_accumulation_steps=2).steps == 4
