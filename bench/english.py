"""English as a model would write it, for benchmarks of what is stored and sent: real text, real tokens, plausible log-probs.

The text is Python's own reference manual, 0.7 MB of prose that every installation carries; the tokenizer a byte-level BPE like Qwen's,
trained on it or given. Log-probs are drawn: three fifths of the tokens nearly certain, a fifth of a nat a token, in full float32
precision, which compresses worse than a real sampler's (as differences of logits those have empty low bits).
"""

from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from verifiers.texts import Decoder

END = "<|im_end|>"
TEXTS: tuple[str, ...] = tuple(topics.values())


def decoder(path: Path | None = None, vocabulary: int = 16_000) -> Decoder:
    """Of the tokenizer at `path`, else of one trained on the text; its first end token is END."""
    if path is not None:
        tokenizer = Tokenizer.from_file(str(path))
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(TEXTS, trainer)
    return Decoder(tokenizer.to_str().encode(), [tokenizer.token_to_id(END)])


class English:
    """Pieces of the text, one after the other; it begins anew when it is used up."""

    def __init__(self, decoder: Decoder, texts: Sequence[str] = TEXTS, seed: int = 0) -> None:
        (self._end,) = decoder.end_token_ids
        encoded = Tokenizer.from_buffer(decoder.content).encode_batch(list(texts), add_special_tokens=False)
        self._ids = np.concatenate([np.asarray(item.ids, np.int32) for item in encoded])
        self.num_tokens = len(self._ids)
        """Before it repeats itself."""
        self._start = 0
        self._rng = np.random.default_rng(seed)

    def ids(self, num_tokens: int) -> np.ndarray:
        """int32 (num_tokens,), the last one the end token."""
        places = np.arange(self._start, self._start + num_tokens) % len(self._ids)
        self._start += num_tokens - 1
        ids: np.ndarray = self._ids[places]
        ids[-1] = self._end
        return ids

    def logprobs(self, num_tokens: int) -> np.ndarray:
        """float32 (num_tokens,)"""
        rng = self._rng
        certain = -(10 ** rng.uniform(-6, -1.5, num_tokens))
        drawn: np.ndarray = np.where(rng.random(num_tokens) < 0.6, certain, np.log(rng.beta(2, 1, num_tokens)))
        return drawn.astype(np.float32)
