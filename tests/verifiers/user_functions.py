"""Reward functions as a user would write them, sound and unsound: the python verifier runs them in the pool's workers."""

import ctypes
import os
import signal
import subprocess
import time


def share_of_words(response: str, gold: str) -> tuple[float, dict[str, float]]:
    words = gold.split()
    return sum(word in response.split() for word in words) / len(words), {"num_words": float(len(words))}


def misbehave(response: str, gold: str) -> float:
    """Does what the response names; every other response is right."""
    if response == "raise":
        raise RuntimeError("raised on purpose")
    if response == "exit":
        os._exit(7)
    if response == "signal":
        os.kill(os.getpid(), signal.SIGSEGV)
    if response == "sleep":
        time.sleep(3600)
    if response == "spin in C":
        ctypes.CDLL(None).pause()
    if response == "ignore signals":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            pass
    if response == "eat memory":
        hoard = []
        while True:
            hoard.append(bytearray(64 * 1024 * 1024))
    if response == "fill the disk":
        with open("/dev/stderr", "w") as stderr:
            while True:
                stderr.write("x" * 1_000_000)
    if response == "fork":
        for _ in range(3):
            if os.fork() == 0:
                time.sleep(3600)
        time.sleep(3600)
    if response == "fork and leave" and os.fork() == 0:
        os.setsid()
        time.sleep(3600)
    if response == "fork and answer twice":
        os.fork()
    if response == "terminate what is run":
        child = subprocess.Popen(["sleep", "60"])
        child.terminate()
        return float(child.wait() == -signal.SIGTERM)
    if response == "terminate what is forked":
        if (pid := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
        os.kill(pid, signal.SIGTERM)
        return float(os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM)
    if response == "not a number":
        return float("nan")
    if response == "a word":
        return "right"  # type: ignore[return-value]
    return 1.0


def misbehave_on_gold(response: str, gold: str) -> float:
    """The same for what the gold answer names."""
    return misbehave(gold, gold)
