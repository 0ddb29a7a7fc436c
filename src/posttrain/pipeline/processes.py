"""How many processes a run's optimizer steps are counted for, however many it is started on."""

from __future__ import annotations

from posttrain.config.pipeline import PipelineKeys


def counted_for(keys: PipelineKeys, num_processes: int) -> PipelineKeys:
    """Every stage with its `num_processes` as a number: its own, else this one."""
    stages = [
        stage.model_copy(update={"keys": stage.keys.model_copy(update={"num_processes": num_processes})})
        if stage.keys.num_processes is None
        else stage
        for stage in keys.stages
    ]
    return keys.model_copy(update={"stages": stages})


def kept_rows(keys: PipelineKeys, begun_with: int, world_size: int) -> str:
    """What becomes of the global batch of a run that goes on with another number of processes; nothing where it is the same."""
    if begun_with in (0, world_size):
        return ""
    rows = ", ".join(f"{stage.kind} {stage.keys.rows_per_step(world_size)}" for stage in keys.stages)
    return (
        f"begun with {begun_with} process(es), going on with {world_size}: the rows of an optimizer step stay as they were "
        f"({rows}); --on-change new-run begins a run of its own"
    )
