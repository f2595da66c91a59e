"""Which room may import which: the arrows of docs/architecture.md. An import counts wherever it stands: at the top, inside a function,
for types only; `from room import module` is an import of the module, and a module's parent rooms are not imported by that.
"""

import pytest

from tests.architecture.test_imports import import_graph

KERNEL = {"vtriune.messages", "vtriune.whole_files", "vtriune.torchvision_schemas"}
DATA = {"vtriune.config", "vtriune.data", "vtriune.runtime", "vtriune.transport", *KERNEL}
RECORD = {*DATA, "vtriune.record"}
WORK = {*RECORD, "vtriune.weights", "vtriune.roles"}
RUN = {*WORK, "vtriune.run", "vtriune.run.hosts", "vtriune.run.orders"}
MAY_IMPORT: dict[str, set[str]] = {
    "verifiers": set(),
    "vtriune.transport": set(),
    "vtriune.runtime": {"vtriune.transport"},
    "vtriune.runtime.processes": {"vtriune.runtime", "vtriune.transport"},
    "vtriune.runtime.__main__": {"vtriune.runtime.processes"},
    "vtriune.config": {"vtriune.whole_files"},
    "vtriune.messages": set(),
    "vtriune.whole_files": set(),
    "vtriune.torchvision_schemas": set(),
    "vtriune.roles": {"vtriune.runtime", "vtriune.messages"},
    "vtriune.data": DATA,
    "vtriune.record": RECORD,
    "vtriune.weights": {"vtriune.messages"},
    "vtriune.plan": RUN,
    "vtriune.curate": {*RECORD, "actors"},
    "vtriune.run": RUN,
    "vtriune.run.hosts": {*RUN, "vtriune.runtime.processes"},
    "vtriune.run.orders": RUN,
    "vtriune.launch": {*RUN, "actors", "learner", "vtriune.control"},
    "vtriune.control": RUN,
    "vtriune.export": RUN,
    "vtriune": set(),
    "actors": WORK,
    "learner.model": WORK,
    "learner.batch": {*WORK, "learner.model"},
    "learner": {*WORK, "learner.batch", "learner.model"},
    "learner.replay": {*WORK, "learner", "vtriune.run.orders"},
}


FACADE = "vtriune.runtime"
"""Its `__init__` alone hands on what is public of every room below it."""


def room_of(module: str) -> str:
    """The longest name of `MAY_IMPORT` that the module stands in."""
    return max((room for room in MAY_IMPORT if f"{module}.".startswith(f"{room}.")), key=len)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_those_it_may(room: str) -> None:
    graph = import_graph()
    members = [module for module in graph if room_of(module) == room and module != FACADE]
    assert members
    allowed = {*MAY_IMPORT[room], room, "verifiers"}
    wrong = {
        module: left for module in members if (left := {name for name in graph[module] if room_of(name) not in allowed})
    }
    assert not wrong
