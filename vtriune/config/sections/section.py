"""What every section is made of: the base class, and the ranges that several keys share. Imported by the sections alone.

A range is part of a key's type, so msgspec refuses a value outside of it wherever a configuration is decoded: in the file, on
the command line, in a message to another process. Every range has two ends, which refuses nan, the infinities, and whole numbers
that no message can carry.
"""

from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

MOST = 10**9
"""Of anything that is counted: more than any run has, and so are sums and products of a few in 64 bits."""
Count = Annotated[int, Meta(ge=1, le=MOST)]
"""At least one."""
CountOrZero = Annotated[int, Meta(ge=0, le=MOST)]
Share = Annotated[float, Meta(gt=0, le=1)]
ShareOrZero = Annotated[float, Meta(ge=0, le=1)]
Seconds = Annotated[float, Meta(ge=1, le=7 * 24 * 3600)]
"""From one, at which the run looks at its clocks, up to a week."""
Rate = Annotated[float, Meta(gt=0, le=1)]
"""Of learning."""
Weight = Annotated[float, Meta(ge=0, le=100)]
"""Of a term of the loss."""

Text = Annotated[str, Meta(min_length=1)]
"""Not empty. A key that takes the empty text is a `str` and says what that means."""

Mode = Literal["on_policy", "off_policy"]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Frozen; an unknown key is an error that names the nearest known one."""

    def problems(self) -> Iterable[str]:
        """What the keys of this section cannot say together, or on this machine. Asked by `vtriune.config.check`."""
        return ()
