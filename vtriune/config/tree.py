"""The tree of frozen structs behind every configuration file: one class per section, a default per key.

Read by every process. `load.py` fills it, `check.py` refuses impossible values and pairs.
"""

from typing import Literal

import msgspec

Module = Literal["vit", "connector", "llm"]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Frozen; an unknown key is an error that names the nearest known one."""


class Run(_Section, frozen=True):
    name: str = "run"
    folder: str = "runs"
    """The run's own folder is `<folder>/<name>`."""
    seed: int = 0
    steps: int | None = None
    """Number of publishes, i.e. of rollout batches trained on. Exactly one of `steps` and `epochs` is set."""
    epochs: int | None = None


class Generators(_Section, frozen=True):
    procs: int = 1
    threads: int = 2
    """OMP threads of each engine (CPU), and the CPUs it takes of Ray. 0: a fair share of this machine's cores, see
    `vtriune.config.resolve`."""
    gpus: int = 0
    """Accelerators of each engine; tensor-parallel size when above 1."""
    max_sequences: int = 64
    kv_cache_gib: float = 0.25
    """CPU key-value cache; on an accelerator `memory_share` rules."""
    memory_share: float = 0.85
    max_batched_tokens: int | None = None
    max_model_len: int = 10240
    enforce_eager: bool = True
    restarts: int = 2
    """Restart budget of the whole role. With Ray, a restart counts once, however long it waits for room."""


class Verifiers(_Section, frozen=True):
    procs: int = 1
    workers: int = 1
    """Worker processes for everything that is not perception. Of Ray, each process takes a CPU and one per worker."""
    restarts: int = 2


class Learner(_Section, frozen=True):
    procs: int = 1
    threads: int = 2
    """As for generators."""
    gpus: int = 0


class Placement(_Section, frozen=True):
    """Ray: how each role's processes are laid over the nodes. STRICT_PACK: all on one; SPREAD: on as many as there are."""

    generators: Literal["STRICT_PACK", "SPREAD"] = "SPREAD"
    """SPREAD is elastic: the run starts with the generators that have room, loses those of a lost node, and takes the
    missing ones in when the cluster has room for them."""
    verifiers: Literal["STRICT_PACK", "SPREAD"] = "SPREAD"
    learner: Literal["STRICT_PACK", "SPREAD"] = "STRICT_PACK"


class Cluster(_Section, frozen=True):
    launcher: Literal["local", "ray"] = "local"
    bind: str = "ipc"
    """`ipc`: Unix sockets in a private folder; with Ray, the address under which Ray knows this machine. Or the address of
    an interface of this machine, such as 127.0.0.1: every socket then is TCP and speaks CURVE with keys of this run."""
    address: str | None = None
    """Ray: head of the cluster to join, `host:port`. None: RAY_ADDRESS, or a cluster that runs on this machine, or else a
    new one, which ends with the run."""
    placement: Placement = Placement()
    generators: Generators = Generators()
    verifiers: Verifiers = Verifiers()
    learner: Learner = Learner()
    heartbeat_s: float = 10.0
    """A process silent for this long counts as frozen."""
    stall_s: float = 300.0
    """No group scored and no update done for this long: every process's stacks are dumped and the run ends."""


class Model(_Section, frozen=True):
    path: str = ""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    freeze: list[Module] = msgspec.field(default_factory=lambda: ["vit", "connector"])
    attention: Literal["auto", "flex", "cpu", "padded"] = "auto"
    activation_checkpointing: bool = False
    compile: bool = False
    offload: Literal["none", "optimizer", "all"] = "none"
    feature_cache: str = ""
    """Folder that keeps the image features of a frozen ViT and connector, between runs too; empty: in memory only."""


class Data(_Section, frozen=True):
    train: list[str] = msgspec.field(default_factory=list)
    """Parquet files; a glob pattern is expanded."""
    test: list[str] = msgspec.field(default_factory=list)
    store: str = ""
    """Folder of the memory-mapped stores; empty: `<run folder>/store`."""
    min_pixels: int = 512 * 512
    max_pixels: int = 2048 * 2048
    max_prompt_tokens: int = 8192
    prompt_pool: bool = True
    on_bad_row: Literal["refuse", "quarantine"] = "refuse"


class Phase(_Section, frozen=True):
    """One stretch of the training-progress schedule of `policy`."""

    until: float | None = None
    """Progress in (0, 1] at which the next phase begins; None for the last."""
    mode: Literal["on_policy", "off_policy"] = "on_policy"
    max_staleness: int = 0


class Policy(_Section, frozen=True):
    mode: Literal["on_policy", "off_policy"] = "on_policy"
    max_staleness: int | None = None
    """Hard bound. None: 0 on-policy, 2 off-policy."""
    look_ahead: int | None = None
    """W. None: derived from the rollout batch and the bound."""
    in_flight: Literal["continue", "recompute", "drain"] = "continue"
    rollout_batch: int = 1024
    """P: groups per version."""
    update_batch: int | None = None
    """Groups per optimiser step; None: the rollout batch."""
    group_size: int = 8
    filter: Literal["none", "zero_variance"] = "none"
    max_oversample: float = 2.0
    """With a filter: at most this many times `rollout_batch` groups are generated for one batch."""
    schedule: list[Phase] = msgspec.field(default_factory=list)
    lease_s: float = 600.0
    """A lease older than this is issued again."""


class SamplingSection(_Section, frozen=True):
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int = 2048
    seeded: bool = False
    """Seed each completion from run.seed and its group id; slower on some engines."""


class Loss(_Section, frozen=True):
    kind: Literal["grpo", "dr_grpo", "gspo", "cispo"] = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    correction: Literal["auto", "none", "decoupled", "tis", "icepop"] = "auto"
    """auto: `decoupled` off-policy, `none` on-policy and at staleness 0 with one update a batch, which is the same."""
    correction_cap: float | None = None
    """C. None: 2 for decoupled, 5 for tis and icepop."""
    kl: Literal["none", "k1", "mse", "k3"] = "none"
    kl_weight: float = 0.0
    entropy_weight: float = 0.0


class Optimizer(_Section, frozen=True):
    lr: float = 1e-6
    lr_vit: float | None = None
    lr_connector: float | None = None
    lr_llm: float | None = None
    """Per-module rates; None: `lr`."""
    warmup: float = 0.05
    """Share of all updates; the first update's rate is above 0."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """After the warm-up: a constant rate, or one that falls to almost 0 at the last update."""
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 1.0
    token_budget: int = 16384
    """Tokens of one packed micro-batch."""


class IouStep(_Section, frozen=True):
    until: float
    threshold: float


class Rewards(_Section, frozen=True):
    iou_threshold: Literal["average", "dynamic"] | float = "dynamic"
    iou_schedule: list[IouStep] = msgspec.field(
        default_factory=lambda: [
            IouStep(until=0.10, threshold=0.85),
            IouStep(until=0.25, threshold=0.95),
            IouStep(until=1.0, threshold=0.99),
        ]
    )
    evaluation_threshold: Literal["average"] | float = 0.5
    """The schedule is for training only: evaluation scores at this one."""
    matching: Literal["greedy", "optimal"] = "greedy"
    format: Literal["tags", "tags_with_newlines"] = "tags"
    fold_case: bool = False
    numeric_tolerance: float = 0.0
    frame: Literal["original_px", "resized_px", "norm_1000", "norm_1"] = "original_px"
    """Coordinate frame of boxes where a row names none."""
    report: Literal["weighted", "full"] = "weighted"
    correct_threshold: float = 0.5
    """A detection counts as correct in the metrics from this mean IoU@50 on."""
    deadline_s: float = 5.0
    memory_gib: float = 2.0
    """Address-space cap of a verifier worker."""
    max_response_chars: int = 65536
    max_fault_rate: float = 0.5
    """Circuit breaker per source."""
    python: list[str] = msgspec.field(default_factory=list)
    """Import paths that rows may name for the `python` verifier."""


class Evaluation(_Section, frozen=True):
    every: int = 0
    """Versions between evaluations; 0: none during training."""
    before: bool = True
    after: bool = True
    sampling: list[Literal["sampled", "greedy"]] = msgspec.field(default_factory=lambda: ["greedy"])
    """Each kind is one pass; the first one's mean is `eval/reward/mean`."""
    rows: int | None = None
    """At most this many held-out rows, spread evenly over the sources; None: all."""
    files: list[str] = msgspec.field(default_factory=list)
    """Empty: `data.test`."""


class Checkpoint(_Section, frozen=True):
    every: int = 0
    """Versions between checkpoints; 0: only at the end and on Ctrl-C."""
    keep: int = 2


class Tracking(_Section, frozen=True):
    wandb: Literal["offline", "online", "off"] = "offline"
    project: str = "vtriune"
    console: Literal["auto", "rich", "plain"] = "auto"


class Alarms(_Section, frozen=True):
    max_mismatch: float = 1e-2
    """On `mismatch/max_abs` of tokens sampled at the learner's own version: above it a warning is logged."""
    max_truncation: float = 0.5


class Config(_Section, frozen=True):
    """One training run."""

    run: Run = Run()
    cluster: Cluster = Cluster()
    model: Model = Model()
    data: Data = Data()
    policy: Policy = Policy()
    sampling: SamplingSection = SamplingSection()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    rewards: Rewards = Rewards()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()
    alarms: Alarms = Alarms()
