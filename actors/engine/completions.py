"""A group in flight: what has been sampled of each completion so far, and under which version. Used by the loop's thread."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Finish = Literal["stop", "length"]


class Sampled(NamedTuple):
    """What one step added to one completion."""

    request_id: str
    token_ids: list[int]
    logprobs: list[float]
    """One per token"""
    finish: str | None
    """`stop` or `length` at the end; anything else is an engine's own reason and an error."""


@dataclass(slots=True, eq=False)
class Completion:
    """One completion of T tokens so far."""

    index: int
    request_id: str = ""
    """Changes when the request is submitted anew."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    """(version, number of tokens), oldest first; the numbers sum to T."""
    finish: Finish | None = None

    def extend(self, sampled: Sampled, version: int) -> None:
        """Add a step's tokens, sampled under `version`."""
        num_new = len(sampled.token_ids)
        self.token_ids += sampled.token_ids
        self.logprobs += sampled.logprobs
        if self.spans and self.spans[-1][0] == version:
            self.spans[-1] = (version, self.spans[-1][1] + num_new)
        elif num_new:
            self.spans.append((version, num_new))


@dataclass(slots=True, eq=False)
class Ticket:
    """A group's completions, waited for together."""

    template: Any
    """The rendered prompt and sampling parameters, in the core's own form."""
    completions: list[Completion]
    done: "Future[list[Completion]]"
    num_open: int = 0
    is_cancelled: bool = False

    def __post_init__(self) -> None:
        self.num_open = len(self.completions)
