"""COCO's instances, and RefCOCO's phrases for them, as detection and grounding rows.

Boxes are xywh in px there and two corners here. Crowds, which are regions and not objects, are left out, and so are boxes without area;
both are counted, like pictures that are not in their folder.
"""

import io
import pickle
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vtriune.data import pictures
from vtriune.data.box_frames import Corners
from vtriune.data.convert.prompts import DETECT_ALL, DETECT_LABEL, GROUND, Labelled, boxes
from vtriune.data.schema import DataError, Sample


class Picture(msgspec.Struct):
    """One of `images`."""

    id: int
    file_name: str
    width: int
    height: int


class Annotation(msgspec.Struct):
    """One of `annotations`."""

    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: int = 0
    caption: str | None = None
    """A phrase that means this object alone, in files that have one."""


class Category(msgspec.Struct):
    """One of `categories`."""

    id: int
    name: str


class Instances(msgspec.Struct):
    """What is read of an instances file."""

    images: list[Picture]
    annotations: list[Annotation]
    categories: list[Category]


class Coco:
    """An instances file beside its folder of pictures. Raises DataError for a file that is none."""

    def __init__(self, path: Path, folder: Path, frame: str, source: str) -> None:
        try:
            found = msgspec.json.decode(path.read_bytes(), type=Instances)
        except (OSError, msgspec.DecodeError) as error:
            raise DataError(f"{path}: is no COCO instances file ({error})") from error
        self.pictures = {picture.id: picture for picture in found.images}
        self.names = {category.id: category.name for category in found.categories}
        self._folder, self._frame, self._source = folder, frame, source
        self.left_out: Counter[str] = Counter()
        """Reason → how many annotations, pictures or rows."""
        self.annotations = {one.id: one for one in found.annotations if self._is_object(one)}

    def _is_object(self, annotation: Annotation) -> bool:
        reason = (
            "a crowd, which is no object" if annotation.iscrowd
            else "a box without area" if min(annotation.bbox[2:]) <= 0
            else "an annotation of a picture that the file does not list" if annotation.image_id not in self.pictures
            else "an annotation of a category that the file does not list" if annotation.category_id not in self.names
            else None
        )  # fmt: skip
        if reason is not None:
            self.left_out[reason] += 1
        return reason is None

    def per_image(self) -> Iterator[Sample]:
        """A row for each picture with objects: all of them."""
        for number, objects in sorted(self._by_picture().items()):
            names = sorted({self.names[one.category_id] for one in objects})
            question = DETECT_ALL.format(names=", ".join(names), label=names[0])
            yield from self._row(question, objects, f"{number}")

    def per_label(self) -> Iterator[Sample]:
        """A row for each picture and category of its objects."""
        for number, objects in sorted(self._by_picture().items()):
            for category in sorted({one.category_id for one in objects}):
                chosen = [one for one in objects if one.category_id == category]
                yield from self._row(DETECT_LABEL.format(label=self.names[category]), chosen, f"{number}-{category}")

    def per_phrase(self) -> Iterator[Sample]:
        """A row for each object with a phrase."""
        for one in self.annotations.values():
            if one.caption:
                yield from self.grounded(one, one.caption, f"{one.id}")

    def grounded(self, annotation: Annotation, phrase: str, sample_id: str) -> Iterator[Sample]:
        """The row that asks for the object that `phrase` means."""
        phrase = " ".join(phrase.split()).strip(" .")
        yield from self._row(GROUND.format(label=phrase), [annotation], sample_id, label=phrase)

    def _by_picture(self) -> Mapping[int, list[Annotation]]:
        found: defaultdict[int, list[Annotation]] = defaultdict(list)
        for one in self.annotations.values():
            found[one.image_id].append(one)
        return found

    def _row(
        self, question: str, objects: Sequence[Annotation], sample_id: str, label: str | None = None
    ) -> Iterator[Sample]:
        """One row; none, and counted, where the picture is not there or is another than the file says."""
        picture = self.pictures[objects[0].image_id]
        try:
            data = (self._folder / picture.file_name).read_bytes()
            size = pictures.size(data)
        except OSError:
            self.left_out["a row whose picture is not in its folder"] += 1
            return
        except DataError:
            self.left_out["a row whose picture cannot be read"] += 1
            return
        if size != (picture.width, picture.height):
            self.left_out["a row whose picture has another size than the file says"] += 1
            return
        golds: list[Labelled] = [(label or self.names[one.category_id], _corners(one)) for one in objects]
        yield boxes(question, golds, data, size, self._frame, self._source, sample_id)


def _corners(annotation: Annotation) -> Corners:
    x, y, width, height = annotation.bbox
    return (x, y, x + width, y + height)


def phrases(path: Path, coco: Coco, split: str) -> Iterator[Sample]:
    """RefCOCO's `refs(…).p` over its instances: a row for each sentence of a split (train, val, testA, testB, test)."""
    for ref in _refs(path):
        if ref.get("split") != split:
            continue
        annotation = coco.annotations.get(ref.get("ann_id", -1))
        if annotation is None:
            coco.left_out["a phrase for an object that is left out"] += 1
            continue
        for sentence in ref.get("sentences") or []:
            yield from coco.grounded(
                annotation, str(sentence.get("sent", "")), f"{ref.get('ref_id')}-{sentence.get('sent_id')}"
            )


def _refs(path: Path) -> list[dict[str, Any]]:
    try:
        found = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: is no file of RefCOCO's phrases ({error})") from error
    if not isinstance(found, list) or not all(isinstance(ref, dict) for ref in found):
        raise DataError(
            f"{path}: is no file of RefCOCO's phrases: it holds a {type(found).__name__}, not a list of references"
        )
    return found


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, numbers and texts. A pickle may name any function to be called; each is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only plain values are read")
