"""The code that decides, shared by the engine and the simulator. Imports numpy and nothing heavier.

A serving step is *plan, execute, commit*. :class:`StepLoop` plans (``begin``) and commits; executing is
somebody else's business: ``specdec.engine`` does it on a device, ``sim`` in virtual time. Life of a request::

    submit ──► WAITING ──admit──► RUNNING ──commit(finished)──► FINISHED
                  ▲                  │
                  └──── preempt ─────┘   (blocks freed, tokens recomputed on re-admission)
"""

from specdec.scheduler.blocks import BlockPool, hash_blocks
from specdec.scheduler.cruise import Cruise, CruisePlan, Ended
from specdec.scheduler.limits import SchedulerConfig
from specdec.scheduler.loop import StepLoop
from specdec.scheduler.plan import StepOutcome, StepPlan
from specdec.scheduler.policy import ORDERS, POLICIES, BatchPolicy, make_policy
from specdec.scheduler.request import Request, RequestState, SamplingParams
from specdec.scheduler.speculation import CONTROLLERS, SpeculationController, make_controller
from specdec.scheduler.table import RequestTable

__all__ = [
    "CONTROLLERS",
    "ORDERS",
    "POLICIES",
    "BatchPolicy",
    "BlockPool",
    "Cruise",
    "CruisePlan",
    "Ended",
    "Request",
    "RequestState",
    "RequestTable",
    "SamplingParams",
    "SchedulerConfig",
    "SpeculationController",
    "StepLoop",
    "StepOutcome",
    "StepPlan",
    "hash_blocks",
    "make_controller",
    "make_policy",
]
