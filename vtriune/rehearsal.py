"""Everything that can be checked before an engine starts. `--dry-run` does all of it, a real run the part it needs anyway.

Checked in order: the data files row by row (schema, images, verifiers, gold answers, prompt length), a gold and a wrong answer of
each source through the real verifiers, and one batch through processor and packing.
"""

import glob
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vtriune.config.rewards import reward_options
from vtriune.config.tree import Config
from vtriune.data.build import build_store
from vtriune.data.processing import Preprocessor
from vtriune.data.schema import DataError
from vtriune.data.store import Store
from vtriune.data.validate import Checks
from vtriune.schedule import num_versions

log = logging.getLogger(__name__)


def open_preprocessor(config: Config) -> Preprocessor:
    """The run's one owner of preprocessing; raises DataError for a model folder without a usable processor."""
    data = config.data
    return Preprocessor(config.model.path, data.min_pixels, data.max_pixels, data.max_prompt_tokens)


def open_stores(config: Config, preprocessor: Preprocessor, say: Callable[[str], None]) -> tuple[Store, Store | None]:
    """The training store and, if evaluation is on, the held-out one; built on first use and checked row by row.

    Raises DataError naming file and row of every bad row, unless `data.on_bad_row` is quarantine.
    """
    train = _open("data.train", config.data.train, config, preprocessor, say)
    evaluation = config.evaluation
    if not (evaluation.before or evaluation.after or evaluation.every):
        return train, None
    return train, _open("data.test", evaluation.files or config.data.test, config, preprocessor, say)


def rehearse(config: Config) -> None:
    """`--dry-run`: raises ConfigError or DataError for whatever would stop the run, and prints what it would train on."""
    console = Console()
    preprocessor = open_preprocessor(config)
    train, test = open_stores(config, preprocessor, console.print)
    table = Table(
        "source", "verifier", "train rows", "held-out rows", "prompt tokens of one", title="data", title_justify="left"
    )
    for source in train.sources():
        row = next(row for row in range(len(train)) if train.source(row) == source)
        sample = train.sample(row)
        features = preprocessor.features(preprocessor.prepare(sample, prompt_seed=config.run.seed))
        held_out = str(test.rows_per_source().get(source, 0)) if test else "–"
        table.add_row(
            source,
            sample.reward.verifier,
            str(train.rows_per_source()[source]),
            held_out,
            str(len(features.prompt_ids)),
        )
    console.print(table)
    policy = config.policy
    console.print(
        f"{num_versions(config, len(train))} versions of {policy.rollout_batch} groups × {policy.group_size} completions, "
        f"{policy.mode}; configuration, data, model folder and verifiers are fit to run"
    )


def _open(
    key: str, patterns: Sequence[str], config: Config, preprocessor: Preprocessor, say: Callable[[str], None]
) -> Store:
    folder = Path(config.data.store or Path(config.run.folder) / "stores")
    checks = Checks(
        preprocessor=preprocessor,
        options=reward_options(config.rewards),
        prompt_pool=config.data.prompt_pool and key == "data.train",
    )
    store = build_store(_expand(key, patterns), folder, checks=checks, on_bad_row=config.data.on_bad_row)
    note = f", {store.num_quarantined} rows quarantined in {store.quarantine_path}" if store.num_quarantined else ""
    num_sources = len(store.sources())
    say(f"{key}: {len(store)} rows of {num_sources} source{'s' * (num_sources != 1)}{note}")
    return store


def _expand(key: str, patterns: Sequence[str]) -> list[str]:
    """Every pattern's files, sorted; DataError for one that matches nothing."""
    files: list[str] = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern))
        if not found:
            raise DataError(f"{key}: {pattern} matches no file")
        files += found
    return files
