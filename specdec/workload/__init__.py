"""What is asked, and when. Shared by the engine and the simulator; numpy, and polars only to read traces.

``prompts``: texts. ``arrivals``: times. ``lengths``, ``azure``: tokens. ``tasks``: classes. ``requests``: all of
these as arrays. ``sources``, ``sessions``: streams of them. ``traces``: files. ``hashing``: prefix blocks.

>>> items = prompt_items("builtin", num_prompts=12)
>>> source = SyntheticSource(Poisson(5.0), azure_like("conversation"), num_requests=1_000_000, seed=0)
>>> for requests in source.chunks(65_536): ...
>>> trace = load_trace("AzureLLMInferenceTrace_conv.csv").scale_rate(2.0)
"""

from __future__ import annotations

from specdec.workload.arrivals import (
    PROCESSES,
    AllAtOnce,
    ArrivalProcess,
    Diurnal,
    Gamma,
    Mmpp,
    Poisson,
    Uniform,
    arrival_chunks,
    arrivals,
    make_process,
)
from specdec.workload.azure import AZURE_SERVICES, azure_like
from specdec.workload.lengths import (
    EmpiricalLengths,
    FixedLengths,
    LengthDistribution,
    LengthErrors,
    LognormalLengths,
    QuantileLengths,
    Quantiles,
    fit_lengths,
    length_errors,
)
from specdec.workload.prompts import (
    TASKS,
    Messages,
    PromptItem,
    builtin_prompts,
    choose,
    load_prompts,
    prompt_items,
    prompt_token_ids,
    synthetic_prompts,
)
from specdec.workload.requests import Requests
from specdec.workload.sessions import SessionShape, SessionSource, multi_turn
from specdec.workload.sources import ClosedLoop, RequestSource, SyntheticSource, TraceSource, collect
from specdec.workload.tasks import TaskClass, TaskMix
from specdec.workload.trace_formats import TRACE_FORMATS, TraceFormat
from specdec.workload.traces import load_trace

__all__ = [
    "AZURE_SERVICES",
    "PROCESSES",
    "TASKS",
    "TRACE_FORMATS",
    "AllAtOnce",
    "ArrivalProcess",
    "ClosedLoop",
    "Diurnal",
    "EmpiricalLengths",
    "FixedLengths",
    "Gamma",
    "LengthDistribution",
    "LengthErrors",
    "LognormalLengths",
    "Messages",
    "Mmpp",
    "Poisson",
    "PromptItem",
    "QuantileLengths",
    "Quantiles",
    "RequestSource",
    "Requests",
    "SessionShape",
    "SessionSource",
    "SyntheticSource",
    "TaskClass",
    "TaskMix",
    "TraceFormat",
    "TraceSource",
    "Uniform",
    "arrival_chunks",
    "arrivals",
    "azure_like",
    "builtin_prompts",
    "choose",
    "collect",
    "fit_lengths",
    "length_errors",
    "load_prompts",
    "load_trace",
    "make_process",
    "multi_turn",
    "prompt_items",
    "prompt_token_ids",
    "synthetic_prompts",
]
