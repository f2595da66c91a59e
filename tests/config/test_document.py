"""The configuration explains itself: on the terminal, in docs/configuration.md, and in both from the sections' own source."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.config.keys import keys
from vtriune import launch
from vtriune.config.document import help_text, markdown, parts

ROOT = Path(__file__).parents[2]


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        launch.main([*arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out + captured.err


def test_docs_configuration_is_what_the_sections_say() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text()
    assert written == markdown(), "run: python -m vtriune.config.document > docs/configuration.md"


def test_every_key_stands_in_the_document_once_with_a_sentence() -> None:
    documented = [key for part in parts() for key in part.keys]
    assert sorted(key.name for key in documented) == sorted(key.name for key in keys())
    for what in (*parts(), *documented):
        assert what.text.endswith("."), f"{what.name}: {what.text!r}"
        assert len(what.text) <= 3 * 136, f"{what.name}: longer than three lines"


def test_a_key_or_section_that_a_text_names_exists() -> None:
    names = {key.name for key in keys()} | {part.name for part in parts()}
    sections = {part.name.split(".")[0] for part in parts()}
    for part in parts():
        for text in (part.text, *(key.text for key in part.keys)):
            named = [name for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", text) if name.split(".")[0] in sections]
            assert set(named) <= names, f"{part.name}: {text}"


def test_help_config_prints_a_section_with_its_ranges_and_defaults_and_needs_no_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, text = shown(capsys, "--help-config", "policy")
    assert code == 0
    assert "  group_size = 8    an integer ≥ 2\n      Completions per prompt." in text
    assert "policy.schedule[]: " in text
    assert "cluster" not in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_help_config_alone_prints_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = shown(capsys, "--help-config")
    assert code == 0
    assert all(f"{part.name}:" in text for part in parts())


def test_help_config_of_one_key_prints_that_key() -> None:
    assert "run.seed" not in help_text("run.steps")
    assert "steps = null" in help_text("run.steps")
    assert "restarts" not in help_text("cluster.placement")


def test_an_unknown_section_names_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = shown(capsys, "--help-config", "polcy")
    assert code == 2
    assert "no section or key polcy; there is policy" in text


def test_help_config_starts_nothing_heavy() -> None:
    probe = (
        "import sys, vtriune.launch\n"
        "try: vtriune.launch.main(['--help-config', 'run'])\n"
        "except SystemExit: print([name for name in ('torch', 'transformers', 'vllm', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
