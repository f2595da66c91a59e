"""The configuration tree: one YAML file, frozen structs, overrides, checks. Imports in milliseconds, no torch."""

from vtriune.config.check import check
from vtriune.config.load import ConfigError, load, override, to_yaml
from vtriune.config.resolve import resolve
from vtriune.config.tree import Config

__all__ = ["Config", "ConfigError", "check", "load", "override", "resolve", "to_yaml"]
