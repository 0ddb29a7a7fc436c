"""`train_sampling_strategy: sequential`: rows as the files have them, however they are packed, and where a run goes on."""

import json

import pytest

from posttrain.config.stages import SFTKeys
from posttrain.data.load import load_sft
from posttrain.distributed.ranks import SingleProcess
from posttrain.models.load import load_tokenizer
from posttrain.recipes.batches import Schedule, flat
from posttrain.recipes.streamed import StreamedSchedule


def keys_for(model_dir, tmp_path, **options):
    for file, numbers in (("a", range(7)), ("b", range(7, 12))):
        rows = [
            {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "x" * (1 + n % 4)}]}
            for n in numbers
        ]
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "base_model": str(model_dir("qwen3")), "datasets": [{"path": str(tmp_path / f"{name}.jsonl")} for name in "ab"],
        "train_sampling_strategy": "sequential", "per_device_train_batch_size": 2, "max_steps": 9, **options,
    }  # fmt: skip
    return SFTKeys.model_validate(values)


def origins(schedule, steps):
    return [[row.origin for row in flat(schedule.step(number))] for number in steps]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_come_as_the_files_have_them_each_epoch(packing, streaming, model_dir, tmp_path):
    sized = {"packing": True, "sequence_len": 48} if packing else {}
    keys = keys_for(model_dir, tmp_path, streaming=streaming, buffer_size=5, **sized)
    tokenizer, ranks = load_tokenizer(keys), SingleProcess()

    def schedule():
        if streaming:
            return StreamedSchedule(keys, tokenizer, ranks)
        return Schedule.of(load_sft(keys, tokenizer), keys, ranks, size=lambda row: len(row.ids))

    steps = origins(schedule(), range(9))
    seen = [origin for step in steps for origin in step]
    files = [(name, number) for name, count in (("a.jsonl", 7), ("b.jsonl", 5)) for number in range(1, count + 1)]
    found = [(str(origin).split("/")[-1].split(":")[0], int(str(origin).split(":")[-1])) for origin in seen]
    assert len(found) >= 14 and found == (files * 4)[: len(found)]
    if not streaming:
        assert origins(schedule(), range(4, 9)) == steps[4:], "a run that goes on takes the rows that were next"


def test_a_weighted_source_runs_on_over_the_epochs(model_dir, tmp_path):
    keys = keys_for(model_dir, tmp_path)
    sources = [keys.datasets[0].model_copy(update={"weight": 1.0}), keys.datasets[1].model_copy(update={"weight": 3.0})]
    data = load_sft(keys.model_copy(update={"datasets": sources}), load_tokenizer(keys))
    assert data.order(0, 0, sequential=True) == [0, 1, 2, *range(7, 12), *range(7, 11)]
    assert data.order(0, 1, sequential=True) == [3, 4, 5, 11, *range(7, 12), *range(7, 10)]
