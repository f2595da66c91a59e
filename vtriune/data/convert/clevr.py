"""CLEVR's questions as rows: numbers are counted, all other answers are words that math-verify compares."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec

from vtriune.data.convert.prompts import words
from vtriune.data.schema import DataError, Sample


class _Question(msgspec.Struct):
    image_filename: str
    question: str
    answer: str | int | bool | None = None
    question_index: int = -1
    split: str = ""


class _Questions(msgspec.Struct):
    questions: list[_Question]


class Clevr:
    """A questions file beside its folder of pictures. Raises DataError for a file that is none."""

    def __init__(self, path: Path, folder: Path, source: str) -> None:
        try:
            self._questions = msgspec.json.decode(path.read_bytes(), type=_Questions).questions
        except (OSError, msgspec.DecodeError) as error:
            raise DataError(f"{path}: is no CLEVR questions file ({error})") from error
        self._folder, self._source = folder, source
        self.left_out: Counter[str] = Counter()
        """Reason → how many rows."""

    def rows(self) -> Iterator[Sample]:
        """A row for each question with an answer; the test split has none."""
        for number, one in enumerate(self._questions):
            if one.answer is None:
                self.left_out["a question without an answer"] += 1
                continue
            try:
                picture = self._picture(one)
            except OSError:
                self.left_out["a question whose picture is not in its folder"] += 1
                continue
            answer = {True: "yes", False: "no"}[one.answer] if isinstance(one.answer, bool) else str(one.answer)
            is_number = answer.isdecimal()
            verifier, ability = ("counting", "counting") if is_number else ("mathverify", "puzzle")
            index = number if one.question_index < 0 else one.question_index
            gold = answer if is_number else f"\\boxed{{{answer}}}"
            yield words(one.question, gold, verifier, picture, self._source, ability, f"{index}")

    def _picture(self, question: _Question) -> bytes:
        """In the folder itself, or in that of its split, as the archive has it."""
        below = self._folder / question.split / question.image_filename
        return (below if below.is_file() else self._folder / question.image_filename).read_bytes()
