"""Configuration: what is read, what is refused, and what the refusal says."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtriune.config import Config, ConfigError, check, load, override, resolve, to_yaml
from vtriune.config.sections.data import Files

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


def test_a_section_that_nothing_reads_is_refused_as_unknown(tmp_path: Path) -> None:
    assert "sandbox" not in Config.__struct_fields__
    with pytest.raises(ConfigError, match=r"run\.yaml: unknown key sandbox; known here: run, cluster"):
        load(written(tmp_path, "sandbox: {max_mismatch: 0.1}"))
    with pytest.raises(
        ConfigError, match=r"run\.yaml: unknown key alarms\.max_mismatch; known here: empty_batches, lost_share"
    ):
        load(written(tmp_path, "alarms: {max_mismatch: 0.1}"))


def test_a_value_of_the_wrong_type_names_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.steps: expected an integer ≥ 1 or null, got 'many'"):
        load(written(tmp_path, "run: {steps: many}"))
    with pytest.raises(ConfigError, match=r"policy\.mode: expected on_policy or off_policy, got 'of_policy'"):
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


@given(st.integers(0, 4_000_000), st.floats(1e-9, 1.0), st.sampled_from(["on_policy", "off_policy"]))
def test_overrides_survive_the_round_trip(seed: int, rate: float, mode: str) -> None:
    config = override(Config(), [f"run.seed={seed}", f"optimizer.lr={rate}", f"policy.mode={mode}"])
    assert (config.run.seed, config.optimizer.lr, config.policy.mode) == (seed, rate, mode)


RAY = ["cluster.launcher=ray", "cluster.generators.threads=1", "cluster.learner.threads=1"]
REFUSED = [
    (["policy.max_staleness=2"], "on-policy data is never stale"),
    (["policy.mode=off_policy", "policy.update_batch=5"], "not a multiple of update_batch"),
    (["policy.update_batch=8"], "never off_policy; it must equal rollout_batch"),
    (["policy.mode=off_policy", "policy.max_staleness=-1"], "an integer ≥ 0 or null, got -1"),
    (["policy.group_size=1"], "an integer ≥ 2, got 1"),
    (["run.epochs=1"], "exactly one of steps"),
    (["run.name=a/b"], "no folder name"),
    (["run.steps=0"], "an integer ≥ 1 or null, got 0"),
    (["data.train=[]"], "list the files"),
    (["data.test=[]"], "no held-out file"),
    (
        ["data.mixture.weights={a: 1}", "data.mixture.temperature=2"],
        "weights and temperature, which each say all weights",
    ),
    (["data.mixture.schedule=[{until: 0.5, weights: {a: 1}}]"], "null in the last phase alone"),
    (["data.train=[{verifier: ocr}]"], "an entry without files"),
    (["data.train=[{files: a, frame: norm_1, verifier_parm: {gold_frame: norm_1}}]"], "say it once"),
    (["model.path=nowhere"], "is no folder"),
    (["model.path=docs"], "no processor"),
    (["model.freeze=[vit,connector,llm]"], "nothing would be trained"),
    (["sampling.top_p=0.9"], "must be off.*write evaluation.top_p"),
    (["sampling.top_k=5"], "must be off"),
    (["evaluation.top_p=0"], r"in \(0, 1\]"),
    (["evaluation.top_k=-2"], "≥ -1"),
    (["sampling.temperature=0"], r"a number in \[0\.01, 100\], got 0"),
    (["sampling.max_tokens=4096"], "max_model_len"),
    (["loss.kl=k3"], "set both or neither"),
    (["policy.mode=off_policy", "policy.in_flight=continue", "model.freeze=[]"], "continue keeps image features"),
    (["policy.schedule=[{until: 0.9}, {until: 0.5}]"], "must rise"),
    (["policy.schedule=[{mode: on_policy, max_staleness: 1}]"], r"schedule\[0\]\.max_staleness: 1 with mode on_policy"),
    (
        ["policy.schedule=[{until: 0.5}, {mode: off_policy}]", "model.freeze=[]", "policy.in_flight=continue"],
        r"schedule\[1\]\.mode: off_policy with policy\.in_flight continue keeps image features",
    ),
    (["policy.mode=off_policy", "policy.update_batch=8", "policy.schedule=[{until: 0.5}, {}]"], "never off_policy"),
    (["policy.max_staleness=3", "policy.schedule=[{mode: off_policy}]"], "whose phases have bounds of their own"),
    (
        ["policy.schedule=[{mode: off_policy, max_staleness: -1}]"],
        r"schedule\[0\]\.max_staleness: expected an integer ≥ 0 or null",
    ),
    (["policy.lease_s=1000", "cluster.stall_s=900"], r"stall_s: 900 is below policy\.lease_s \(1000\)"),
    (["cluster.heartbeat_s=600"], r"heartbeat_s: 600 is not below policy\.lease_s"),
    (["rewards.deadline_s=301"], r"deadline_s: 2 attempts of 301 s are more than policy\.lease_s \(600\)"),
    (
        ["policy.mode=off_policy", "policy.update_batch=64"],
        r"rollout_batch: 32 is not a multiple of update_batch \(64\)",
    ),
    (["cluster.generators.max_sequences=4"], r"max_sequences: 4 is below policy\.group_size \(8\)"),
    (
        ["cluster.generators.max_batched_tokens=255", "sampling.seeded=true"],
        r"max_batched_tokens: 255 is below max_model_len \(256\), and on a CPU sampling.seeded computes no prompt in parts",
    ),
    (["cluster.generators.max_batched_tokens=100"], r"max_batched_tokens: 100 is below max_sequences \(128\)"),
    (
        ["data.max_prompt_tokens=200"],
        r"max_model_len: 256 is below data\.max_prompt_tokens \+ sampling\.max_tokens \(264\)",
    ),
    (["evaluation.sampling=[greedy, greedy]"], "names a kind twice"),
    (["evaluation.sampling=[greedy]", "evaluation.top_p=0.9"], "add sampled"),
    (["evaluation.rows=0"], "an integer ≥ 1 or null, got 0"),
    (["loss.kind=cispo", "loss.dual_clip=3"], r"dual_clip: 3\.0 with kind cispo"),
    (["loss.correction=none", "loss.correction_cap=2"], r"correction_cap: 2\.0 with correction none"),
    (["optimizer.lr_vit=1e-6"], r"lr_vit: 1e-06, but model\.freeze holds vit"),
    (["loss.correction=icepop", "loss.correction_cap=0.5"], r"leaves nothing in \[0\.5, cap\]"),
    (["data.min_pixels=99999"], r"is above data\.max_pixels"),
    (["cluster.launcher=ray", "cluster.learner.threads=0"], "write how many CPUs each process takes"),
    ([*RAY, "cluster.bind=127.0.0.1"], "other nodes cannot reach it"),
    ([*RAY, "cluster.address=ray://head:10001"], "is not host:port"),
    ([*RAY, "cluster.address=head"], "is not host:port"),
    ([*RAY, "cluster.address=head:0"], "is not host:port"),
    ([*RAY, "cluster.address=head:65536"], "is not host:port"),
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


def test_clocks_that_fit_each_other_pass(digits: Config) -> None:
    check(override(digits, ["policy.lease_s=4000"]))
    check(
        override(digits, ["policy.lease_s=20", "cluster.stall_s=20", "cluster.heartbeat_s=19", "rewards.deadline_s=10"])
    )


def test_a_tilde_is_the_home_of_whoever_starts_the_run_and_a_path_may_hold_any_character(
    digits: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    name = "a [b] *c* dé"
    folders = ["run.folder", "data.store", "model.path", "model.feature_cache"]
    files = ["data.train", "data.test", "evaluation.files"]
    items = [*(f"{key}='~/{name}'" for key in folders), *(f"{key}=['~/{name}', here]" for key in files)]
    for launcher in ([], RAY):
        config = resolve(override(digits, [*items, *launcher]))
        values = {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in (*folders, *files)}
        assert values == dict.fromkeys(folders, f"{tmp_path}/{name}") | {
            key: [f"{tmp_path}/{name}", "here"] for key in files
        }
    (tmp_path / name).symlink_to(ROOT / "examples/digits/model")
    check(resolve(override(digits, [f"model.path='~/{name}'", f"run.folder='~/{name}'"])))


def test_a_schedule_that_is_off_policy_for_a_while_may_make_several_updates_of_a_batch_then(digits: Config) -> None:
    check(override(digits, ["policy.update_batch=8", "policy.schedule=[{until: 0.7, mode: off_policy}, {}]"]))


def test_held_out_answers_may_be_sampled_from_part_of_the_distribution(digits: Config) -> None:
    check(override(digits, ["evaluation.top_p=0.95", "evaluation.top_k=20", "evaluation.sampling=[sampled]"]))


def test_every_problem_is_reported_at_once(digits: Config) -> None:
    with pytest.raises(ConfigError) as caught:
        check(
            override(
                digits, ["run.epochs=1", "sampling.top_k=5", "data.test=[]", "cluster.address=head:1", "loss.kl=k3"]
            )
        )
    assert len(str(caught.value).splitlines()) == 5


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


def test_the_frame_of_answers_is_the_models_unless_the_file_names_one(digits: Config, tmp_path: Path) -> None:
    assert digits.rewards.frame == "auto"
    assert resolve(digits).rewards.frame == "resized_px"
    assert resolve(override(digits, ["rewards.frame=norm_1"])).rewards.frame == "norm_1"
    for family, frame in (("qwen3_vl", "norm_1000"), ("qwen3", "original_px")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
        assert resolve(override(digits, [f"model.path={tmp_path}"])).rewards.frame == frame
    assert resolve(override(digits, ["model.path=nowhere"])).rewards.frame == "auto"


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


def test_an_override_below_a_value_is_refused_by_name(tmp_path: Path) -> None:
    path = written(tmp_path, "run: {name: digits}")
    with pytest.raises(ConfigError, match=r"override 'run\.name\.first=1': run\.name has no keys below it"):
        load(path, ["run.name.first=1"])
    with pytest.raises(ConfigError, match=r"override 'steps=1': write section\.key=value"):
        load(path, ["steps=1"])


def test_a_lone_text_is_a_list_of_one(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {train: rows.parquet, test: [a.parquet]}\nrewards: {python: 'mine:score'}\n")
    config = load(path, ["evaluation.files=held_out.parquet"])
    assert (config.data.train, config.data.test, config.evaluation.files) == (
        ["rows.parquet"],
        ["a.parquet"],
        ["held_out.parquet"],
    )
    assert config.rewards.python == ("mine:score",)
    config = load(path, ["data.train={files: rows.csv, verifier: ocr}", "data.test=[a.parquet, {files: [b, c]}]"])
    assert config.data.train == [Files(files=["rows.csv"], verifier="ocr")]
    assert config.data.test == ["a.parquet", Files(files=["b", "c"])]
    with pytest.raises(ConfigError, match=r"data\.train: expected .*, got 7"):
        load(path, ["data.train=7"])
