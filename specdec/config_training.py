"""Schema of the experiment train_draft: one frozen dataclass, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field

from specdec.config_schemas import check_choice, check_positive, require

DRAFT_KINDS = ("eagle1", "eagle3", "medusa", "student")
TRAINING_DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class TrainDraftConfig:
    """What is trained, on what, and for how long; the methods are described in ``specdec.heads`` and
    ``specdec.training``.

    kind: eagle1, eagle3, medusa or student. output: directory of the result; null is ``head`` in the run's. work:
    directory of answers and checkpoints, by which an interrupted run goes on; null is ``work`` in the run's.

    prompts: "builtin", files of JSON lines, which may be gzipped, and "self": questions that the target writes
    in the user's place, at most num_self of them, in at most a fifth of the time for answers. text: a text file to be
    taught as it stands instead. rounds: answers per prompt; the first is greedy, the others are sampled at
    temperature. num_held_out: prompts for evaluation, at most a fifth of all. max_len: tokens of prompt and answer.
    max_tokens: of an answer.
    num_tokens: answer tokens after which generating ends; null is by time. engine.max_num_seqs are in work at once.

    budget_s: for all but the final evaluation; generate_share of it at most for the answers, the rest for training.
    vocabulary: tokens that can be drafted, the most frequent of the answers. top_k: likely tokens of the target that
    are learned from. cache_mb: hidden states on disk; beyond it they are computed again when needed.

    layers: of the target that an eagle3 head reads; null for a low, the middle and the last one. intermediate_size:
    of an eagle head's MLP; null is the target's. num_heads: of medusa. num_layers: of a student. unroll_steps,
    anchor_share, unknown_share, regression: see ``EagleLearner``. decay: weight of each further draft position; null is
    0.5 for eagle heads, 0.8 for medusa. sharpness: see ``EagleLearner``.

    learning_rate, weight_decay: of AdamW. num_steps: null is as many as fit the budget, in at most epochs passes over
    the answers. tokens_per_step: least tokens of a step. dtype: of matrix products; auto takes what is faster here.
    checkpoint_s: between checkpoints. num_evals: evaluations during training. num_drafts: draft positions that are
    evaluated. eval_prompts: held-out prompts of the engine's runs at the end."""

    name: str = "train_draft"
    kind: str = "eagle3"
    output: str | None = None
    work: str | None = None
    prompts: list[str] = field(default_factory=lambda: ["builtin"])
    num_self: int = 2000
    text: str | None = None
    rounds: int = 1
    temperature: float = 1.0
    num_held_out: int = 32
    max_len: int = 512
    max_tokens: int = 160
    num_tokens: int | None = None
    budget_s: float = 600.0
    generate_share: float = 0.5
    vocabulary: int = 8192
    top_k: int = 32
    cache_mb: int = 4096
    layers: list[int] | None = None
    intermediate_size: int | None = None
    num_heads: int = 4
    num_layers: int = 2
    unroll_steps: int = 3
    anchor_share: float = 0.25
    unknown_share: float = 0.1
    regression: float = 0.0
    decay: float | None = None
    sharpness: float = 1.0
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    num_steps: int | None = None
    epochs: int = 8
    tokens_per_step: int = 512
    dtype: str = "auto"
    checkpoint_s: float = 60.0
    num_evals: int = 8
    num_drafts: int = 5
    eval_prompts: int = 8

    def __post_init__(self) -> None:
        check_choice("experiment.kind", self.kind, DRAFT_KINDS)
        check_choice("experiment.dtype", self.dtype, TRAINING_DTYPES)
        require(len(self.prompts) > 0, "experiment.prompts is empty: give files, or [builtin]")
        positive = (
            "num_self rounds temperature num_held_out max_len max_tokens budget_s vocabulary top_k cache_mb"
        )
        positive += (
            " num_heads num_layers sharpness learning_rate epochs tokens_per_step checkpoint_s num_evals"
        )
        positive += " num_drafts eval_prompts"
        for name in positive.split():
            check_positive(f"experiment.{name}", getattr(self, name))
        for name in ("num_tokens", "intermediate_size", "num_steps"):
            if getattr(self, name) is not None:
                check_positive(f"experiment.{name}", getattr(self, name))
        for name in ("generate_share", "anchor_share", "unknown_share", "decay"):
            value = getattr(self, name)
            require(value is None or 0.0 <= value <= 1.0, f"experiment.{name}={value} must lie in [0, 1]")
        for name in ("unroll_steps", "regression", "weight_decay"):
            require(getattr(self, name) >= 0, f"experiment.{name}={getattr(self, name)} must be >= 0")
        require(
            self.max_tokens < self.max_len,
            f"experiment.max_tokens={self.max_tokens} leaves no room for prompts in max_len={self.max_len}",
        )
        require(
            self.kind == "eagle3" or self.layers is None,
            f"experiment.layers={self.layers} is for experiment.kind=eagle3, not {self.kind}",
        )
