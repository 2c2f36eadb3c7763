"""The experiment train_draft, on a tiny target: what it leaves, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from experiments import draft_training
from specdec.config_training import DRAFT_KINDS
from specdec.drafter import make_drafter
from specdec.run import execute
from tests.helpers.models import tiny_model_dir
from tests.test_configs import build

SMALL = (
    "tracking=disabled",
    "model.dtype=float32",
    "engine.max_model_len=512",
    "engine.max_num_seqs=8",
    "sampling.max_tokens=12",
    "experiment.max_len=300",
    "experiment.max_tokens=16",
    "experiment.num_tokens=200",
    "experiment.num_held_out=3",
    "experiment.vocabulary=150",
    "experiment.top_k=12",
    "experiment.tokens_per_step=600",
    "experiment.num_steps=4",
    "experiment.num_evals=2",
    "experiment.num_drafts=3",
    "experiment.eval_prompts=2",
    "experiment.dtype=float32",
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return tiny_model_dir(
        "llama", tmp_path_factory.mktemp("target"), rope_parameters=rope, attention_bias=False
    )


def trained(model_dir: Path, directory: Path, *overrides: str) -> dict[str, Any]:
    config = build(*SMALL, f"model.name={model_dir}", *overrides, experiment="train_draft")
    return execute(config, directory, None)


@pytest.mark.parametrize("kind", DRAFT_KINDS)
def test_every_kind_is_trained_saved_and_measured(kind, model_dir, tmp_path, capsys):
    summary = trained(model_dir, tmp_path, f"experiment.kind={kind}", "experiment.num_layers=1")
    assert summary["status"] == "ok"
    assert summary["training"]["steps"] == 4
    assert summary["data"]["answer_tokens"] >= 150
    assert len(summary["acceptance"]["greedy"]) == 3 and 1.0 <= summary["acceptance"]["tau"] <= 4.0
    assert summary["speeds"]["generate_tok_s"] > 0 and summary["speeds"]["train_tok_s"] > 0
    modes = {
        "eagle1": ["chain", "tree"],
        "eagle3": ["chain", "tree"],
        "medusa": ["tree"],
        "student": ["chain"],
    }[kind]
    assert list(summary["engine"]) == ["plain", *modes]
    for mode in modes:
        assert summary["engine"][mode]["equal"] == "2/2"
        assert summary["engine"][mode]["tau"] >= 1.0
    plots = {path.name for path in (tmp_path / "plots").iterdir()}
    assert plots == {"learning_curve.png", "acceptance_by_position.png"}
    curve = json.loads((tmp_path / "tables" / "learning_curve.json").read_text())
    assert [point["step"] for point in curve] == [0, 2, 4]
    head = tmp_path / "head"
    if kind == "student":
        assert json.loads((head / "about.json").read_text())["acceptance"] == summary["acceptance"]
        assert json.loads((head / "config.json").read_text())["num_hidden_layers"] == 1
    else:
        about = json.loads((head / "head.json").read_text())
        assert about["kind"] == kind and about["target"]["hidden_size"] == 48
        assert "experiment.vocabulary=150" in about["about"]["command"]
        assert str(tmp_path) not in json.dumps(about["about"])
        weights = load_file(head / "head.safetensors")
        assert weights.pop("token_ids").shape == (150,)
        assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
        assert (
            make_drafter({"name": "medusa" if kind == "medusa" else "eagle", "path": str(head)}) is not None
        )
    assert "held-out prompts" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_to_the_same_head(model_dir, tmp_path, monkeypatch):
    """Interrupted while answering and again while training, it ends with the weights of a run that was not."""
    common = ["experiment.checkpoint_s=1e-9", f"experiment.work={tmp_path / 'work'}", "seed=3"]
    append, calls = draft_training.Corpus.append, []

    def interrupted_append(self, answer, taught):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(answer.key)
        append(self, answer, taught)

    with monkeypatch.context() as patch:
        patch.setattr(draft_training.Corpus, "append", interrupted_append)
        with pytest.raises(KeyboardInterrupt):
            trained(model_dir, tmp_path / "a", *common)
    step = draft_training.Trainer.step

    def interrupted_step(self):
        if self.progress.step == 2:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(draft_training.Trainer, "step", interrupted_step)
        with pytest.raises(KeyboardInterrupt):
            trained(model_dir, tmp_path / "b", *common)
    lines = (tmp_path / "work" / "corpus" / "answers.jsonl").read_text().splitlines()
    keys = [json.loads(line)["key"] for line in lines]
    assert keys[:5] == calls and len(set(keys)) == len(keys)
    summary = trained(model_dir, tmp_path / "c", *common)
    assert summary["training"]["steps"] == 4
    assert len((tmp_path / "work" / "corpus" / "answers.jsonl").read_text().splitlines()) == len(keys)

    # A run over the same answers, without interrupts.
    straight = tmp_path / "straight"
    (straight / "corpus").mkdir(parents=True)
    for path in (tmp_path / "work" / "corpus").iterdir():
        (straight / "corpus" / path.name).write_bytes(path.read_bytes())
    options = ["seed=3", f"experiment.work={straight}", f"experiment.num_tokens={1}"]
    again = trained(model_dir, tmp_path / "d", *options)
    assert again["acceptance"] == summary["acceptance"]
    ours, theirs = (load_file(tmp_path / name / "head" / "head.safetensors") for name in "cd")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_one_corpus_serves_all_kinds(model_dir, tmp_path):
    """Answers that were made for an eagle3 head also teach medusa heads and students, and none are added."""
    first = trained(
        model_dir, tmp_path / "a", f"experiment.work={tmp_path / 'work'}", "experiment.num_steps=1"
    )
    (tmp_path / "work" / "state.safetensors").unlink()
    for kind in ("medusa", "student"):
        options = [f"experiment.kind={kind}", "experiment.num_layers=1", "experiment.generate_share=0"]
        options += [f"experiment.work={tmp_path / 'work'}", "experiment.num_steps=1"]
        summary = trained(model_dir, tmp_path / kind, *options)
        assert summary["data"] == first["data"] and summary["training"]["steps"] == 1
        (tmp_path / "work" / "state.safetensors").unlink()


def test_the_target_writes_its_own_questions(model_dir, tmp_path):
    """The target is random: with one token in twelve for an end, its questions end."""
    talkative = tmp_path / "model"
    shutil.copytree(model_dir, talkative)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((talkative / name).read_text())
        (talkative / name).write_text(json.dumps({**settings, "eos_token_id": list(range(2, 320, 12))}))
    model_dir, work = talkative, tmp_path / "work"
    options = ["experiment.prompts=[self]", "experiment.num_self=40", f"experiment.work={work}"]
    summary = trained(model_dir, tmp_path / "a", *options, "experiment.max_len=120", "experiment.num_steps=1")
    rows = [json.loads(line) for line in (work / "questions.jsonl").read_text().splitlines()]
    assert sorted(row["number"] for row in rows) == list(range(40))
    texts = [row["text"] for row in rows if row["text"]]
    assert len(set(texts)) > 10, "they differ, and enough of them end by themselves"
    assert "experiment.prompts=['self']" in summary["command"]
    answers = [json.loads(line) for line in (work / "corpus" / "answers.jsonl").read_text().splitlines()]
    assert {answer["task"] for answer in answers} == {"self"} and len(answers) > 5
    again = trained(model_dir, tmp_path / "b", *options, "experiment.max_len=120", "experiment.num_steps=1")
    assert again["data"] == summary["data"], "nothing is asked or answered twice"
    with pytest.raises(ValueError, match="leaves no room for questions"):
        trained(model_dir, tmp_path / "c", *options[:2], "experiment.max_len=20")


def test_a_text_is_taught_as_it_stands(model_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the rain in Spain stays mainly in the plain; " * 40)
    options = [
        f"experiment.text={text}",
        "experiment.max_len=64",
        "experiment.kind=medusa",
        "experiment.num_heads=2",
    ]
    summary = trained(model_dir, tmp_path / "run", *options, "experiment.num_drafts=2")
    assert summary["speeds"]["teach_tok_s"] > 0
    assert "experiment.text=text.txt" in summary["command"]
    assert summary["data"]["answers"] >= 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment.kind=eagle2"], r"experiment\.kind.*did you mean eagle"),
        (["experiment.dtype=float16"], r"experiment\.dtype"),
        (["experiment.prompts=[]"], r"experiment\.prompts is empty"),
        (["experiment.vocabulary=0"], r"experiment\.vocabulary=0 must be"),
        (["experiment.anchor_share=2"], r"experiment\.anchor_share=2\.0 must lie in"),
        (["experiment.unroll_steps=-1"], r"experiment\.unroll_steps=-1 must be >= 0"),
        (["experiment.max_tokens=512"], r"leaves no room for prompts"),
        (
            ["experiment.kind=student", "experiment.layers=[1]"],
            r"is for experiment\.kind=eagle3, not student",
        ),
        (["experiment.learning=1"], r"experiment\.learning"),
    ],
)
def test_options_out_of_range_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        build(*overrides, experiment="train_draft")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment.prompts=[nowhere.jsonl]"], r"nowhere\.jsonl does not exist"),
        (["experiment.text=nowhere.txt"], r"nowhere\.txt does not exist"),
        (["engine.prefix_caching=true"], r"prefix_caching=true"),
        (["engine.max_model_len=200"], r"max_len=300 exceeds the engine's max_model_len=200"),
        (["experiment.layers=[0,9]"], r"layers=\[0, 9\] must be distinct"),
        (["experiment.kind=student", "experiment.num_layers=9"], r"a student of 9 layers"),
    ],
)
def test_what_does_not_fit_the_target_or_the_disk_is_refused(overrides, message, model_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        trained(model_dir, tmp_path, *overrides)
