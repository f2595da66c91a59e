"""What the product asks to be installed is what it imports."""

import re
import tomllib
from importlib.metadata import packages_distributions

from tests.architecture.test_imports import PRODUCT, ROOT, files, imports

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOADED_BY_OTHERS = {"torchvision"}
"""transformers' image processors import it for us."""


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=~! ]", requirement)[0].lower() for requirement in requirements}


def imported() -> set[str]:
    """Distributions of which some product module imports something, however lazily."""
    modules = {module.split(".")[0] for package in PRODUCT for path in files(package) for module in imports(path)}
    owners = packages_distributions()
    return {owner.lower() for module in modules for owner in owners.get(module, ())}


def test_the_product_imports_everything_it_depends_on() -> None:
    assert names(PROJECT["dependencies"]) - imported() <= LOADED_BY_OTHERS


def test_the_product_imports_nothing_that_only_its_tests_are_given() -> None:
    assert not names(PROJECT["optional-dependencies"]["dev"]) & imported()
