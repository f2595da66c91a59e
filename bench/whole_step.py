"""A whole GRPO step, generation included, ours and TRL's on the same work: `python -m bench.whole_step [--completions 64,256]`.

The work of a step: N completions of up to 64 tokens, in groups of 8 over prompts with an image, from a random 0.7 M-parameter
Qwen2.5-VL whose rewards are a coin's; one update. Ours is `python -m vtriune.launch`, on-policy and off-policy: vLLM, sockets,
verifiers, publish and archive. TRL 1.16 (extra `peers`) generates by transformers, in one process. They run one after the
other, `--rounds` times over; the figure of a run is the median of its steps after the first ones, that of a system its best run,
since other work on the machine only ever slows one down. A random model ends a few completions early, in ours; TRL is
made to write all 64 tokens: so tokens per second stand beside seconds per step, and the ratio is that of tokens per second.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from bench.machine import describe, heading, write_json
from verifiers import terminal
from vtriune.torchvision_schemas import define_missing_schemas

TOKENS, GROUP, ROWS, UNMEASURED = 64, 8, 512, 3
SYSTEMS = ("on_policy", "off_policy", "trl")


class Step(NamedTuple):
    """The median step of one run."""

    seconds: float
    tokens: float

    @property
    def tokens_per_s(self) -> float:
        """Sampled and trained on."""
        return self.tokens / self.seconds


def write_world(folder: Path) -> None:
    """Model and data below `folder`."""
    define_missing_schemas()
    from bench.tiny_vlm import write_tiny_vlm

    write_tiny_vlm(folder / "model")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(ROWS):
        content = BytesIO()
        Image.fromarray(rng.integers(0, 255, (56, 56, 3), dtype=np.uint8)).save(content, "PNG")
        rows.append(
            {
                "data_source": "noise",
                "images": [{"bytes": content.getvalue(), "path": None}],
                "prompt": [{"role": "user", "content": "<image>count the digits"}],
                "ability": "counting",
                "reward_model": {
                    "answer": "gold",
                    "ground_truth": "gold",
                    "accuracy_ratio": 1.0,
                    "format_ratio": 0.0,
                    "verifier": "python",
                    "verifier_parm": {"function": "bench.coin:coin"},
                },
                "extra_info": {"id": str(number), "image_path": None},
            }
        )
    (folder / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "train_counting_noise_512.parquet")


def configuration(folder: Path, system: str, num_completions: int, steps: int) -> dict[str, Any]:
    """Our side's file."""
    is_off = system == "off_policy"
    return {
        "run": {"name": f"{system}-{num_completions}", "folder": str(folder / "runs"), "steps": steps},
        "cluster": {
            "generators": {"procs": 2, "threads": 1, "max_sequences": 256, "max_model_len": 256, "kv_cache_gib": 0.25},
            # On-policy it has both cores while nobody generates.
            "learner": {"threads": 1 if is_off else 2},
        },
        "model": {"path": str(folder / "model"), "dtype": "float32", "freeze": ["vit", "connector"]},
        "data": {
            "train": [str(folder / "data" / "*.parquet")],
            "store": str(folder / "store"),
            "min_pixels": 784,
            "max_pixels": 50176,
            "max_prompt_tokens": 128,
        },
        "policy": {
            "mode": system,
            "max_staleness": 1 if is_off else 0,
            "rollout_batch": num_completions // GROUP,
            "group_size": GROUP,
            "in_flight": "continue",
        },
        "rewards": {"python": ["bench.coin:coin"]},
        "sampling": {"max_tokens": TOKENS},
        "optimizer": {"lr": 1e-6, "token_budget": 8192},
        "evaluation": {"before": False, "after": False},
        "checkpoint": {"every": 0},
        "tracking": {"wandb": "off", "console": "plain"},
    }


def our_step(folder: Path, system: str, num_completions: int, steps: int) -> Step:
    """One run of ours. Raises RuntimeError with its last lines when it fails."""
    config = configuration(folder, system, num_completions, steps)
    run_folder = folder / "runs" / config["run"]["name"]
    shutil.rmtree(run_folder, ignore_errors=True)
    file = folder / f"{run_folder.name}.yaml"
    file.write_text(json.dumps(config))
    done = subprocess.run([sys.executable, "-m", "vtriune.launch", str(file)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{system} ended with code {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()][UNMEASURED:]
    seconds = statistics.median(line["time/step_s"] for line in lines)
    return Step(seconds, statistics.median(line["tokens/trained"] for line in lines))


def trl_step(folder: Path, num_completions: int, steps: int) -> Step:
    """One run of TRL's trainer in a fresh process, with torch's own number of threads: all cores."""
    from bench.learner_trl import whole_steps

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as peer:
        seconds = peer.submit(whole_steps, folder / "model", num_completions, steps).result()
    return Step(statistics.median(seconds[UNMEASURED:]), float(num_completions * TOKENS))


def compare(folder: Path, num_completions: int, steps: int, rounds: int, systems: Sequence[str]) -> dict[str, Step]:
    """The best run of each system, in turn."""
    best: dict[str, Step] = {}
    for number in range(rounds):
        for system in systems:
            is_peer = system == "trl"
            step = (
                trl_step(folder, num_completions, steps)
                if is_peer
                else our_step(folder, system, num_completions, steps)
            )
            print(
                f"round {number + 1}, {system}: {step.seconds:.2f} s a step, {step.tokens_per_s:,.0f} tokens/s",
                flush=True,
            )
            if system not in best or step.tokens_per_s > best[system].tokens_per_s:
                best[system] = step
    return best


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.whole_step", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--completions", default="64,256", help="of a step; one comparison each")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    head = describe()
    print(heading(head))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_world(folder)
        for size in map(int, options.completions.split(",")):
            best = compare(folder, size, options.steps, options.rounds, options.systems.split(","))
            print(f"\n{size} completions × {TOKENS} tokens: seconds a step, tokens/s, × TRL")
            for system, step in best.items():
                ratio = step.tokens_per_s / best["trl"].tokens_per_s if "trl" in best else float("nan")
                print(f"  {system:<12}{step.seconds:>8.2f}{step.tokens_per_s:>10,.0f}{ratio:>8.2f}")
            results[str(size)] = {system: [*step, step.tokens_per_s] for system, step in best.items()}
    write_json(options.json, head, results)
    return 0


if __name__ == "__main__":
    terminal.open_output()
    sys.exit(main())
