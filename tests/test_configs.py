"""Every configuration composes and validates; what does not fit is refused by the name of its key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, is_dataclass

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from specdec.config import CHOICES, GROUPS, VARIANTS, Config, WorkloadConfig, register, validate
from specdec.run import conf_dir, explain

EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
OPTIONS = sorted(
    (folder.name, path.stem)
    for folder in conf_dir().iterdir()
    if folder.is_dir() and folder.name != "experiment"
    for path in folder.glob("*.yaml")
)


def build(*overrides: str, experiment: str = "quickstart") -> Config:
    """The configuration that the command line would run, or the error it would print."""
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            raw = compose("config", overrides=[f"+experiment={experiment}", *overrides])
        except HydraException as error:
            raise ValueError(explain(error)) from error
        return validate(raw)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(name: str):
    config = build(experiment=name)
    assert config.experiment.name == name
    assert type(config.experiment) is VARIANTS["experiment"][name]
    for group, schema in GROUPS.items():
        assert type(getattr(config, group)) is schema


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_of_every_group_composes(group: str, name: str):
    extra = ["workload.prompts=questions.jsonl"] if (group, name) == ("workload", "file") else []
    chosen = getattr(build(f"{group}={name}", *extra), group)
    if group in VARIANTS:
        assert chosen.name == name
        assert type(chosen) is VARIANTS[group][name]
    if group in ("tracking", "verify"):
        assert name in (getattr(chosen, "mode", None), getattr(chosen, "rule", None))


def test_files_and_schemas_name_the_same_groups():
    groups = {folder.name for folder in conf_dir().iterdir() if folder.is_dir()}
    assert groups == {*GROUPS, *VARIANTS}
    for group, variants in VARIANTS.items():
        assert {path.stem for path in (conf_dir() / group).glob("*.yaml")} == set(variants)


def test_choices_are_those_of_the_code():
    from specdec.drafter import DRAFTERS
    from specdec.llm import DTYPES
    from specdec.runner import BACKENDS
    from specdec.scheduler.policy import ORDERS, POLICIES
    from specdec.scheduler.speculation import CONTROLLERS
    from specdec.verify import CHAIN_RULES
    from specdec.workload import PROCESSES

    assert set(CHOICES["model.dtype"]) == set(DTYPES)
    assert set(CHOICES["model.backend"]) == set(BACKENDS)
    assert set(CHOICES["verify.rule"]) == set(CHAIN_RULES)
    assert set(CHOICES["policy.order"]) == set(ORDERS)
    assert set(CHOICES["experiment.arrivals"]) == set(PROCESSES)
    assert set(VARIANTS["policy"]) == set(POLICIES)
    assert set(VARIANTS["speculation"]) == set(CONTROLLERS)
    assert set(VARIANTS["drafter"]) == {*DRAFTERS, "none"}


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("policy.ordr=sjf", "policy.ordr", "policy.order"),
        ("+policy.ordr=sjf", "policy.ordr", "policy.order"),
        ("experiment.drafter=[ngram]", "experiment.drafter", "experiment.drafters"),
        ("polcy=static", "polcy", "policy"),
        ("+sed=1", "sed", "seed"),
        ("drafter.alpha=0.5", "drafter.alpha", "drafter.max_ngram"),
        ("policy=chunkd", "chunkd", "chunked"),
        ("drafter=n_gram", "n_gram", "ngram"),
        ("experiment=quickstar", "quickstar", "quickstart"),
        ("tracking.mode=onlin", "tracking.mode", "online"),
        ("verify.rule=blocks", "verify.rule", "block"),
        ("policy.order=fifo", "policy.order", "fcfs"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(override: str, key: str, nearest: str):
    with pytest.raises(ValueError) as caught:
        build(override)
    message = str(caught.value)
    assert key in message
    assert nearest in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("engine.threads=many", "engine.threads"),
        ("speculation.num_drafts=2.5", "speculation.num_drafts"),
        ("speculation.num_drafts=true", "speculation.num_drafts"),
        ("policy.order=[fcfs]", "policy.order"),
        ("experiment.drafters=3", "experiment.drafters"),
        ("workload.tasks=[[a]]", "workload.tasks"),
        ("sampling.temperature=hot", "sampling.temperature"),
        ("seed=abc", "seed"),
    ],
)
def test_wrong_types_are_refused_by_key(override: str, key: str):
    with pytest.raises(ValueError) as caught:
        build(override)
    assert str(caught.value).startswith(key)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("experiment", "overrides", "message"),
    [
        ("quickstart", ["drafter=synthetic", "drafter.alpha=1.5"], r"drafter\.alpha: acceptance rate 1\.5"),
        ("quickstart", ["drafter=synthetic", "drafter.alpha=null"], r"drafter\.alpha is null"),
        ("quickstart", ["drafter=synthetic", "drafter.rates=[0.5,-0.1]"], r"drafter\.rates.*-0\.1"),
        ("quickstart", ["speculation.num_drafts=-1"], r"num_drafts=-1 must be >= 0"),
        ("quickstart", ["policy=dynamic", "policy.window_s=-1"], r"policy\.window_s=-1\.0 must be >= 0"),
        ("acceptance_sweep", ["experiment.alphas=[0.5,nan]"], r"experiment\.alphas: acceptance rate nan"),
        ("acceptance_sweep", ["experiment.num_drafts=[2,-1]"], r"experiment\.num_drafts=-1"),
        ("serve", ["experiment.rate_per_s=0"], r"experiment\.rate_per_s=0\.0 must be > 0"),
        ("serve", ["experiment.arrivals=posson"], r"experiment\.arrivals.*poisson"),
        ("quickstart", ["workload=file"], r"workload\.prompts has no value"),
        ("quickstart", ["drafter.name=synthetic"], r"choose it with drafter=synthetic"),
        ("quickstart", ["~drafter"], r"drafter has no value"),
    ],
)
def test_values_out_of_range_are_refused(experiment: str, overrides: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        build(*overrides, experiment=experiment)


def test_a_configuration_without_experiment_is_refused():
    register()
    with (
        initialize_config_dir(str(conf_dir()), version_base="1.3"),
        pytest.raises(ValueError, match="experiment"),
    ):
        validate(compose("config"))


def test_configurations_are_frozen():
    config = build()
    for owner, name in [(config, "seed"), (config.engine, "block_size"), (config.drafter, "max_ngram")]:
        with pytest.raises(FrozenInstanceError):
            setattr(owner, name, 1)


def test_every_schema_is_frozen_and_has_defaults():
    schemas: list[Callable[..., object]] = [
        schema for variants in VARIANTS.values() for schema in variants.values()
    ]
    for schema in [*schemas, *(schema for schema in GROUPS.values() if schema is not WorkloadConfig)]:
        instance = schema()
        assert is_dataclass(instance)
        first = fields(instance)[0].name
        with pytest.raises(FrozenInstanceError):
            setattr(instance, first, None)


def test_overrides_reach_the_configuration():
    config = build("drafter=synthetic", "drafter.rates=[0.9,0.5]", "drafter.alpha=null", "seed=7")
    assert config.drafter.rates == [0.9, 0.5]
    assert config.seed == 7
    assert config.as_dict()["drafter"] == {"name": "synthetic", "alpha": None, "rates": [0.9, 0.5], "seed": 0}
