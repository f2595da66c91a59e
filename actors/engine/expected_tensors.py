"""Which tensors a publish may and must carry, told from the model folder before the first one arrives.

The engine loads by name and passes over a name it does not know, so every manifest is matched here, both ways, while nothing
has been sent yet. Names are compared in the engine's own naming: a checkpoint file and `state_dict()` differ in prefixes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors import safe_open

from vtriune.messages import WeightEntry

NameMap = Callable[[str], str | None]
_MAX_NAMED = 5


class ManifestMismatch(ValueError):
    """The publish does not fit the engine's model; says what is unknown, missing or of another shape."""


class Expectation:
    """The tensors of `folder`'s model, by the engine's names.

    name_of  a checkpoint's name → the engine's, or None for a tensor the engine ignores
    merged   the engine's modules that hold several of a checkpoint's: `{"qkv_proj": ["q_proj", "k_proj", "v_proj"]}`
    Raises FileNotFoundError for a folder without safetensors files.
    """

    def __init__(self, folder: Path, name_of: NameMap, merged: Mapping[str, Iterable[str]]) -> None:
        self._name_of = name_of
        self._merged = {part: whole for whole, parts in merged.items() for part in parts}
        shapes = _shapes_in(folder)
        self._shapes = {mapped: shape for name, shape in shapes.items() if (mapped := name_of(name)) is not None}
        output = name_of("lm_head.weight")
        embedding = next((name for name in self._shapes if name.endswith("embed_tokens.weight")), None)
        if output is not None and embedding is not None:
            self._shapes.setdefault(output, self._shapes[embedding])  # Tied, where the folder has none of its own.
        self._modules: dict[str, set[str]] = {}
        for name in self._shapes:
            self._modules.setdefault(self._module_of(name), set()).add(name)

    def match(self, entries: Iterable[WeightEntry], *, full: bool) -> None:
        """Raises ManifestMismatch unless every entry is known, of the right shape and sent once, no module is sent in part
        and, if `full`, nothing is missing."""
        named = [(self._name_of(entry.name), entry) for entry in entries]
        sent = Counter(name for name, _ in named if name is not None)
        problems = []
        if unknown := [entry.name for name, entry in named if name not in self._shapes]:
            problems.append(f"{len(unknown)} tensors the engine's model does not have: {_some(unknown)}")
        if twice := sorted(name for name, count in sent.items() if count > 1):
            problems.append(f"sent twice: {_some(twice)}")
        differing = [
            f"{entry.name} is {entry.shape}, the engine's {self._shapes[name]}"
            for name, entry in named
            if name in self._shapes and list(entry.shape) != self._shapes[name]
        ]
        if differing:
            problems.append(f"{len(differing)} tensors of another shape: {_some(differing)}")
        required = (
            set(self._shapes) if full else set().union(*(self._modules.get(self._module_of(n), ()) for n in sent))
        )
        if missing := sorted(required - sent.keys()):
            why = "a full publish sends every tensor" if full else "a module is loaded whole or not at all"
            problems.append(f"{len(missing)} tensors missing ({why}): {_some(missing)}")
        if problems:
            raise ManifestMismatch("; ".join(problems))

    def _module_of(self, name: str) -> str:
        """The engine's module that holds a tensor: q, k and v are one."""
        path = name.split(".")[:-1]
        if path and path[-1] in self._merged:
            path[-1] = self._merged[path[-1]]
        return ".".join(path)


def _shapes_in(folder: Path) -> dict[str, list[int]]:
    """Name → shape of every tensor in the folder's safetensors files, read from their headers alone."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no *.safetensors file; the engine's model must come from such a folder")
    shapes: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, framework="numpy") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    return shapes


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMED])
    return shown if len(names) <= _MAX_NAMED else f"{shown}, and {len(names) - _MAX_NAMED} more"
