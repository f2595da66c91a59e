"""Cost of an actor call: ours, the peers' and the bare ZeroMQ floor, in turn, in one run.

    python -m bench.messaging [--peers ray,monarch] [--json FILE] [--rounds 3]
    python -m bench.messaging --soak [--calls 100000] [--chaos-rounds 200] [--frames 1000000]

Each round runs every system once, each in a process of its own; the table shows medians over rounds. Machines are
noisy: read the ratios to the floor and to the peers of the same run, not the figures of different runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from verifiers import terminal

CALLS = 1000
PIPELINED = 5000
REPEATS = 3
PAYLOADS = (4 << 10, 64 << 10, 256 << 10, 4 << 20, 64 << 20)
PAYLOAD_BYTES = 256 << 20
FAN_OUT = 32
Figures = dict[str, float]


def percentiles_us(run: Callable[[int], Any], count: int) -> Figures:
    """Median and 99th percentile of one call, in microseconds."""
    times = []
    for i in range(count):
        start = time.perf_counter()
        run(i)
        times.append((time.perf_counter() - start) * 1e6)
    cuts = statistics.quantiles(times, n=100)
    return {"sequential_p50_us": cuts[49], "sequential_p99_us": cuts[98]}


def per_second(run: Callable[[], Any], count: int) -> float:
    """How many per second when `run` does `count`: the median of a few runs, each of which may be some 100 ms short."""
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        rates.append(count / (time.perf_counter() - start))
    return statistics.median(rates)


def num_payloads(size: int) -> int:
    """How many messages of a size to send: bounded in bytes and in number."""
    return max(4, min(CALLS, PAYLOAD_BYTES // size))


def payload_figures(send_all: Callable[[bytes, int], Any], kind: str = "payload") -> Figures:
    """Throughput in GB/s by payload size. `in_place`: the receiver reads the frame that arrived; `payload`: bytes of its own."""
    figures = {}
    for size in PAYLOADS:
        data, count = os.urandom(size), num_payloads(size)
        send_all(data, 2)
        rate = per_second(lambda data=data, count=count: send_all(data, count), count)  # type: ignore[misc]
        figures[f"{kind}_{size >> 10}KiB_GB_per_s"] = rate * size / 1e9
    return figures


def ours() -> Figures:
    """`vtriune.runtime`."""
    from bench.messaging_actors import Echo
    from vtriune.runtime import this_host

    procs = this_host().spawn_procs(name="bench")
    echo = procs.spawn("echo", Echo)
    echo.ping.call_one(0).get()
    figures = percentiles_us(lambda i: echo.ping.call_one(i).get(), CALLS)
    figures["pipelined_calls_per_s"] = per_second(
        lambda: [f.get() for f in [echo.ping.call_one(i) for i in range(PIPELINED)]], PIPELINED
    )
    figures |= payload_figures(lambda data, count: [f.get() for f in [echo.sink.call_one(data) for _ in range(count)]])
    figures |= payload_figures(
        lambda data, count: [f.get() for f in [echo.look.call_one(memoryview(data)) for _ in range(count)]], "in_place"
    )
    procs.stop().get()
    return figures


def fan_out() -> Figures:
    """Calls to 32 ranks at once."""
    from bench.messaging_actors import Echo
    from vtriune.runtime import this_host

    procs = this_host().spawn_procs(per_host={"procs": FAN_OUT}, name="fan")
    echo = procs.spawn("echo", Echo)
    echo.ping.call(0).get()
    figures = percentiles_us(lambda i: echo.ping.call(i).get(), 300)
    procs.stop().get()
    return {
        "fan_out_32_p50_ms": figures["sequential_p50_us"] / 1e3,
        "fan_out_32_p99_ms": figures["sequential_p99_us"] / 1e3,
    }


def ray() -> Figures:
    """Ray's actors."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)

    @ray.remote
    class Echo:
        def ping(self, x: int) -> int:
            return x

        def sink(self, data: bytes) -> int:
            return len(data)

    echo: Any = Echo.remote()
    ray.get(echo.ping.remote(0))
    figures = percentiles_us(lambda i: ray.get(echo.ping.remote(i)), CALLS)
    figures["pipelined_calls_per_s"] = per_second(
        lambda: ray.get([echo.ping.remote(i) for i in range(PIPELINED)]), PIPELINED
    )
    figures |= payload_figures(lambda data, count: ray.get([echo.sink.remote(data) for _ in range(count)]))
    ray.shutdown()
    return figures


def monarch() -> Figures:
    """torchmonarch's actors."""
    from monarch.actor import Actor, endpoint, this_host

    class Echo(Actor):
        @endpoint
        async def ping(self, x: int) -> int:
            return x

        @endpoint
        async def sink(self, data: bytes) -> int:
            return len(data)

    echo = this_host().spawn_procs(per_host={"procs": 1}).spawn("echo", Echo).slice(procs=0)
    echo.ping.call_one(0).get()
    figures = percentiles_us(lambda i: echo.ping.call_one(i).get(), CALLS)
    figures["pipelined_calls_per_s"] = per_second(
        lambda: [f.get() for f in [echo.ping.call_one(i) for i in range(PIPELINED)]], PIPELINED
    )
    figures |= payload_figures(lambda data, count: [f.get() for f in [echo.sink.call_one(data) for _ in range(count)]])
    return figures


def floor() -> Figures:
    """A bare ROUTER and DEALER with msgspec: what the transport itself costs."""
    import multiprocessing

    import msgspec
    import zmq

    encode, decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder().decode
    folder = tempfile.TemporaryDirectory()
    address = f"ipc://{folder.name}/socket"

    def serve() -> None:
        socket = zmq.Context().socket(zmq.ROUTER)
        socket.set_hwm(0)
        socket.bind(address)
        while True:
            who, body, *rest = socket.recv_multipart(copy=False)
            call, value = decode(body.buffer)
            socket.send_multipart([who, encode([call, len(rest[0].buffer) if rest else value])])

    server = multiprocessing.get_context("fork").Process(target=serve, daemon=True)
    server.start()
    socket = zmq.Context().socket(zmq.DEALER)
    socket.set_hwm(0)
    socket.connect(address)

    def call(i: int) -> Any:
        socket.send(encode([i, i]))
        return decode(socket.recv())

    def pipelined(count: int, *frames: bytes) -> None:
        for i in range(count):
            socket.send_multipart([encode([i, i]), *frames], copy=False)
        for _ in range(count):
            socket.recv()

    call(0)
    figures = percentiles_us(call, CALLS)
    figures["pipelined_calls_per_s"] = per_second(lambda: pipelined(PIPELINED), PIPELINED)
    # Nobody makes bytes of what arrives: the server looks at the frame.
    figures |= payload_figures(lambda data, count: pipelined(count, data), "in_place")
    figures |= {key.replace("in_place", "payload"): rate for key, rate in figures.items() if "in_place" in key}
    server.terminate()
    server.join()
    socket.close(linger=0)
    folder.cleanup()
    return figures


SYSTEMS: dict[str, Callable[[], Figures]] = {
    "floor": floor,
    "ours": ours,
    "fan_out": fan_out,
    "ray": ray,
    "monarch": monarch,
}


def run_one(system: str) -> Figures:
    """Measure one system in a fresh process."""
    process = subprocess.run(
        [sys.executable, "-m", "bench.messaging", "--only", system], capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise RuntimeError(f"{system} ended with code {process.returncode}:\n{process.stderr[-4000:]}")
    figures: Figures = json.loads(process.stdout.strip().splitlines()[-1])
    return figures


def compare(peers: list[str], rounds: int) -> dict[str, Figures]:
    """Medians by system over `rounds`, every system once per round."""
    seen: dict[str, list[Figures]] = {}
    for _ in range(rounds):
        for system in ["floor", "ours", "fan_out", *peers]:
            seen.setdefault(system, []).append(run_one(system))
    return {
        system: {key: statistics.median(each[key] for each in figures) for key in figures[0]}
        for system, figures in seen.items()
    }


def table(results: dict[str, Figures]) -> str:
    """Figures side by side, and the ratios that matter."""
    systems = [system for system in results if system != "fan_out"]
    lines = [f"{'':28}" + "".join(f"{system:>12}" for system in systems)]
    for key in results["ours"]:
        lines.append(f"{key:28}" + "".join(f"{results[system].get(key, float('nan')):12.2f}" for system in systems))
    lines += [f"{key:28}{value:12.2f}" for key, value in results["fan_out"].items()]
    lines.append("ratios (ours against):")
    mine = results["ours"]
    for system in systems:
        if system != "ours":
            other = results[system]
            lines.append(
                f"  {system}: sequential {mine['sequential_p50_us'] / other['sequential_p50_us']:.2f} x the time, "
                f"pipelined {mine['pipelined_calls_per_s'] / other['pipelined_calls_per_s']:.2f} x the calls, "
                f"256 KiB {mine['payload_256KiB_GB_per_s'] / other['payload_256KiB_GB_per_s']:.2f} x the bytes, "
                f"in place {mine['in_place_256KiB_GB_per_s'] / other['payload_256KiB_GB_per_s']:.2f} x"
            )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="", help="comma-separated: ray, monarch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--soak", action="store_true", help="long runs: memory, chaos, garbage frames")
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--chaos-rounds", type=int, default=200)
    parser.add_argument("--frames", type=int, default=1_000_000)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(SYSTEMS[arguments.only]()))
        return
    if arguments.soak:
        from tests.runtime import soak

        results: Any = soak.run(arguments.calls, arguments.chaos_rounds, arguments.frames)
        print(json.dumps(results, indent=2))
    else:
        results = compare([peer for peer in arguments.peers.split(",") if peer], arguments.rounds)
        print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    terminal.open_output()
    main()
