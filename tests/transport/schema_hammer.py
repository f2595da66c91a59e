"""Builds and uses schemas of the same classes in many threads at once. Run by tests as a process of its own, since
msgspec, left to itself, ends it with SIGSEGV in the first round."""

from __future__ import annotations

import sys
import threading
from types import ModuleType

from vtriune.transport.codec import Schema, pack

NUM_ROUNDS, NUM_THREADS, NUM_FIELDS = 10, 8, 20
SOURCE = f"""
from __future__ import annotations
import msgspec

class Leaf(msgspec.Struct):
{"".join(f"    f{i}: dict[str, list[int | None]]" + chr(10) for i in range(NUM_FIELDS))}

class Tree(msgspec.Struct):
    leaf: Leaf
    more: list[Leaf]
"""


def one_round(number: int) -> int:
    """How many threads read the tree they were given. A module of its own, for msgspec describes a class once."""
    module = ModuleType(f"round_{number}")
    sys.modules[module.__name__] = module
    exec(SOURCE, module.__dict__)
    leaf = module.Leaf(**{f"f{i}": {"a": [i, None]} for i in range(NUM_FIELDS)})
    tree = module.Tree(leaf, [leaf] * 3)
    payload = pack((tree,))
    barrier = threading.Barrier(NUM_THREADS)
    read: list[bool] = []

    def work() -> None:
        barrier.wait()
        read.append(Schema(("tree",), (module.Tree,)).unpack(payload.body, (), ()) == (tree,))

    threads = [threading.Thread(target=work) for _ in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(read)


if __name__ == "__main__":
    sys.setswitchinterval(1e-6)
    print(sum(one_round(number) for number in range(NUM_ROUNDS)), "trees read")
