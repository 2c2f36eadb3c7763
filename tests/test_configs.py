"""Every configuration composes and validates; what does not fit is refused by the name of its key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict, fields, is_dataclass

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from specdec.config import (
    CHOICES,
    GROUPS,
    SIMULATED,
    VARIANTS,
    Config,
    WorkloadConfig,
    choose,
    register,
    validate,
)
from specdec.config_experiments import (
    ARRIVALS,
    HARDWARE,
    LENGTHS,
    MODEL_SHAPES,
    ROUTERS,
    SERVE_ARRIVALS,
    SIM_DTYPES,
)
from specdec.run import conf_dir, explain

EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
OPTIONS = sorted(
    (folder.name, path.stem)
    for folder in conf_dir().iterdir()
    if folder.is_dir() and folder.name not in ("experiment", "hydra")
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
    experiment = "simulate" if group in SIMULATED else "quickstart"
    chosen = getattr(build(f"{group}={name}", *extra, experiment=experiment), group)
    if group in VARIANTS:
        assert chosen.name == name
        assert type(chosen) is VARIANTS[group][name]
    if group in ("tracking", "verify"):
        assert name in (getattr(chosen, "mode", None), getattr(chosen, "rule", None))


def test_files_and_schemas_name_the_same_groups():
    groups = {folder.name for folder in conf_dir().iterdir() if folder.is_dir()}
    assert groups == {*GROUPS, *VARIANTS, "hydra"}
    for group, variants in VARIANTS.items():
        assert {path.stem for path in (conf_dir() / group).glob("*.yaml")} == set(variants)


def test_choices_are_those_of_the_code():
    from specdec.acceptor import RULES
    from specdec.drafter import DRAFTERS
    from specdec.graphs import GRAPH_MODES
    from specdec.llm import DTYPES
    from specdec.runner import BACKENDS
    from specdec.scheduler.policy import ORDERS, POLICIES
    from specdec.scheduler.speculation import CONTROLLERS
    from specdec.workload import PROCESSES

    assert set(CHOICES["model.dtype"]) == set(DTYPES)
    assert set(CHOICES["model.backend"]) == set(BACKENDS)
    assert set(CHOICES["model.graphs"]) == set(GRAPH_MODES)
    assert set(CHOICES["verify.rule"]) == set(RULES)
    assert set(CHOICES["policy.order"]) == set(ORDERS)
    assert set(SERVE_ARRIVALS) == set(PROCESSES)
    assert set(VARIANTS["policy"]) == set(POLICIES)
    assert set(VARIANTS["speculation"]) == set(CONTROLLERS)
    assert set(VARIANTS["drafter"]) == {*DRAFTERS, "none"}


def test_names_of_simulations_are_those_of_the_code():
    from sim.acceptance import ACCEPTANCE
    from sim.hardware import HARDWARE_NAMES, Hardware
    from sim.model_shape import DTYPE_BYTES
    from sim.model_shape import MODEL_SHAPES as SHAPES
    from sim.router import ROUTERS as ROUTER_CLASSES
    from specdec.workload import AZURE_SERVICES
    from specdec.workload.arrivals import _PROCESSES

    assert set(ARRIVALS) == {*_PROCESSES, "trace", "closed_loop"}
    assert set(LENGTHS) == {*AZURE_SERVICES, "fixed", "trace"}
    assert set(ROUTERS) == set(ROUTER_CLASSES)
    assert set(MODEL_SHAPES) == set(SHAPES)
    assert set(SIM_DTYPES) == set(DTYPE_BYTES)
    assert set(VARIANTS["acceptance"]) <= set(ACCEPTANCE)
    files = {path.stem for path in (conf_dir() / "hardware").glob("*.yaml")}
    assert files == set(HARDWARE_NAMES) == set(HARDWARE)
    assert {item.name for item in fields(GROUPS["hardware"])} == {item.name for item in fields(Hardware)}


def test_options_of_acceptance_and_processes_are_those_of_the_code():
    from sim.acceptance import make_acceptance
    from specdec.workload import make_process

    for schema in VARIANTS["acceptance"].values():
        make_acceptance(**asdict(schema()))
    values = {"rates_per_s": (1.0, 2.0), "dwell_s": (1.0, 2.0), "amplitude": 0.5, "period_s": 60.0, "cv": 2.0}
    for name, options in ARRIVALS.items():
        if name not in ("trace", "closed_loop"):
            rate = {} if name in ("all_at_once", "mmpp") else {"rate_per_s": 1.0}
            make_process(name, **rate, **{option: values[option] for option in options})


def test_options_of_clusters_are_those_of_the_code():
    from sim.cluster_spec import Autoscaling, Failures, Limits

    pairs = [("autoscaling", Autoscaling), ("failures", Failures)]
    for group, described in pairs:
        schema = VARIANTS[group]["on"]
        assert {item.name for item in fields(schema)} == {"name", *(item.name for item in fields(described))}
    assert {item.name for item in fields(GROUPS["limits"])} == {item.name for item in fields(Limits)}


@pytest.mark.parametrize("group", SIMULATED)
def test_what_only_a_simulated_cluster_has_is_refused_elsewhere(group: str):
    default = getattr(build(experiment="simulate"), group)
    assert default == SIMULATED[group]
    other = "limits.max_outstanding=5" if group == "limits" else f"{group}={list(VARIANTS[group])[-1]}"
    for experiment in ("simulate", "policy_sweep"):
        assert getattr(build(other, experiment=experiment), group) != default
    for experiment in ("quickstart", "sim_bench"):
        message = f"{other} is for .*experiment=simulate and policy_sweep, not for {experiment}"
        with pytest.raises(ValueError, match=message):
            build(other, experiment=experiment)


def test_sheets_are_read_alike_by_both_readers():
    from experiments.simulations import hardware
    from sim.hardware import HARDWARE_NAMES, load_hardware

    for name in HARDWARE_NAMES:
        assert hardware(build(f"hardware={name}", experiment="simulate")) == load_hardware(name)


def test_a_sheet_can_be_changed_on_the_command_line():
    config = build("hardware=l40s", "hardware.price_per_hour_usd=1.5", "hardware.flops_per_s.int8=1e14")
    assert (config.hardware.name, config.hardware.price_per_hour_usd) == ("l40s", 1.5)
    assert config.hardware.flops_per_s["int8"] == 1e14
    assert config.hardware.memory_bytes == 48305799168


def test_policies_of_a_sweep_are_checked_by_their_schemas():
    assert choose("policy", {"name": "dynamic", "window_s": 0.2}, "p").window_s == 0.2
    assert choose("speculation", {"name": "off"}, "p").name == "off"
    for group, options, message in [
        ("policy", {"name": "chunkd"}, r"unknown p\.name 'chunkd': did you mean chunked"),
        ("policy", {"name": "static", "window_s": 1.0}, r"unknown key 'p\.window_s'"),
        ("policy", {}, r"unknown p\.name None"),
        ("speculation", {"name": "fixed", "num_drafts": "many"}, r"p: Value 'many'"),
        ("speculation", {"name": "fixed", "num_drafts": -1}, r"num_drafts=-1 must be >= 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            choose(group, options, "p")


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("hardware=h10", "hardware", "h100"),
        ("hardware.price=1", "hardware.price", "hardware.price_per_hour_usd"),
        ("+hardware.tdp=1", "hardware.tdp", "hardware.tdp_w"),
        ("acceptance=constnt", "acceptance", "constant"),
        ("speculation=goodputs", "speculation", "goodput"),
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
        ("hardware.memory_bytes=much", "hardware.memory_bytes"),
        ("hardware.flops_per_s.fp8=fast", "hardware.flops_per_s.fp8"),
        ("acceptance.alpha=high", "acceptance.alpha"),
        ("policy.decode_first=often", "policy.decode_first"),
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
        ("quickstart", ["policy.ageing_s=5"], r"ageing_s=5\.0 is for policy\.order=priority only, not fcfs"),
        ("quickstart", ["policy.order=priority", "policy.ageing_s=0"], r"policy\.ageing_s=0\.0 must be"),
        ("quickstart", ["speculation=goodput", "speculation.step_s=[0.1]"], r"step_tokens has 0 entries"),
        ("quickstart", ["speculation=load_threshold", "speculation.max_running=-1"], r"max_running=-1"),
        ("simulate", ["acceptance.alpha=1.2"], r"acceptance\.alpha: acceptance rate 1\.2"),
        ("simulate", ["acceptance=positional", "acceptance.rates=[]"], r"acceptance\.rates is empty"),
        ("simulate", ["acceptance=beta", "acceptance.concentration=0"], r"acceptance\.concentration=0\.0"),
        ("simulate", ["acceptance=markov", "acceptance.good_to_bad=2"], r"acceptance\.good_to_bad=2\.0"),
        (
            "simulate",
            ["experiment.rate_per_s=-1"],
            r"experiment\.rate_per_s=-1\.0 must be a finite number > 0",
        ),
        ("simulate", ["experiment.router=round_robbin"], r"experiment\.router.*did you mean round_robin"),
        ("simulate", ["experiment.arrivals=posson"], r"experiment\.arrivals.*did you mean poisson"),
        ("simulate", ["experiment.lengths=conversaton"], r"experiment\.lengths.*did you mean conversation"),
        ("simulate", ["experiment.model=llama-3.1-80b"], r"experiment\.model.*did you mean llama-3\.1-8b"),
        ("simulate", ["experiment.draft=llama"], r"unknown experiment\.draft 'llama'"),
        (
            "simulate",
            ["experiment.cv=2"],
            r"experiment\.cv was given, but it is for experiment\.arrivals=gamma",
        ),
        (
            "simulate",
            ["experiment.arrivals=mmpp"],
            r"mmpp needs experiment\.rates_per_s, experiment\.dwell_s",
        ),
        (
            "simulate",
            ["experiment.lengths=fixed"],
            r"fixed needs experiment\.prompt_len, experiment\.output_len",
        ),
        ("simulate", ["experiment.arrivals=trace"], r"experiment\.trace has no value"),
        ("simulate", ["experiment.trace=a.csv"], r"experiment\.trace=a\.csv is not used"),
        ("simulate", ["experiment.num_requests=null"], r"num_requests is null: only a trace has an end"),
        ("simulate", ["experiment.workers=0"], r"experiment\.workers=0 must be"),
        ("simulate", ["experiment.draft_hardware=l40s"], r"l40s was given without a draft model: add"),
        (
            "simulate",
            ["experiment.draft=llama-3.2-1b", "experiment.draft_hardware=l40s"],
            r"draft_hardware=l40s needs experiment\.draft_round_trip_s",
        ),
        ("simulate", ["experiment.draft_round_trip_s=1e-4"], r"draft_round_trip_s=0\.0001 is of a draft on"),
        (
            "simulate",
            ["experiment.draft=llama-3.2-1b", "experiment.draft_hardware=h10"],
            r"experiment\.draft_hardware 'h10': did you mean h100",
        ),
        ("simulate", ["cluster=disagregated"], r"cluster.*did you mean disaggregated"),
        ("simulate", ["cluster.num_prefill=2"], r"unknown key 'cluster\.num_prefill'"),
        ("simulate", ["failures.max_retries=2"], r"unknown key 'failures\.max_retries'"),
        ("simulate", ["cluster=disaggregated", "cluster.num_decode=0"], r"cluster\.num_decode=0 must be"),
        (
            "simulate",
            ["cluster=disaggregated", "cluster.num_decode=two"],
            r"cluster\.num_decode: Value 'two'",
        ),
        ("simulate", ["cluster=disaggregated", "cluster.link_latency_s=-1"], r"link_latency_s=-1\.0 must be"),
        (
            "simulate",
            ["cluster=model_routing", "cluster.simple_share=1"],
            r"simple_share=1\.0 .*cluster=plain",
        ),
        ("simulate", ["cluster=model_routing", "cluster.escalation=2"], r"cluster\.escalation=2\.0 must be"),
        (
            "simulate",
            ["cluster=model_routing", "cluster.small_model=llama-3.2-2b"],
            r"did you mean llama-3\.2-1b",
        ),
        ("simulate", ["cluster=model_routing", "cluster.simple_tasks=[]"], r"cluster\.simple_tasks is empty"),
        ("simulate", ["autoscaling=on", "autoscaling.min_replicas=5"], r"autoscaling\.min_replicas=5 <= "),
        ("simulate", ["autoscaling=on", "autoscaling.interval_s=0"], r"autoscaling\.interval_s=0\.0 must be"),
        ("simulate", ["failures=on", "failures.mean_repair_s=0"], r"failures\.mean_repair_s=0\.0 must be"),
        ("simulate", ["failures=on", "failures.max_retries=-1"], r"failures\.max_retries=-1 must be >= 0"),
        ("simulate", ["limits.max_outstanding=0"], r"limits\.max_outstanding=0 must be >= 1"),
        ("simulate", ["limits.max_outstandng=5"], r"did you mean limits\.max_outstanding"),
        ("policy_sweep", ["experiment.loads=[0.5,0]"], r"experiment\.loads=0\.0 must be"),
        ("policy_sweep", ["experiment.only=[statc]"], r"experiment\.only.*did you mean static"),
        ("policy_sweep", ["experiment.arrivals=all_at_once"], r"all_at_once has no rate to sweep"),
        (
            "policy_sweep",
            ["+experiment.policies.mine.polcy=1"],
            r"experiment\.policies\.mine.*did you mean policy",
        ),
        ("sim_bench", ["experiment.cases=[azure]"], r"experiment\.cases.*known: azure_fixed"),
        ("sim_bench", ["experiment.max_requests=10"], r"max_requests=10 must be >= 1000"),
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


def test_a_merged_drafter_takes_names_and_options():
    one = "{name: eagle, path: head, depth: 1}"
    config = build("drafter=merged", f"drafter.drafters=[suffix,{one}]", experiment="quickstart")
    assert config.drafter.drafters == ["suffix", {"name": "eagle", "path": "head", "depth": 1}]
    for wrong in ("[a]", "{nam: a}", "3"):
        with pytest.raises(ValueError, match="is neither a name nor options with one"):
            build("drafter=merged", f"drafter.drafters=[suffix,{wrong}]", experiment="quickstart")
