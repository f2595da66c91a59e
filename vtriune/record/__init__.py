"""What a run leaves behind: lines of metrics, archives of trajectories, checkpoints, and what reads them again."""

from vtriune.record.recorded_run import Answer, RecordedRun, open_run

__all__ = ["Answer", "RecordedRun", "open_run"]
