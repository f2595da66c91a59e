"""What may change in a configuration when a run goes on from a checkpoint: one rule for every key. Pure; asked by `vtriune.run.folder`.

What a checkpoint holds was made under the configuration of an earlier start. A key is free where everything restored goes on rightly
under its new value, and refused where something would be wrong in silence. The rules are part of docs/configuration.md.
"""

import json
import os.path
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import yaml

from vtriune.config.load import to_yaml
from vtriune.config.tree import Config


class Rule(NamedTuple):
    """Whether a key, or all keys below it that have no rule of their own, may change, and what comes of it or why not."""

    is_free: bool
    text: str


_MOMENTS = (
    "the moments in the checkpoint, what is published and the reference's image features follow from it; to train other modules begin "
    "a new run (another run.name) whose model.path is what `python -m vtriune.export` makes of this one"
)

RULES: Mapping[str, Rule] = {
    "run.name": Rule(True, "names the folder in which an earlier run is looked for"),
    "run.folder": Rule(True, "as run.name"),
    "run.seed": Rule(
        False,
        "the order of samples follows from it; write the one it began with, or begin a new run (another run.name)",
    ),
    "run.steps": Rule(
        True, "progress goes on from where it stood linearly to 1; not once optimizer.decay has let the rate fall to 0"
    ),
    "run.epochs": Rule(True, "as run.steps"),
    "cluster": Rule(True, "where processes run and what they may use: the speed"),
    "model.path": Rule(
        False,
        "tokenizer, image processor and the reference of loss.kl are its; name the folder the run began with (a link to it will do), "
        "or begin a new run (another run.name)",
    ),
    "model.freeze": Rule(False, _MOMENTS),
    "model.dtype": Rule(True, "parameters and moments of a checkpoint are float32 either way"),
    "model.attention": Rule(True, "how the same numbers are computed"),
    "model.activation_checkpointing": Rule(True, "how the same numbers are computed"),
    "model.compile": Rule(True, "how the same numbers are computed"),
    "model.offload": Rule(True, "where the same numbers are kept"),
    "model.feature_cache": Rule(True, "where the same numbers are kept"),
    "data.train": Rule(
        True, "as long as it gives the same rows in the same order, wherever the files lie; else the run is refused"
    ),
    "data.on_bad_row": Rule(True, "as data.train"),
    "data.test": Rule(True, "figures of evaluations before and after do not compare"),
    "data.mixture": Rule(
        True, "from the next period of draws on; a run that began without weights, or with, goes on so"
    ),
    "data.draw": Rule(True, "from the next draw on; what was not known before is learnt from then on"),
    "data.solve_rate": Rule(True, "from the next draw on"),
    "data.store": Rule(True, "a place"),
    "data.min_pixels": Rule(True, "for groups generated from then on, restored ones included"),
    "data.max_pixels": Rule(True, "as data.min_pixels"),
    "data.max_source_pixels": Rule(True, "as data.train"),
    "data.max_prompt_tokens": Rule(True, "as data.train"),
    "data.prompt_pool": Rule(True, "as data.min_pixels"),
    "policy": Rule(
        True, "for groups generated and batches trained on from then on; restored groups are generated anew"
    ),
    "policy.mode": Rule(
        True, "groups admitted before keep their bound; overrules a live switch that the checkpoint remembers"
    ),
    "policy.max_staleness": Rule(True, "as policy.mode"),
    "policy.schedule": Rule(True, "as policy.mode"),
    "policy.rollout_batch": Rule(
        True, "restored groups that could not be trained on within their bound wait for a slot, before new ones"
    ),
    "sampling": Rule(True, "for groups generated from then on, restored ones included"),
    "loss": Rule(
        True, "the objective from then on; the reference of loss.kl is the model of model.path, as from the beginning"
    ),
    "optimizer": Rule(True, "from the next update on; Adam's moments go on"),
    "rewards": Rule(True, "for groups scored from then on; rewards before and after do not compare"),
    "evaluation": Rule(True, "figures of evaluations before and after may not compare"),
    "record": Rule(True, "for what is archived from then on; a replay ends at the first version without log-probs"),
    "checkpoint": Rule(True, "from the next checkpoint on"),
    "tracking": Rule(True, "what is shown, and where"),
    "alarms": Rule(True, "the versions before count as if it had been so from the beginning"),
}
"""By key or section; the longest one that fits holds. `run`, `model` and `data` have none of their own: a key there needs its own."""

_AS_ONE: Mapping[str, Callable[[Any], Any]] = {"model.path": os.path.realpath, "model.freeze": sorted}
"""Different ways to write the same value."""


class Change(NamedTuple):
    """One key whose value differs from that of an earlier start."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        values = (json.dumps(value, ensure_ascii=False) for value in (self.before, self.after))
        return f"{self.key}: {' → '.join(values)}"

    @property
    def refusal(self) -> str | None:
        """Why a run does not go on with it, and what to do; None when it may."""
        rule = rule_of(self.key)
        return None if rule.is_free else f"{self}: {rule.text}"


def changes_between(before: Mapping[str, Any], after: Config) -> list[Change]:
    """Every key of `after` that says something else than the configuration `before`, as a file holds it.

    What that one lacks had its default; a key of it that there is no longer is passed over.
    """
    old, new = _leaves(_as_written(Config())) | _leaves(before), _leaves(_as_written(after))
    changes = (Change(key, old[key], value) for key, value in new.items() if old[key] != value)
    return [change for change in changes if not _is_one(change)]


def rule_of(key: str) -> Rule:
    """The rule for a key of the tree; KeyError for one that has none, which `tests/config/test_changes.py` finds first."""
    name = key
    while name not in RULES:
        name = name.rpartition(".")[0]
        if not name:
            raise KeyError(f"{key}: say in vtriune/config/changes.py whether it may change at a resume")
    return RULES[name]


def _as_written(config: Config) -> dict[str, Any]:
    """The values as a configuration file gives them back."""
    tree: dict[str, Any] = yaml.safe_load(to_yaml(config))
    return tree


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Key with dots → value; a list is one value."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _is_one(change: Change) -> bool:
    write = _AS_ONE.get(change.key)
    return write is not None and bool(write(change.before) == write(change.after))
