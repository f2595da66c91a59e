"""Response texts that a file leaves out because its token ids tell them. Used by `verifiers.rescore` and by a run's archive.

A row whose text is null has it decoded: all that was sampled, special tokens included, but for the end tokens at its end. The
tokenizer, a Hugging Face `tokenizer.json`, lies beside the file, which names it in its metadata; the name holds a hash of its content.
"""

import contextlib
import hashlib
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from verifiers import columns, whole_files

Ids = TypeVar("Ids", list[int], Sequence[int], np.ndarray)


class FileError(ValueError):
    """The file lacks a column or its tokenizer, or holds a row that is no reward spec; the message names file, column and row."""


class _Note(msgspec.Struct):
    """JSON under `columns.TOKENIZER`."""

    file: str
    end_token_ids: list[int]


class Decoder:
    """Texts of token ids, by one tokenizer.

    content         of a `tokenizer.json`
    end_token_ids   tokens that end a response and are no part of its text
    """

    def __init__(self, content: bytes, end_token_ids: Iterable[int]) -> None:
        self.content = content
        self.end_token_ids = frozenset(end_token_ids)
        self.name = f"tokenizer-{hashlib.sha256(content).hexdigest()[:16]}.json"

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of one response."""
        ids = without_ends(token_ids, self.end_token_ids)
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def tells(self, token_ids: np.ndarray, text: str) -> bool:
        """Whether `decode` gives `text`; of a byte-level tokenizer known much faster, by joining the bytes of its tokens."""
        with contextlib.suppress(IndexError):  # no table, or no such token
            if b"".join(self._bytes[without_ends(token_ids, self.end_token_ids)]) == text.encode():
                return True
        return self.decode(token_ids.tolist()) == text

    def save(self, folder: Path) -> dict[str, str]:
        """Lay the tokenizer into `folder`, unless it is there; returns the metadata of files beside it whose texts it decodes."""
        path = folder / self.name
        if not path.is_file():
            with whole_files.replacing(path) as partial:
                partial.write_bytes(self.content)
        note = _Note(self.name, sorted(self.end_token_ids))
        return {columns.TOKENIZER: msgspec.json.encode(note).decode()}

    @cached_property
    def _tokenizer(self) -> Any:
        # Half a second for a vocabulary of 150k: loaded by the first text that is asked for.
        from tokenizers import Tokenizer

        return Tokenizer.from_buffer(self.content)

    @cached_property
    def _bytes(self) -> np.ndarray:
        """Of each token, objects; empty for a tokenizer whose texts are more than the bytes of their tokens."""
        if (msgspec.json.decode(self.content).get("decoder") or {}).get("type") != "ByteLevel":
            return np.empty(0, object)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        of_token = np.full(1 + max(vocabulary.values()), b"", object)
        for name, token in vocabulary.items():
            of_token[token] = _bytes_of(name)
        return of_token


def _letters() -> dict[str, int]:
    """Letter → byte of byte-level tokenizers (GPT-2's): printable bytes stand for themselves, the others for letters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _letters()


def _bytes_of(name: str) -> bytes:
    """A token of other letters was added as it is read."""
    try:
        return bytes([_BYTE_OF[letter] for letter in name])
    except KeyError:
        return name.encode()


def without_ends(token_ids: Ids, end_token_ids: Collection[int]) -> Ids:
    """All but the end tokens at the end."""
    length = len(token_ids)
    while length and token_ids[length - 1] in end_token_ids:
        length -= 1
    return token_ids[:length]


def decoder_of(path: Path) -> Decoder | None:
    """What decodes the texts that the Parquet file leaves out; None where it leaves none out. FileError when its tokenizer is not
    beside it, or another one."""
    stored = (pq.read_metadata(path).metadata or {}).get(columns.TOKENIZER.encode())
    if stored is None:
        return None
    note = msgspec.json.decode(stored, type=_Note)
    beside = path.parent / Path(note.file).name
    if not beside.is_file():
        raise FileError(f"{path}: its texts are decoded by {note.file}, which must lie beside it; copy it along")
    decoder = Decoder(beside.read_bytes(), note.end_token_ids)
    if decoder.name != note.file:
        raise FileError(f"{beside}: was changed since {path.name} was written; put back the one of its run")
    return decoder


def filled(table: pa.Table, decoder: Decoder | None) -> pa.Table:
    """The table with its texts in place of nulls; its metadata ask for no tokenizer."""
    if decoder is None:
        return table
    pairs = zip(table[columns.RESPONSE].to_pylist(), table[columns.TOKEN_IDS], strict=True)
    texts = [decoder.decode(ids.as_py()) if text is None else text for text, ids in pairs]
    place = table.column_names.index(columns.RESPONSE)
    kept = {key: value for key, value in (table.schema.metadata or {}).items() if key != columns.TOKENIZER.encode()}
    field = table.schema.field(place)
    return table.set_column(place, field, pa.array(texts, pa.string())).replace_schema_metadata(kept)
