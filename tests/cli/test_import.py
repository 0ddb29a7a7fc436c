import subprocess
import sys

from posttrain.cli.app import _run

CONFIG = """\
base_model: ./base
datasets: [{path: mlabonne/FineTome-100k, type: chat_template, field_messages: conversations, message_property_mappings: {role: from, content: value}}]
micro_batch_size: 1
gradient_accumulation_steps: 1
num_epochs: 1
sequence_len: 512
learning_rate: 2e-5
"""


def test_import_writes_a_yaml_that_plan_takes_and_exits_0(tmp_path, capsys, model_dir):
    file = tmp_path / "axolotl.yaml"
    file.write_text(CONFIG.replace("./base", str(model_dir("qwen3"))))
    assert _run(["import", str(file)]) == 0
    out = tmp_path / "axolotl.posttrain.yaml"
    assert f"wrote {out}; next: posttrain plan" in capsys.readouterr().out
    assert _run(["plan", str(out)]) in (0, 1)
    assert "sft  trains" in capsys.readouterr().out


def test_import_refuses_with_exit_code_64_and_writes_nothing(tmp_path, capsys):
    file = tmp_path / "axolotl.yaml"
    file.write_text(CONFIG + "reward_model: true\n")
    assert _run(["import", str(file), "-o", str(tmp_path / "out.yaml")]) == 64
    assert "datasets.1.type: chat_template" in capsys.readouterr().err
    assert not (tmp_path / "out.yaml").exists()


def test_importing_loads_no_torch():
    code = "import sys, posttrain.config.importers.convert, posttrain.cli.import_; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )
