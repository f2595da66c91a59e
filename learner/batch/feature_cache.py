"""Image features of a frozen tower on disk, one file per sample, kept between updates and runs. Used by `learner.batch.prompts`.

    <model.feature_cache>/<identity>/<store fingerprint>/<row // 1000>/<row>.safetensors

`identity` hashes everything else that features depend on, so that another model, resolution, type or library version has a folder
of its own and nothing stale is ever read. A file appears under its name only when it is whole and carries a checksum: one that is
damaged (a power cut, a full disk) is computed again. Ranks, and runs at the same time, may share the folder.
"""

import hashlib
import logging
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from learner.model.policy import Policy
from learner.model.sharding import device_of, gathered
from vtriune import whole_files
from vtriune.config.tree import Config
from vtriune.messages import SampleRef

log = logging.getLogger(__name__)

_ROWS_PER_FOLDER = 1000


class FeatureCache:
    """Features (image tokens, D·(1 + deepstack levels)) by sample, below `folder`/`identity`."""

    def __init__(self, folder: str | Path, identity: str):
        self.folder = Path(folder) / identity
        self.num_unwritten = 0

    def get(self, sample: SampleRef) -> Tensor | None:
        """The sample's features on the CPU, or None when they have to be computed."""
        path = self._path(sample)
        try:
            with safe_open(path, framework="pt") as reader:
                features: Tensor = reader.get_tensor("features")
                expected = (reader.metadata() or {}).get("crc32")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            log.warning("%s is computed again: %s", path, error)
            return None
        if expected != _checksum(features):
            log.warning("%s is computed again: its bytes differ from its checksum", path)
            return None
        return features

    def put(self, sample: SampleRef, features: Tensor) -> None:
        """Keep `features`; a copy that another process writes at the same time is the same. Where they cannot be written, as on a full
        disk, they are computed again when they are needed; that is logged once."""
        path = self._path(sample)
        values = features.detach().cpu().contiguous()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_files.replacing(path, is_shared=True, syncs=False) as partial:
                save_file({"features": values}, partial, metadata={"crc32": _checksum(values)})
        except (SafetensorError, OSError) as error:
            if self.num_unwritten == 0:
                log.warning("features cannot be kept in model.feature_cache: %s: %s", path, error)
            self.num_unwritten += 1

    def _path(self, sample: SampleRef) -> Path:
        shelf = self.folder / sample.fingerprint / str(sample.row // _ROWS_PER_FOLDER)
        return shelf / f"{sample.row}.safetensors"


def identity_of(config: Config, policy: Policy) -> str:
    """Hash of all that decides the features' bits: the tower's weights in memory (a resumed run's need not be the folder's), the
    configuration of model and image processor, pixel bounds, type of computation, device, torch, transformers. Collective: sharded
    weights are gathered, one at a time."""
    import transformers

    folder, family, model = Path(config.model.path), policy.family, policy.model
    bounds = (config.data.min_pixels, config.data.max_pixels)
    device = device_of(model).type
    digest = hashlib.sha256(
        f"{config.model.dtype} {bounds} {device} {torch.__version__} {transformers.__version__}\n".encode()
    )
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        path = folder / name
        digest.update(f"{name}\n".encode() + (path.read_bytes() if path.is_file() else b""))
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if family.module_of(name) != "llm":
            whole = gathered(tensor).cpu()
            digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
            digest.update(_bytes(whole))
    return digest.hexdigest()[:32]


def _checksum(tensor: Tensor) -> str:
    return f"{zlib.crc32(_bytes(tensor)):08x}"


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data.cast("B")
