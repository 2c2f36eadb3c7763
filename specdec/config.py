"""The experiment configuration: which schema each group of ``conf/`` has, and what is checked beyond types.

:func:`register` puts the frozen dataclasses of ``config_schemas``, ``config_cluster``, ``config_training``,
``config_trees``, ``config_kernels``, ``config_calibrate``, ``config_calibration``, ``config_extrapolation`` and
``config_experiments`` into Hydra's ConfigStore under ``schema/``, and the files of ``conf/`` start from their schema
and hold only what differs. So Hydra itself refuses unknown keys and wrong types; :func:`validate` checks the rest
(appended keys, choices, ranges) and returns a frozen :class:`Config`. A group whose options depend on a choice (those
in ``VARIANTS``) has one schema per ``name``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass
from typing import Any, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from specdec import config_calibrate as device
from specdec import config_calibration as calibration
from specdec import config_cluster as clusters
from specdec import config_experiments as experiments
from specdec import config_extrapolation as extrapolation
from specdec import config_kernels as kernels
from specdec import config_schemas as schemas
from specdec import config_training as training
from specdec import config_trees as trees
from specdec.config_schemas import TrackingConfig, WorkloadConfig
from specdec.names import unknown_name

__all__ = [
    "CHOICES",
    "GROUPS",
    "VARIANTS",
    "Config",
    "TrackingConfig",
    "WorkloadConfig",
    "choose",
    "register",
    "validate",
]

# Allowed values of options that are words. A test holds them equal to the tables of the code that uses them; those of
# one experiment alone stand in config_experiments.
CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("bfloat16", "float32", "float16"),
    "model.backend": ("auto", "eager", "native", "triton"),
    "model.graphs": ("auto", "off", "padded"),
    "verify.rule": ("token", "block", "recursive", "traversal"),
    "policy.order": ("fcfs", "sjf", "priority", "edf"),
    "tracking.mode": ("offline", "online", "disabled"),
}
VARIANTS: dict[str, dict[str, type]] = {
    "drafter": {
        "none": schemas.NoDrafter,
        "ngram": schemas.NgramConfig,
        "suffix": schemas.SuffixConfig,
        "recycling": schemas.RecyclingConfig,
        "merged": schemas.MergedConfig,
        "layer_skip": schemas.LayerSkipConfig,
        "draft_model": schemas.DraftModelConfig,
        "synthetic": schemas.SyntheticConfig,
        "eagle": schemas.EagleConfig,
        "medusa": schemas.MedusaConfig,
    },
    "policy": {
        "static": schemas.PolicyConfig,
        "dynamic": schemas.DynamicPolicyConfig,
        "continuous": schemas.PolicyConfig,
        "chunked": schemas.PolicyConfig,
    },
    "speculation": {
        "off": schemas.SpeculationOff,
        "fixed": schemas.FixedConfig,
        "adaptive": schemas.AdaptiveConfig,
        "load_threshold": schemas.LoadThresholdConfig,
        "goodput": schemas.GoodputConfig,
    },
    "acceptance": {
        "constant": schemas.ConstantAcceptanceConfig,
        "positional": schemas.PositionalAcceptanceConfig,
        "beta": schemas.BetaAcceptanceConfig,
        "markov": schemas.MarkovAcceptanceConfig,
    },
    "cluster": {
        "plain": clusters.PlainClusterConfig,
        "disaggregated": clusters.DisaggregatedConfig,
        "model_routing": clusters.ModelRoutingConfig,
    },
    "autoscaling": {"off": clusters.AutoscalingOff, "on": clusters.AutoscalingConfig},
    "failures": {"off": clusters.FailuresOff, "on": clusters.FailuresConfig},
    "experiment": {
        "quickstart": experiments.QuickstartConfig,
        "acceptance_sweep": experiments.AcceptanceSweepConfig,
        "lossless": experiments.LosslessConfig,
        "draft_sweep": experiments.DraftSweepConfig,
        "control": experiments.ControlConfig,
        "serve": experiments.ServeConfig,
        "cpu_bench": experiments.CpuBenchConfig,
        "simulate": experiments.SimulateConfig,
        "policy_sweep": experiments.PolicySweepConfig,
        "sim_bench": experiments.SimBenchConfig,
        "train_draft": training.TrainDraftConfig,
        "tree_sweep": trees.TreeSweepConfig,
        "kernel_bench": kernels.KernelBenchConfig,
        "validate": calibration.ValidateConfig,
        "import_timings": calibration.ImportTimingsConfig,
        "calibrate": device.CalibrateConfig,
        "phase_diagram": extrapolation.PhaseDiagramConfig,
        "extrapolate": extrapolation.ExtrapolateConfig,
        "capacity": extrapolation.CapacityConfig,
        "economics": extrapolation.EconomicsConfig,
        "advise": extrapolation.AdviseConfig,
    },
}
GROUPS: dict[str, type] = {
    "model": schemas.ModelConfig,
    "verify": schemas.VerifyConfig,
    "workload": schemas.WorkloadConfig,
    "sampling": schemas.SamplingConfig,
    "engine": schemas.EngineConfig,
    "tracking": schemas.TrackingConfig,
    "hardware": schemas.HardwareConfig,
    "limits": clusters.LimitsConfig,
    "validate": calibration.ValidationGroup,
}
SIMULATED: dict[str, object] = {
    "cluster": clusters.PlainClusterConfig(),
    "autoscaling": clusters.AutoscalingOff(),
    "failures": clusters.FailuresOff(),
    "limits": clusters.LimitsConfig(),
}
"""Groups that the experiments in SIMULATIONS alone read, and what they are in all others."""
SIMULATIONS = ("simulate", "policy_sweep")
TYPED = ("hardware",)
"""Groups whose files other code reads as they are, so the root holds their schema instead of the file naming it."""


@dataclass(frozen=True)
class Config:
    """A validated configuration. The groups in ``VARIANTS`` hold the schema that their ``name`` chose.
    ``output_root``: run directories are made below it."""

    experiment: Any
    model: schemas.ModelConfig
    drafter: Any
    verify: schemas.VerifyConfig
    policy: Any
    speculation: Any
    workload: WorkloadConfig
    sampling: schemas.SamplingConfig
    engine: schemas.EngineConfig
    tracking: TrackingConfig
    hardware: schemas.HardwareConfig
    acceptance: Any
    cluster: Any
    autoscaling: Any
    failures: Any
    limits: clusters.LimitsConfig
    validate: calibration.ValidationGroup
    seed: int = 0
    output_root: str = "runs"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as in ``config.yaml``."""
        return asdict(self)


def register() -> None:
    """Store every schema under ``schema/`` in Hydra's ConfigStore; again is harmless."""
    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=_open(_root_schema()))
    for group, schema in GROUPS.items():
        store.store(group="schema", name=group, node=_open(schema))
    for group, variants in VARIANTS.items():
        for name, schema in variants.items():
            store.store(group=f"schema/{group}", name=name, node=_open(schema))


def _root_schema() -> type:
    """:class:`Config` as Hydra fills it: each group but the typed ones is whatever schema its file starts from."""
    groups: list[Any] = [
        (name, Any, field(default=MISSING)) for name in (*GROUPS, *VARIANTS) if name not in TYPED
    ]
    groups += [(name, GROUPS[name], field(default_factory=GROUPS[name])) for name in TYPED]
    plain = [
        (item.name, type(item.default), field(default=item.default))
        for item in fields(Config)
        if item.default is not NO_DEFAULT
    ]
    return make_dataclass("Root", groups + plain)


def _open(schema: type) -> DictConfig:
    """The schema as a node that can be filled: only the filled object is frozen."""
    node = OmegaConf.structured(schema)
    children = [node[key] for key in node if not OmegaConf.is_missing(node, key)]
    for part in (node, *children):
        if isinstance(part, DictConfig):
            OmegaConf.set_readonly(part, False)
    for child in children:
        if isinstance(child, DictConfig) and not is_dataclass(OmegaConf.get_type(child)):
            OmegaConf.set_struct(child, False)  # a mapping whose keys no schema knows
    return node


def validate(raw: DictConfig) -> Config:
    """Check a composed configuration and freeze it.

    Raises:
        ValueError: an unknown key or choice (with the nearest ones), a missing value or one out of range,
            naming the key.
    """
    _check_keys(raw, "")
    if "experiment" in OmegaConf.missing_keys(raw):
        raise ValueError(
            f"no experiment chosen: add +experiment=NAME, one of {', '.join(VARIANTS['experiment'])}"
        )
    for key in sorted(OmegaConf.missing_keys(raw)):
        raise ValueError(f"{key} has no value: give it, e.g. {key}=…")
    for group, variants in VARIANTS.items():
        _check_variant(group, raw[group], variants)
    for key, choices in CHOICES.items():
        value = OmegaConf.select(raw, key)
        if value is not None and value not in choices:
            raise unknown_name(key, value, choices)
    config = Config(**{str(key): _plain(node) for key, node in raw.items()})
    _check_simulated(config)
    return config


def choose(group: str, options: Mapping[str, Any], key: str) -> Any:
    """The frozen schema of ``group`` that the ``name`` in ``options`` chooses, with the others of them filled in.

    Raises:
        ValueError: an unknown name or option, a wrong type or a value out of range; ``key`` says where it stood.
    """
    name = options.get("name")
    if name not in VARIANTS[group]:
        raise unknown_name(f"{key}.name", name, VARIANTS[group])
    schema = VARIANTS[group][name]
    for option in options:
        if option not in (known := [item.name for item in fields(schema)]):
            raise unknown_name("key", f"{key}.{option}", [f"{key}.{name}" for name in known])
    try:
        return OmegaConf.to_object(OmegaConf.merge(_open(schema), dict(options)))
    except OmegaConfBaseException as error:
        raise ValueError(f"{key}: {str(error).splitlines()[0]}") from error


def _plain(value: Any) -> Any:
    return OmegaConf.to_object(value) if isinstance(value, DictConfig) else value


def _check_keys(node: DictConfig, prefix: str) -> None:
    """No key beyond the schemas: Hydra lets ``+key=value`` append what they do not have."""
    schema = OmegaConf.get_type(node)
    if not is_dataclass(schema):
        raise ValueError(f"{prefix.rstrip('.')} must be chosen by name, not {OmegaConf.to_container(node)}")
    hints = get_type_hints(schema)
    known = [f"{prefix}{item.name}" for item in fields(schema)]
    for key in node:
        if f"{prefix}{key}" not in known:
            raise unknown_name("key", f"{prefix}{key}", known)
        child = None if OmegaConf.is_missing(node, key) else node[key]
        if isinstance(child, DictConfig) and get_origin(hints[str(key)]) is not dict:
            _check_keys(child, f"{prefix}{key}.")
        elif (
            isinstance(child, ListConfig)
            and hints[str(key)] != list[Any]  # of names or options, checked by those who take them
            and any(isinstance(item, DictConfig | ListConfig) for item in child)
        ):
            raise ValueError(f"{prefix}{key}={child} must be a flat list")


def _check_simulated(config: Config) -> None:
    """What describes a simulated cluster, or what to validate, is an error elsewhere, never ignored."""
    if config.experiment.name != "validate" and config.validate != calibration.ValidationGroup():
        raise ValueError(
            f"validate.* is for +experiment=validate, not for {config.experiment.name}: leave it out"
        )
    for group, default in SIMULATED.items():
        chosen = getattr(config, group)
        if config.experiment.name in SIMULATIONS or chosen == default:
            continue
        options = {key: value for key, value in asdict(chosen).items() if value is not None}
        key, value = next(iter(options.items()))
        given = f"{group}={value}" if key == "name" else f"{group}.{key}={value}"
        raise ValueError(
            f"{given} is for +experiment={' and '.join(SIMULATIONS)}, not for {config.experiment.name}: leave it out"
        )


def _check_variant(group: str, node: DictConfig, variants: dict[str, type]) -> None:
    """A choice is made by its group: ``drafter=ngram``, never ``drafter.name=ngram``."""
    name, schema = node["name"], OmegaConf.get_type(node)
    if name not in variants:
        raise unknown_name(f"{group} name", name, variants)
    if variants[name] is not schema:
        raise ValueError(f"{group}.name={name} does not fit the other options: choose it with {group}={name}")
