"""The control plane's costs: what is measured is real, and held against the plan."""

from pathlib import Path

import pytest

from bench.control_plane import Stage, controller_stage, flow_stages, table
from bench.pipeline import archive_bytes_per_token, decoder_in, flow, write_model


async def test_every_group_passes_every_stage_and_the_archive_takes_six_bytes_a_token(tmp_path: Path) -> None:
    write_model(tmp_path / "model", None)
    measured = await flow(tmp_path, num_groups=6, num_tokens=256)
    assert measured.num_groups == 6
    stages = {stage.name: stage for stage in flow_stages(measured)}
    assert len(stages) == 6
    assert all(stage.us_per_group > 0 for stage in stages.values())
    assert stages["learner's inbox, a rank"].bytes_per_group == 8 * 8 * 256, "8 bytes a token: no text"
    assert stages["recorder: line, archive"].bytes_per_group < stages["recorder: take in, journal"].bytes_per_group
    decoder = decoder_in(tmp_path / "model")
    assert archive_bytes_per_token(tmp_path, decoder, keeps_logprobs=True) <= 6
    assert archive_bytes_per_token(tmp_path, decoder, keeps_logprobs=False) <= 2.5


@pytest.mark.parametrize("num_generators", [4, 8])
def test_the_controllers_stage_is_a_run_of_the_real_controller(num_generators: int) -> None:
    stage = controller_stage(num_generators, num_versions=1)
    assert stage.num_generators == num_generators
    assert 0 < stage.us_per_group < 1e5
    assert 100 < stage.bytes_per_group < 2000, "ids and counts: no tokens"


def test_the_table_says_what_saturates_first_and_by_how_much() -> None:
    stages = [Stage("fast", None, 100.0, 1.0), Stage("slow", 64, 1000.0, 2.0)]
    assert "first to saturate a core: slow at 64 generators, at 20.0 × the plan's 50.0 groups/s" in table(stages, 50.0)
