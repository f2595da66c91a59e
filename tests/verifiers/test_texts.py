"""Texts that a file leaves to its tokenizer: what is told from bytes is what the tokenizer decodes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

import bench.english
from verifiers.texts import Decoder


def decoders_of_two_kinds() -> list[Decoder]:
    byte_level = Tokenizer.from_buffer(bench.english.decoder(vocabulary=600).content)
    byte_level.add_special_tokens([AddedToken("<bild €>")])
    words = Tokenizer(models.WordLevel({"ein": 0, "##er": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    return [Decoder(tokenizer.to_str().encode(), [0]) for tokenizer in (byte_level, words)]


@pytest.mark.parametrize("decoder", decoders_of_two_kinds())
@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 1100), max_size=12), other=st.text(max_size=3))
def test_a_text_is_told_by_its_tokens_exactly_when_they_decode_to_it(
    decoder: Decoder, ids: list[int], other: str
) -> None:
    text = decoder.decode(ids)
    assert decoder.tells(np.asarray(ids, np.int32), text)
    assert decoder.tells(np.asarray([*ids, 0, 0], np.int32), text), "end tokens are no part of a text"
    assert decoder.tells(np.asarray(ids, np.int32), text + other) == (other == "")


def test_a_byte_level_text_is_told_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    byte_level, _ = decoders_of_two_kinds()
    ids = list(range(1, 400))
    whole = [token for token in ids if "�" not in byte_level.decode([token])]
    text = byte_level.decode(whole)
    monkeypatch.setattr(Decoder, "decode", None)
    assert byte_level.tells(np.asarray(whole, np.int32), text)
