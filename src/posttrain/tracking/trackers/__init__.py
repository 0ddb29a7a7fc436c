"""Who can keep a copy of a run: a row for each name of `report_to`."""

from posttrain.tracking.trackers.table import (
    REPORT_NAME,
    TRACKERS,
    TrackedRun,
    Tracker,
    as_params,
    require_tracker,
    tracked_run,
)

__all__ = ["REPORT_NAME", "TRACKERS", "TrackedRun", "Tracker", "as_params", "require_tracker", "tracked_run"]
