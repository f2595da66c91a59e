"""Everything that can be checked before an engine starts. `--dry-run` does all of it, a real run the part it needs anyway.

Checked in order: the data files row by row (schema, images, verifiers, gold answers, prompt length), a gold and a wrong answer of
each source through the real verifiers, and one batch through processor and packing.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from vtriune.config.modes import choices
from vtriune.config.sections.data import Files
from vtriune.config.tree import Config
from vtriune.data import survey
from vtriune.data.adapters import OWN
from vtriune.data.build import build_store
from vtriune.data.inputs import data_files
from vtriune.data.loader import weighted_sources
from vtriune.data.processing import Preprocessor
from vtriune.data.schema import DataError
from vtriune.data.store import Store
from vtriune.data.validate import Checks
from vtriune.run.schedule import planned_length


def open_preprocessor(config: Config) -> Preprocessor:
    """The run's one owner of preprocessing; raises DataError for a model folder without a usable processor."""
    data = config.data
    return Preprocessor(config.model.path, data.min_pixels, data.max_pixels, data.max_prompt_tokens)


def open_stores(config: Config, preprocessor: Preprocessor, say: Callable[[str], None]) -> tuple[Store, Store | None]:
    """The training store and, if evaluation is on, the held-out one; built on first use and checked row by row.

    Raises DataError naming file and row of every bad row, unless `data.on_bad_row` is quarantine, and for a mixture of other sources.
    """
    train = _open("data.train", config.data.train, config, preprocessor, say)
    if config.data.mixture.is_on:
        weighted_sources(config.data.mixture, train.index.rows_per_source)
    if not config.evaluation.is_on:
        return train, None
    return train, _open("data.test", config.evaluation.files or config.data.test, config, preprocessor, say)


def rehearse(config: Config) -> Store:
    """`--dry-run`: raises ConfigError or DataError for whatever would stop the run, prints what it would train on and returns it."""
    console = Console()
    preprocessor = open_preprocessor(config)
    train, test = open_stores(config, preprocessor, console.print)
    stores = {"train": train} if test is None else {"train": train, "held out": test}
    for shown in survey.report(stores, config.data.max_prompt_tokens):
        console.print(shown)
    preprocessor.prepare(train.sample(0), prompt_seed=config.run.seed)
    modes = ", then ".join(choice.mode for choice in choices(config.policy))
    console.print(
        f"{planned_length(config, len(train))}; {modes}; configuration, data, model folder and verifiers are fit to run"
    )
    return train


def _open(
    key: str, entries: Sequence[str | Files], config: Config, preprocessor: Preprocessor, say: Callable[[str], None]
) -> Store:
    folder = Path(config.data.store or Path(config.run.folder) / "stores")
    checks = Checks(
        preprocessor=preprocessor,
        options=config.rewards.options,
        prompt_pool=config.data.prompt_pool and key == "data.train",
        memory_bytes=int(config.rewards.memory_gib * 2**30),
        max_source_pixels=config.data.max_source_pixels,
    )
    try:
        store = build_store(data_files(key, entries), folder, checks=checks, on_bad_row=config.data.on_bad_row)
    except OSError as error:
        raise DataError(f"data.store: no store of {key} can be built in {folder}: {error}") from error
    num_bad = store.index.num_quarantined
    note = f", {num_bad} rows quarantined in {store.quarantine_path}" if num_bad else ""
    num_sources = len(store.index.rows_per_source)
    say(f"{key}: {len(store)} rows of {num_sources} source{'s' * (num_sources != 1)}{note}")
    for form, files in store.forms().items():
        if not form.startswith(OWN):
            say(f"{key}: read as {form}: {', '.join(files)}")
    for source, lines in store.index.notes.items():
        for line in lines:
            say(f"{key}: {source}: {line}")
    return store
