"""The actors `bench.messaging` and its soak spawn, ours and Monarch's alike."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import time

import psutil

from vtriune.runtime import Actor, endpoint


class Echo(Actor):
    """Answers as fast as it can."""

    @endpoint
    async def ping(self, x: int) -> int:
        return x

    @endpoint
    async def sink(self, data: bytes) -> int:
        return len(data)

    @endpoint
    async def look(self, data: memoryview) -> int:
        return data.nbytes

    @endpoint
    async def nap(self, seconds: float) -> int:
        await asyncio.sleep(seconds)
        return os.getpid()

    @endpoint
    def block(self, seconds: float) -> int:
        time.sleep(seconds)
        return os.getpid()

    @endpoint
    async def rss_bytes(self) -> int:
        """Resident memory, less what the allocator keeps free: its high-water mark is no growth."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return int(psutil.Process().memory_info().rss)
