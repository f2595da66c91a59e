"""Turning a call into a method's arguments, its result into an answer, and a coroutine into a running task.

Used by `vtriune.runtime.hosting`.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from vtriune.runtime.actor import Actor, Endpoint
from vtriune.runtime.bootstrap import SpawnRequest
from vtriune.runtime.signature import Signature
from vtriune.transport.codec import pack
from vtriune.transport.errors import MessageRefused
from vtriune.transport.wire import PLAIN_BYTES, Call, Limits, Payload, PeerRef, WireError


def start_now(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, None], context: contextvars.Context, name: str
) -> asyncio.Task[None]:
    """A task, running in `context`, whose first step has run when this returns. Call on the loop's thread, outside any task.

    Python 3.12 has this as `eager_start`. In 3.11 a new task hands its first step to `loop.call_soon`: it is caught
    there and run in place.
    """
    if sys.version_info >= (3, 12):
        return asyncio.Task(coroutine, loop=loop, context=context, name=name, eager_start=True)
    steps: list[Callable[[], None]] = []
    patched: Any = loop
    patched.call_soon = lambda step, *, context: steps.append(step)
    try:
        task = asyncio.Task(coroutine, loop=loop, context=context, name=name)
    finally:
        del patched.call_soon
    context.run(steps[0])
    return task


def unpack(
    signature: Signature, call: Call, frames: Sequence[Any], sender: PeerRef
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call. Raises MessageRefused naming the sender and the field that does not fit."""
    try:
        shape = (call.num_positional, call.names)
        schema = signature.by_shape.get(shape) or signature.arguments(*shape)
        values = schema.unpack(call.args, frames, call.blobs)
    except (WireError, TypeError) as error:
        raise MessageRefused(f"{signature.label}, sent by {sender}: {error}") from None
    if not call.names:
        return values, {}
    split = call.num_positional
    return values[:split], dict(zip(call.names, values[split:], strict=True))


def pack_result(declared: Endpoint[..., Any], value: Any, call: Call, limits: Limits) -> Payload:
    """Encode a result after checking it.

    Raises:
        TypeError: it does not fit the return annotation.
        ValueError: it exceeds what one message may hold.
    """
    if call.oneway:
        return pack(())
    signature = declared.signature
    try:
        payload = signature.result.pack((value,))
        if payload.num_bytes > PLAIN_BYTES or payload.frames:
            limits.check(payload)
        return payload
    except TypeError as error:
        raise TypeError(f"{signature.label} returned what its annotation does not allow: {error}") from None
    except WireError as error:
        raise ValueError(f"{signature.label}: a result of {payload.num_bytes} bytes exceeds a limit: {error}") from None


def endpoints_of(cls: type[Actor]) -> dict[str, Endpoint[..., Any]]:
    """The endpoints of a class by name, as inheritance has them."""
    named = {name: getattr(cls, name, None) for base in cls.__mro__ for name in vars(base)}
    return {name: value for name, value in named.items() if isinstance(value, Endpoint)}


def construct(cls: type[Actor], request: SpawnRequest) -> Actor:
    """Run a constructor on its encoded arguments; raises what it raises, WireError when they do not fit."""
    schema = Signature(cls.__init__).arguments(request.num_positional, request.names)
    values = schema.unpack(request.args, request.frames, request.blobs)
    split = request.num_positional
    return cls(*values[:split], **dict(zip(request.names, values[split:], strict=True)))
