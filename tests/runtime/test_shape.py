"""Named dimensions behave like the axes of a NumPy array."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtriune.runtime import Extent, Point, ValueMesh

sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def mesh_and_array(shape: list[int]) -> tuple[ValueMesh[int], np.ndarray]:
    array = np.arange(int(np.prod(shape))).reshape(shape)
    return ValueMesh(Extent([f"d{i}" for i in range(len(shape))], shape), array.ravel().tolist()), array


@given(shape=sizes, data=st.data())
def test_slice_selects_what_numpy_indexing_selects(shape: list[int], data: st.DataObject) -> None:
    mesh, array = mesh_and_array(shape)
    index: list[int | slice] = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        index.append(data.draw(st.sampled_from([start, slice(start, None), slice(None, None, 2), slice(None)])))
    sliced = mesh.slice(**{f"d{i}": chosen for i, chosen in enumerate(index)})
    assert sliced.to_list() == array[tuple(index)].tolist()
    assert tuple(sliced.sizes.values()) == array[tuple(index)].shape


@given(shape=sizes)
def test_points_are_unravelled_ranks(shape: list[int]) -> None:
    mesh, array = mesh_and_array(shape)
    for point, value in mesh.items():
        place = np.unravel_index(point.rank, shape)
        assert tuple(point.values()) == tuple(int(i) for i in place)
        assert mesh.item(**point) == array[place] == value == mesh.rank_value(point.rank)


@given(shape=sizes)
def test_flatten_and_split_keep_order_and_undo_each_other(shape: list[int]) -> None:
    mesh, _ = mesh_and_array(shape)
    names = list(mesh.extent)
    flat = mesh.flatten("all")
    assert flat.to_list() == list(mesh.values())
    back = flat.split(all=names, **dict(list(mesh.sizes.items())[1:]))
    assert (back.sizes, back.to_list()) == (mesh.sizes, mesh.to_list())


def test_what_cannot_be_selected_says_so() -> None:
    mesh, _ = mesh_and_array([2, 3])
    with pytest.raises(TypeError, match="no dimension"):
        mesh.slice(gpus=0)
    with pytest.raises(IndexError, match=r"d0=2 is outside 0\.\.1"):
        mesh.slice(d0=2)
    with pytest.raises(ValueError, match="one index for each"):
        mesh.item(d0=1)
    with pytest.raises(ValueError, match="cannot split"):
        mesh.split(d1=("a", "b"), a=2)
    with pytest.raises(IndexError, match="outside"):
        Point(6, mesh.extent)
    assert mesh.rename(d0="hosts").sizes == {"hosts": 2, "d1": 3}
    assert mesh.map(lambda value: value * 2).to_list() == [[0, 2, 4], [6, 8, 10]]
