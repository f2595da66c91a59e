"""The learner's optimisation step, measured in turn in one run against the padded batch and TRL: `python -m bench.learner`.

Sections (all by default; name some to run only them):
  digits   the shipped model on prompts and answers of the digits workload
  long     a 1,000-token prompt with 8 answers of 200 tokens
  trl      64 completions × 64 tokens, on the very batches that TRL's GRPOTrainer generated for itself (extra `peers`)
  memory   peak of the log-prob step: 152k vocabulary, 8k tokens
  checkpoint  how long training stands still for one, written at once and beside training
  shapes   random weights in the layer shapes of Qwen2.5-VL-3B or -7B (`--layers` of them); meant for a GPU

Each contender runs once per round, in turn, so that a machine's noise meets all of them; medians are quoted.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.learner_steps import OurStep, PaddedStep, Workload, workload
from bench.machine import describe, heading, write_json
from verifiers import terminal
from vtriune.torchvision_schemas import define_missing_schemas

SECTIONS = ("digits", "long", "trl", "memory", "checkpoint")
DIGITS = Path("examples/digits/model")
VOCAB, TOKENS, WIDTH = 152_064, 8192, 64
SHAPES = {
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 2},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4},
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.learner", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join((*SECTIONS, 'shapes'))}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--token-budget", type=int, default=4096, help="rows of a micro-batch, for both sides")
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--groups", type=int, default=32, help="groups of 8 in the digits section")
    parser.add_argument("--naive", action="store_true", help="also time features per completion with full logits")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    options = parser.parse_args(arguments)
    unknown = set(options.sections) - {*SECTIONS, "shapes"}
    if unknown:
        parser.error(f"unknown section {sorted(unknown)}; sections: {', '.join((*SECTIONS, 'shapes'))}")
    torch.set_num_threads(options.threads)
    define_missing_schemas()
    head, result = describe(), {}
    print(heading(head))
    ceiling = matmul_ceiling(torch.device(options.device))
    print(f"matmul ceiling {ceiling / 1e9:.0f} GFLOP/s, {options.threads} threads, {options.device}")
    result["matmul_gflops"] = ceiling / 1e9
    for section in options.sections or SECTIONS:
        result[section] = RUNNERS[section](options, ceiling)
    write_json(options.json, head, result)
    return 0


def digits(options: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    """Prompts of 32 to 62 text tokens with 16 image tokens, answers of 10 to 30 tokens, groups of 8."""
    return _against_padded(
        "digits workload", DIGITS, options, ceiling,
        num_groups=options.groups, group_size=8, text=(32, 62), response=(10, 30), grid=(8, 8),
    )  # fmt: skip


def long(options: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    """A prompt of 1,000 tokens on random weights, 512 wide: narrower models are all attention at this length."""
    text = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 8192,
    }
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder), text, num_layers=4)
        return _against_padded(
            "1,000-token prompt, 8 × 200-token answers", Path(folder), options, ceiling,
            num_groups=1, group_size=8, text=(982, 982), response=(200, 200), grid=(8, 8),
        )  # fmt: skip


def shapes(options: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    """Random weights; a few layers of the real width."""
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder), {**SHAPES[options.shape], "vocab_size": 151_936}, num_layers=options.layers)
        return _against_padded(
            f"Qwen2.5-VL-{options.shape.upper()} shapes, {options.layers} layers", Path(folder), options, ceiling,
            num_groups=2, group_size=8, text=(700, 742), response=(100, 300), grid=(32, 32),
        )  # fmt: skip


def trl(options: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    """See `bench.learner_trl`."""
    from bench.learner_trl import compare

    return compare(options.rounds, options.token_budget)


def checkpoint(options: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    """See `bench.learner_checkpoint`."""
    from bench.learner_checkpoint import compare

    return compare(options.rounds, write_random)


def memory(options: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    """Peak resident memory beyond the inputs, in a process of its own. The full logits are not tried: they are only counted."""
    full = VOCAB * TOKENS * 4
    program = f"from bench.learner import measure_logprobs; print(measure_logprobs({options.threads}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    peak = float(done.stdout.split()[-1])
    print(
        f"\nlog-prob step, {VOCAB} vocabulary × {TOKENS} tokens, width {WIDTH}: full logits are {full / 2**30:.2f} GiB"
    )
    print(
        f"  forward and backward: peak {peak / 2**30:.3f} GiB = 1/{full / peak:.1f} of full logits, weight gradient included"
    )
    return {"full_logits_bytes": full, "peak_bytes": peak, "share": peak / full}


def measure_logprobs(num_threads: int) -> float:
    """Bytes by which forward and backward of the log-prob step raise this process's peak."""
    from learner.model.logprobs import score_tokens

    torch.set_num_threads(num_threads)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, requires_grad=True)
    targets = torch.randint(VOCAB, (TOKENS,))
    # The first small call loads kernels and thread buffers, which do not belong to the step.
    score_tokens(hidden[:8], weight[:64], targets[:8] % 64).logprobs.sum().backward()
    hidden.grad = weight.grad = None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scores = score_tokens(hidden, weight, targets)
    (scores.logprobs.sum() + scores.entropy.sum()).backward()
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


RUNNERS: dict[str, Callable[[argparse.Namespace, float], dict[str, Any]]] = {
    "digits": digits, "long": long, "trl": trl, "memory": memory, "checkpoint": checkpoint, "shapes": shapes,
}  # fmt: skip


def _against_padded(
    title: str, folder: Path, options: argparse.Namespace, ceiling: float, **sizes: Any
) -> dict[str, Any]:
    device = torch.device(options.device)
    ours = OurStep(folder, device, token_budget=options.token_budget)
    padded = PaddedStep(folder, device, token_budget=options.token_budget)
    contenders: dict[str, Callable[[Workload], dict[str, float]]] = {
        "shared prefix": ours,
        "padded batch": padded,
    }
    if options.naive:
        contenders["padded, naive"] = PaddedStep(folder, device, token_budget=options.token_budget, naive=True)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    cpu_s: dict[str, list[float]] = {name: [] for name in contenders}
    rows: dict[str, float] = {}
    for round_ in range(options.rounds + 1):
        work = workload(ours.policy.model, seed=round_, **sizes)
        for name, step in contenders.items():
            measured = step(work)
            rows[name] = measured.get("rows", measured.get("packing/rows", rows.get("padded batch", 0.0)))
            if round_:  # The first round warms kernels and allocators up.
                seconds[name].append(measured["seconds"])
                cpu_s[name].append(measured["cpu_s"])
    print(f"\n{title}: {work.num_completions} completions, {work.num_tokens} response tokens")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    cpu = {name: statistics.median(values) for name, values in cpu_s.items()}
    for name, median in medians.items():
        used = model_flops(ours.policy.model, rows[name], work.num_tokens) / median / ceiling
        print(
            f"  {name:<14} {median:7.3f} s {median / medians['shared prefix']:5.2f} ×  CPU time {cpu[name]:7.3f} s "
            f"{cpu[name] / cpu['shared prefix']:5.2f} ×  {work.num_tokens / median:7.0f} response tokens/s "
            f"{rows[name]:7.0f} rows  MFU {used:4.0%}"
        )
    ratios = {
        "speedup": medians["padded batch"] / medians["shared prefix"],
        "cpu_speedup": cpu["padded batch"] / cpu["shared prefix"],
    }
    return {"seconds": seconds, "cpu_s": cpu_s, "rows": rows, **ratios}


def model_flops(model: Any, num_rows: float, num_targets: int) -> float:
    """Forward and backward of the decoder's matrices on every row and of the output layer on every target; attention left out."""
    layers = sum(p.numel() for p in model.model.language_model.layers.parameters() if p.ndim == 2)
    head = model.get_output_embeddings().weight.numel()
    return 6.0 * (layers * num_rows + head * num_targets)


def matmul_ceiling(device: torch.device, size: int = 1536) -> float:
    """FLOP/s of a large square matrix product, the best of five."""
    left, right = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        (left @ right).sum().item()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def write_random(folder: Path, text: dict[str, int], num_layers: int) -> None:
    """A random Qwen2.5-VL of `num_layers` decoder layers of the given sizes and two vision blocks."""
    import transformers

    section = text["hidden_size"] // text["num_attention_heads"] // 8
    rope = {"rope_type": "default", "mrope_section": [section, section * 3 // 2, section * 3 // 2], "rope_theta": 1e6}
    decoder = {**text, "num_hidden_layers": num_layers, "max_position_embeddings": 32768, "rope_parameters": rope}
    width = 128 if text["hidden_size"] < 1024 else 1280
    vision = {
        "depth": 2, "hidden_size": width, "intermediate_size": 2 * width, "num_heads": width // 32,
        "out_hidden_size": text["hidden_size"], "fullatt_block_indexes": [1],
    }  # fmt: skip
    ids = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4}
    config = transformers.Qwen2_5_VLConfig(text_config=decoder, vision_config=vision, tie_word_embeddings=False, **ids)
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)


if __name__ == "__main__":
    terminal.open_output()
    sys.exit(main())
