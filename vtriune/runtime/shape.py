"""Named dimensions of meshes: extents, points, and the values a call brings back, one per rank.

Used by every mesh (hosts, processes, actors) and handed to users by `call`. Elements lie in row-major order of the
extent: the last dimension varies fastest.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Extent(Mapping[str, int]):
    """Dimension names and their sizes, in order."""

    __slots__ = ("labels", "sizes")

    def __init__(self, labels: Sequence[str], sizes: Sequence[int]) -> None:
        """Raise ValueError when names repeat, counts differ or a size is below 1."""
        self.labels = tuple(labels)
        self.sizes = tuple(int(size) for size in sizes)
        if len(self.labels) != len(self.sizes) or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"extent needs one size per distinct label, got labels {self.labels}, sizes {self.sizes}")
        if any(size < 1 for size in self.sizes):
            raise ValueError(f"extent sizes must be at least 1, got {dict(zip(self.labels, self.sizes, strict=True))}")

    @property
    def nelements(self) -> int:
        """Number of elements; 1 without dimensions."""
        return math.prod(self.sizes)

    def __getitem__(self, label: str) -> int:
        if label not in self.labels:
            raise KeyError(f"no dimension {label!r}; this mesh has {list(self.labels)}")
        return self.sizes[self.labels.index(label)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Extent({', '.join(f'{label}={size}' for label, size in self.items())})"


# Of a mesh of one.
_ONE = Extent((), ())


class Point(Mapping[str, int]):
    """One place in an extent: coordinates by name, and `rank`, the row-major index."""

    __slots__ = ("extent", "rank")

    def __init__(self, rank: int, extent: Extent) -> None:
        if not 0 <= rank < extent.nelements:
            raise IndexError(f"rank {rank} is outside {extent}")
        self.rank = rank
        self.extent = extent

    def __getitem__(self, label: str) -> int:
        size, axis = self.extent[label], self.extent.labels.index(label)
        return self.rank // math.prod(self.extent.sizes[axis + 1 :]) % size

    def __iter__(self) -> Iterator[str]:
        return iter(self.extent.labels)

    def __len__(self) -> int:
        return len(self.extent.labels)

    def size(self, label: str) -> int:
        """Size of one dimension of the extent this point lies in."""
        return self.extent[label]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and (self.rank, self.extent) == (other.rank, other.extent)

    def __hash__(self) -> int:
        return hash((self.rank, self.extent.sizes))

    def __repr__(self) -> str:
        place = ", ".join(f"{label}={value}" for label, value in self.items())
        return f"Point(rank={self.rank}{', ' + place if place else ''})"


class Shaped(Generic[T]):
    """Elements laid out over an extent, with the selections every mesh offers."""

    def __init__(self, extent: Extent, elements: Sequence[T]) -> None:
        if len(elements) != extent.nelements:
            raise ValueError(f"{extent} has {extent.nelements} places, got {len(elements)} elements")
        self._extent = extent
        self._elements = tuple(elements)

    def _with_shape(self, extent: Extent, elements: Sequence[T]) -> Self:
        """This mesh over a selection of its elements."""
        mesh = copy.copy(self)
        mesh._extent, mesh._elements = extent, tuple(elements)
        return mesh

    @property
    def extent(self) -> Extent:
        """Names and sizes of the dimensions."""
        return self._extent

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by dimension name."""
        return dict(self._extent)

    def size(self, dim: str | Sequence[str] | None = None) -> int:
        """Number of elements, or the size of one dimension, or the product over several."""
        if dim is None:
            return self._extent.nelements
        return math.prod(self._extent[label] for label in ([dim] if isinstance(dim, str) else dim))

    def __len__(self) -> int:
        return self._extent.nelements

    def __iter__(self) -> Iterator[Any]:
        """Meshes of one, in rank order."""
        for element in self._elements:
            yield self._with_shape(_ONE, [element])

    def slice(self, **selection: int | slice) -> Self:
        """Select along named dimensions: an index removes its dimension, a slice keeps it.

        Raises:
            TypeError: a dimension this mesh does not have.
            IndexError: an index outside its dimension, or a slice that selects nothing.
        """
        picks: list[Sequence[int]] = []
        labels: list[str] = []
        sizes: list[int] = []
        unknown = selection.keys() - set(self._extent.labels)
        if unknown:
            raise TypeError(f"no dimension {sorted(unknown)}; this mesh has {list(self._extent.labels)}")
        for label, size in self._extent.items():
            wanted = selection.get(label, slice(None))
            if isinstance(wanted, slice):
                chosen = range(size)[wanted]
                labels.append(label)
                sizes.append(len(chosen))
                picks.append(chosen)
            elif 0 <= wanted < size:
                picks.append((wanted,))
            else:
                raise IndexError(f"{label}={wanted} is outside 0..{size - 1}")
            if not picks[-1]:
                raise IndexError(f"{label}={wanted} selects nothing of {size}")
        strides = [math.prod(self._extent.sizes[axis + 1 :]) for axis in range(len(self._extent))]
        ranks = [sum(i * s for i, s in zip(place, strides, strict=True)) for place in itertools.product(*picks)]
        return self._with_shape(Extent(labels, sizes), [self._elements[rank] for rank in ranks])

    def flatten(self, name: str) -> Self:
        """The same elements, in the same order, along one dimension called `name`."""
        return self._with_shape(Extent([name], [self._extent.nelements]), self._elements)

    def rename(self, **names: str) -> Self:
        """Rename dimensions: `mesh.rename(procs="gpus")`. Raises KeyError for an unknown one."""
        for label in names:
            self._extent[label]
        labels = [names.get(label, label) for label in self._extent.labels]
        return self._with_shape(Extent(labels, self._extent.sizes), self._elements)

    def split(self, **parts: Sequence[str] | int) -> Self:
        """Split dimensions: `mesh.split(procs=("dp", "tp"), tp=2)` infers dp.

        Raises:
            ValueError: a size that does not divide, or more than one size left to infer.
        """
        given = {label: size for label, size in parts.items() if isinstance(size, int)}
        labels: list[str] = []
        sizes: list[int] = []
        for label, size in self._extent.items():
            names = parts.get(label, (label,))
            if isinstance(names, (int, str)):
                raise ValueError(f"{label} must be split into a sequence of names, got {names!r}")
            known = math.prod(given.get(name, 1) for name in names)
            open_names = [name for name in names if name not in given]
            if len(open_names) > 1 or size % known or (not open_names and known != size):
                raise ValueError(f"cannot split {label}={size} into {tuple(names)} with sizes {given}")
            labels += names
            sizes += [given.get(name, size // known) for name in names]
        return self._with_shape(Extent(labels, sizes), self._elements)


class ValueMesh(Shaped[T]):
    """What `call` brings back: one value per rank, addressed like the mesh that was called."""

    def items(self) -> Iterator[tuple[Point, T]]:
        """Pairs (point, value) in rank order."""
        return ((Point(rank, self._extent), value) for rank, value in enumerate(self._elements))

    def values(self) -> Iterator[T]:
        """Values in rank order."""
        return iter(self._elements)

    def __iter__(self) -> Iterator[tuple[Point, T]]:
        return self.items()

    def item(self, **place: int) -> T:
        """The value at one place: every dimension named. Without dimensions, the only value."""
        chosen = self.slice(**place)
        if len(chosen) != 1:
            raise ValueError(f"item() needs one index for each of {list(self._extent.labels)}, got {place}")
        return chosen._elements[0]

    def rank_value(self, rank: int) -> T:
        """The value of one rank, counted row-major."""
        return self._elements[Point(rank, self._extent).rank]

    get = rank_value

    def map(self, function: Callable[[T], U]) -> ValueMesh[U]:
        """A mesh of `function(value)`."""
        return ValueMesh(self._extent, [function(value) for value in self._elements])

    def to_list(self) -> Any:
        """Nested lists, one level per dimension; the bare value without dimensions."""
        flat: list[Any] = list(self._elements)
        if not self._extent.sizes:
            return flat[0]
        for size in reversed(self._extent.sizes[1:]):
            flat = [flat[start : start + size] for start in range(0, len(flat), size)]
        return flat

    def __repr__(self) -> str:
        return f"ValueMesh({self._extent}, {self.to_list()!r})"
