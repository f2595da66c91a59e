"""Tells of lost groups and ringing alarms, a line each on the terminal and in the log, and stops the run where an alarm's action says
so. Held by the controller."""

from collections.abc import Callable, Iterable, Mapping

from vtriune import roles
from vtriune.config.tree import Config
from vtriune.data.store import Store
from vtriune.messages import Example, SampleHeader, SampleRef
from vtriune.record.alarms import NUM_LOST, Alarm, AlarmTable
from vtriune.run.groups import Groups


class AlarmBell:
    """The alarms of one run. `say` is the terminal, and the log; `stop` ends the run after the version in hand."""

    def __init__(
        self,
        config: Config,
        store: Store,
        groups: Groups,
        recorder: roles.Recorder,
        say: Callable[[str], None],
        stop: Callable[[], None],
    ) -> None:
        self.stopped_by: Alarm | None = None
        """The alarm that ended the run."""
        self._table = AlarmTable(config.alarms)
        self._window = config.alarms.lost_share.window
        self._store = store
        self._groups = groups
        self._recorder = recorder
        self._say = say
        self._stop = stop

    async def recorded(self, line: Mapping[str, float]) -> None:
        """A version's line is written."""
        for alarm in self._table.take(line):
            example = await self._recorder.example.call_one(alarm.example) if alarm.example else None
            self._ring(alarm, _shown(example) if example else None)

    def lost(self, sample: SampleRef, reason: str) -> None:
        """A group of `sample` is lost for good."""
        shown = f"{_named(self._store.header(sample.row))}: {reason}"
        self._say(f"group lost · {shown}")
        for alarm in self._table.take(self._num_lost()):
            self._ring(alarm, shown)

    def recall(self, lines: Iterable[Mapping[str, float]]) -> None:
        """The lines of the versions before a resume, of which a person was told; the groups are restored already."""
        self._table.recall([*lines, self._num_lost()])

    def _num_lost(self) -> dict[str, float]:
        return {NUM_LOST: float(self._groups.num_lost_among(self._window))}

    def _ring(self, alarm: Alarm, example: str | None) -> None:
        for_example = f"; for example {example}" if example else ""
        self._say(f"alarm {alarm.name} ({alarm.action}) · {alarm.text}{for_example}")
        if alarm.action == "stop" and self.stopped_by is None:
            self.stopped_by = alarm
            self._stop()


def _named(header: SampleHeader) -> str:
    return f"{header.source}, row {header.file_row} of {header.file} ({header.sample_id})"


def _shown(example: Example) -> str:
    return f"{_named(example.header)}: {example.response!r}"
