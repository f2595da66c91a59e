"""A model folder for others out of a run: `python -m vtriune.export RUN|CHECKPOINT [--out FOLDER]`.

Every checkpoint holds its model in Hugging Face format (weights, config, processor, tokenizer, generation_config). This command
verifies every byte of the checkpoint against its manifest and copies that folder to where it outlives `checkpoint.keep`. Of a run
it takes the newest complete checkpoint. The folder appears under its name only when it is whole.
"""

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from verifiers import terminal
from vtriune import whole_files
from vtriune.record.checkpoint import MANIFEST, all_steps, latest_complete, problems

MODEL_FOLDER = "hf"
"""Below a checkpoint; the learner writes it."""


class ExportError(ValueError):
    """A folder that holds no model to export, or a place that cannot take it: says which and what to do."""


def find(source: Path) -> Path:
    """The checkpoint that `source` names: itself, or the newest complete one of a run folder. Reads every byte of it.

    Raises ExportError for a damaged checkpoint, a run without a complete one, and any other folder.
    """
    if (source / MANIFEST).exists() or source.parent.name == "checkpoints":
        if not source.is_dir():
            known = ", ".join(path.name for path in all_steps(source.parent)) or "none"
            raise ExportError(f"{source}: no such checkpoint; there are: {known}")
        found = problems(source)
        if found:
            raise ExportError(f"{source} is refused: {'; '.join(found[:5])}; export the checkpoint before it")
        return source
    if not (source / "checkpoints").is_dir():
        raise ExportError(f"{source}: neither a run (no checkpoints/ below it) nor a checkpoint (no {MANIFEST} in it)")
    checkpoint = latest_complete(source / "checkpoints")
    if checkpoint is None:
        raise ExportError(
            f"{source}: no complete checkpoint; the run writes one at its end, on Ctrl-C and every checkpoint.every"
        )
    return checkpoint


def export(source: Path, out: Path | None = None) -> Path:
    """Copy the model of `source` (see `find`) to `out`, by default `<run>/export/step-N`; returns the new folder.

    Raises ExportError, also when the place is taken.
    """
    checkpoint = find(source.resolve())
    model = checkpoint / MODEL_FOLDER
    if not (model / "config.json").is_file():
        raise ExportError(
            f"{checkpoint}: holds no {MODEL_FOLDER}/config.json; it was not written by this project's learner"
        )
    out = (out or checkpoint.parent.parent / "export" / checkpoint.name).resolve()
    if out.exists():
        raise ExportError(f"{out}: exists already; name another folder with --out")
    with whole_files.replacing(out) as partial:
        shutil.copytree(model, partial)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. 0: exported; 2: there is nothing to export, or no place for it."""
    parser = argparse.ArgumentParser(prog="python -m vtriune.export", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="a run's folder, or one of its checkpoints (RUN/checkpoints/step-N)")
    parser.add_argument("--out", type=Path, help="the new folder; default: RUN/export/step-N")
    options = parser.parse_args(arguments)
    # A damaged checkpoint that is passed over is named on the terminal.
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        folder = export(options.source, options.out)
    except (ExportError, OSError) as error:
        print(f"cannot export: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: load it with transformers, or serve it with `vllm serve {folder}`")
    return 0


if __name__ == "__main__":
    terminal.open_output()
    sys.exit(main())
