"""What a stage's folder says of its run before the first step."""

from posttrain.files import read_json, write_json
from posttrain.recipes.run.run_folder import RunFolder


def test_an_opened_folder_says_how_many_steps_there_will_be_beside_its_data(tmp_path):
    write_json(tmp_path / "summary.json", {"datasets": [1]})
    for rank_zero, total in ((True, 40), (False, 90)):
        run = RunFolder(tmp_path, "grpo", rank_zero)
        run.open(0, total)
        run.close()
    assert read_json(tmp_path / "summary.json") == {"datasets": [1], "total_steps": 40}
