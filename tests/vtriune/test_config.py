"""Configuration: what is read, what is refused, and what the refusal says."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtriune.config import Config, ConfigError, check, load, override, resolve, to_yaml
from vtriune.config.rewards import reward_options

ROOT = Path(__file__).parents[2]


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(ROOT)
    return load("examples/digits.yaml")


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"run\.yaml: unknown key policy\.rolout_batch; did you mean policy\.rollout_batch\?"
    ):
        load(written(tmp_path, "policy: {rolout_batch: 3}"))
    with pytest.raises(ConfigError, match="unknown key polcy; did you mean policy"):
        load(written(tmp_path, "polcy: {}"))
    with pytest.raises(ConfigError, match=r"cluster\.placement\.learners; did you mean cluster\.placement\.learner\?"):
        load(written(tmp_path, "cluster: {placement: {learners: SPREAD}}"))
    with pytest.raises(ConfigError, match=r"cluster\.generators\.prox"):
        load(written(tmp_path, ""), ["cluster.generators.prox=2"])


def test_a_value_of_the_wrong_type_names_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.steps: expected `int \| null`, got `str`"):
        load(written(tmp_path, "run: {steps: many}"))
    with pytest.raises(ConfigError, match=r"policy\.mode: .*'of_policy'"):
        load(written(tmp_path, ""), ["policy.mode=of_policy"])


def test_a_file_that_is_missing_or_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="not YAML"):
        load(written(tmp_path, "a: [1"))
    with pytest.raises(ConfigError, match="not sections"):
        load(written(tmp_path, "- 1"))


def test_a_learning_rate_without_a_dot_is_a_number(tmp_path: Path) -> None:
    assert load(written(tmp_path, "optimizer: {lr: 1e-6}")).optimizer.lr == 1e-6
    assert load(written(tmp_path, ""), ["optimizer.lr=5E-7"]).optimizer.lr == 5e-7


def test_off_means_off(tmp_path: Path) -> None:
    assert load(written(tmp_path, ""), ["tracking.wandb=off"]).tracking.wandb == "off"


@pytest.mark.parametrize("item", ["policy", "policy.mode", "mode=on_policy", "policy.mode.x=1"])
def test_an_override_that_is_no_assignment_is_refused(tmp_path: Path, item: str) -> None:
    with pytest.raises(ConfigError):
        load(written(tmp_path, ""), [item])


def test_the_resolved_file_reproduces_the_configuration(digits: Config, tmp_path: Path) -> None:
    assert load(written(tmp_path, to_yaml(digits))) == digits


@given(st.integers(0, 2**31), st.floats(1e-9, 1.0), st.sampled_from(["on_policy", "off_policy"]))
def test_overrides_survive_the_round_trip(seed: int, rate: float, mode: str) -> None:
    config = override(Config(), [f"run.seed={seed}", f"optimizer.lr={rate}", f"policy.mode={mode}"])
    assert (config.run.seed, config.optimizer.lr, config.policy.mode) == (seed, rate, mode)


RAY = ["cluster.launcher=ray", "cluster.generators.threads=1", "cluster.learner.threads=1"]
REFUSED = [
    (["policy.max_staleness=2"], "on-policy data is never stale"),
    (["policy.mode=off_policy", "policy.update_batch=5"], "not a multiple of update_batch"),
    (["policy.update_batch=8"], "it must equal rollout_batch"),
    (["policy.mode=off_policy", "policy.max_staleness=-1"], "negative"),
    (["policy.group_size=1"], "at least 2 completions"),
    (["run.epochs=1"], "exactly one of steps"),
    (["run.name=a/b"], "no folder name"),
    (["run.steps=0"], "above 0"),
    (["data.train=[]"], "list the Parquet files"),
    (["data.test=[]"], "no held-out file"),
    (["model.path=nowhere"], "is no folder"),
    (["model.path=docs"], "no processor"),
    (["model.freeze=[vit,connector,llm]"], "nothing would be trained"),
    (["sampling.top_p=0.9"], "must be off"),
    (["sampling.temperature=0"], "greedy samples cannot be trained on"),
    (["sampling.max_tokens=4096"], "max_model_len"),
    (["loss.kl=k3"], "set both or neither"),
    (["policy.mode=off_policy", "policy.in_flight=continue", "model.freeze=[]"], "continue keeps image features"),
    (["policy.schedule=[{until: 0.9}, {until: 0.5}]"], "must rise"),
    (["policy.schedule=[{mode: on_policy, max_staleness: 1}]"], "on_policy with max_staleness 1"),
    (["data.min_pixels=99999"], "must lie in"),
    (["cluster.launcher=ray", "cluster.learner.threads=0"], "write how many CPUs each process takes"),
    ([*RAY, "cluster.bind=127.0.0.1"], "other nodes cannot reach it"),
    ([*RAY, "cluster.address=ray://head:10001"], "is not host:port"),
    ([*RAY, "cluster.address=head"], "is not host:port"),
    (["cluster.bind=eth0"], "'eth0' is no address"),
    (["cluster.bind=0.0.0.0"], "IPv4 address of one interface"),
    (["cluster.bind=192.0.2.77"], "no interface of this machine has the address"),
    (["cluster.address=head:6379"], "with launcher local"),
    (["cluster.placement.learner=SPREAD"], "with launcher local"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[" ".join(overrides) for overrides, _ in REFUSED])
def test_impossible_values_and_pairs_are_refused(digits: Config, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(override(digits, overrides))


def test_every_problem_is_reported_at_once(digits: Config) -> None:
    with pytest.raises(ConfigError) as caught:
        check(override(digits, ["policy.group_size=1", "sampling.top_k=5", "run.steps=0"]))
    assert len(str(caught.value).splitlines()) == 3


def test_reward_options_take_every_reward_key_and_freeze_the_threshold_for_evaluation(digits: Config) -> None:
    options = reward_options(digits.rewards)
    assert options.iou_threshold == "dynamic"
    assert options.threshold_at(0.05) == 0.85
    assert reward_options(digits.rewards, is_evaluation=True).threshold_at(0.05) == digits.rewards.evaluation_threshold
    shared = set(msgspec.structs.asdict(options)) & set(msgspec.structs.asdict(digits.rewards))
    assert {"matching", "format", "fold_case", "numeric_tolerance", "report", "frame", "deadline_s"} <= shared


def test_threads_left_to_the_machine_are_all_cores_in_turns_and_shared_when_roles_overlap(digits: Config) -> None:
    def threads(config: Config) -> tuple[int, int]:
        cluster = resolve(config, num_cores=8).cluster
        return cluster.generators.threads, cluster.learner.threads

    assert threads(digits) == (1, 1), "what the file says stays"
    digits = override(digits, ["cluster.generators.threads=0", "cluster.learner.threads=0"])
    assert threads(digits) == (8, 8)
    assert threads(override(digits, ["policy.mode=off_policy"])) == (4, 4)
    assert threads(override(digits, ["policy.mode=off_policy", "cluster.generators.procs=3"])) == (2, 2)
    assert threads(override(digits, ["policy.schedule=[{mode: off_policy, max_staleness: 1}]"])) == (4, 4)
    assert threads(override(digits, ["cluster.learner.threads=3"])) == (8, 3)
    assert threads(override(digits, ["cluster.generators.procs=20"])) == (1, 8)


def test_networks_that_can_be_used_pass(digits: Config) -> None:
    check(override(digits, ["cluster.bind=127.0.0.1"]))
    check(override(digits, [*RAY, "cluster.placement={generators: STRICT_PACK}", "cluster.address=head:6379"]))


def test_on_a_cluster_folders_have_one_path_everywhere_and_threads_stay_as_written(digits: Config) -> None:
    resolved = resolve(override(digits, [*RAY, "data.store=stores"]), num_cores=8)
    assert resolved.run.folder == str(ROOT / "runs")
    assert resolved.model.path == str(ROOT / "examples/digits/model")
    assert resolved.data.store == str(ROOT / "stores")
    assert (resolved.cluster.generators.threads, resolved.cluster.learner.threads) == (1, 1)
    assert resolve(override(digits, RAY)).data.store == ""
