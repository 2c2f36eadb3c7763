"""Training: the corpus on disk, the loss, alignment, overfitting, and checkpoints that resume to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from specdec import SamplingParams
from specdec.heads import unroll
from specdec.heads.borrowed import Borrowed, frequent_tokens
from specdec.heads.eagle import EagleHead, EagleShape
from specdec.heads.files import rotary_of
from specdec.heads.medusa import MedusaHeads
from specdec.model.weights import load_model
from specdec.training.batches import Batch
from specdec.training.corpus import Answer, Corpus, Taught
from specdec.training.learners import EagleLearner, MedusaLearner, acceptance, anchors_of
from specdec.training.loss import Targets, acceptance_overlap, agreement, distillation_loss, rank_hits
from specdec.training.student import Student, StudentLearner, save_student
from specdec.training.trainer import Recipe, Trainer
from tests.helpers.heads import (
    borrowed_of,
    make_batches,
    packed_hidden,
    plain_llm,
    teacher_of,
    tiny_corpus,
    tiny_eagle,
    tiny_prompts,
    train,
)
from tests.helpers.models import tiny_model_dir

GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_llama_dir):
    return plain_llm(tiny_llama_dir)


@pytest.fixture(scope="module")
def corpus(llm, tmp_path_factory) -> Corpus:
    return tiny_corpus(llm, tmp_path_factory.mktemp("corpus"), (1, 2, 3))


def test_what_generating_recorded_is_what_the_teacher_computes(llm, corpus):
    """The features and laws of the very steps that made an answer, against passes over the finished text."""
    teacher = teacher_of(llm, corpus)
    for index in (0, 5, 11):
        answer = corpus.answers[index]
        hidden, (ids, probs) = corpus.hidden(index), corpus.teacher(index)
        taught = teacher.teach(answer)
        assert torch.allclose(hidden.float(), taught.hidden.float(), rtol=2e-2, atol=2e-2)
        assert (ids[:, 0] == answer.tokens[answer.num_prompt :]).all(), (
            "greedy answers are the teacher's first choice"
        )
        assert ids.shape == (24, corpus.top_k)
        assert np.allclose(probs, taught.top_probs, atol=1e-4)
        assert (np.diff(probs, axis=1) <= 0).all() and (probs.sum(1) <= 1.0 + 1e-5).all()
        exact = packed_hidden(llm, answer.tokens, corpus.layers)
        assert torch.allclose(hidden[:, :-1].float(), exact[:, :-1], rtol=2e-2, atol=2e-2)
        assert torch.equal(teacher.hidden(answer), taught.hidden)


def test_recording_survives_preemption(tiny_llama_dir, tmp_path, corpus):
    llm = plain_llm(tiny_llama_dir, num_blocks=9, max_num_seqs=6, watermark=0.0)
    again = tiny_corpus(llm, tmp_path, corpus.layers)
    by_key = {answer.key: index for index, answer in enumerate(again.answers)}
    for index, answer in enumerate(corpus.answers):
        other = by_key[answer.key]
        assert again.answers[other].tokens == answer.tokens
        assert torch.allclose(again.hidden(other).float(), corpus.hidden(index).float(), rtol=2e-2, atol=2e-2)
        assert np.allclose(again.teacher(other)[1], corpus.teacher(index)[1], atol=1e-4)


def random_taught(rng: np.random.Generator, length: int, num_answer: int) -> Taught:
    hidden = torch.from_numpy(rng.standard_normal((2, length, 8), dtype=np.float32)).bfloat16()
    ids = rng.integers(0, 50, (num_answer, 4)).astype(np.int32)
    return Taught(hidden, ids, rng.random((num_answer, 4), dtype=np.float32))


def test_a_corpus_keeps_what_an_interrupt_leaves(tmp_path):
    rng, taught = np.random.default_rng(0), []
    corpus = Corpus(tmp_path, (0, 1), 8, 4, 12 * 2 * 8 * 2, "target")
    for index, length in enumerate((6, 9, 5)):
        answer = Answer(tokens=tuple(range(length)), num_prompt=2, key=str(index), held_out=index == 1)
        taught.append(random_taught(rng, length, length - 2))
        corpus.append(answer, taught[-1])
    corpus.close()
    for name, cut in (
        ("answers.jsonl", b'{"tokens": [1, 2'),
        ("hidden.bin", b"\0" * 5),
        ("teacher.bin", b"\1" * 9),
    ):
        with (tmp_path / name).open("ab") as file:
            file.write(cut)
    corpus = Corpus(tmp_path, (0, 1), 8, 4, 12 * 2 * 8 * 2, "target")
    assert [answer.held_out for answer in corpus.answers] == [False, True, False]
    assert corpus.num_tokens == 4 + 7 + 3
    assert corpus.hidden(1) is None, "beyond the budget of 12 tokens"
    fourth = random_taught(rng, 4, 1)
    corpus.append(Answer(tokens=(1, 2, 3, 4), num_prompt=3, key="3"), fourth)
    for index, one in enumerate([*taught, fourth]):
        if index != 1:
            stored = corpus.hidden(index)
            assert stored is None if index == 3 else torch.equal(stored, one.hidden)
        ids, probs = corpus.teacher(index)
        assert (ids == one.top_ids).all() and (probs == one.top_probs).all()
    with pytest.raises(ValueError, match=r"holds answers for .*'top_k': 4.*give another directory"):
        Corpus(tmp_path, (0, 1), 8, 5, 1000, "target")


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("count", [6, 64, 150])
def test_the_loss_and_its_gradient_are_those_of_cross_entropy(count, softcap):
    """Over a law of the first ten of twelve tokens, with an offset; the formula is torch's."""
    generator = torch.Generator().manual_seed(count)
    head, offset = (torch.randn(size, generator=generator) for size in ((12, 8), (12,)))
    normed = torch.randn(count, 8, generator=generator, requires_grad=True)
    law = torch.randn(count, 10, generator=generator).softmax(-1)
    probs, places = law.topk(10, dim=-1)
    scores = normed @ head.T
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    expected = F.cross_entropy(scores + offset, F.pad(law, (0, 2)), reduction="none")
    found = distillation_loss(normed, head, Targets(places, probs), offset=offset, softcap=softcap)
    assert torch.allclose(found, expected, atol=1e-5)
    weights = torch.randn(count, generator=generator)
    ours, theirs = (torch.autograd.grad(loss @ weights, normed)[0] for loss in (found, expected))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_tokens_that_cannot_be_drafted_neither_count_nor_teach():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 10, generator=generator)
    law = torch.randn(6, 10, generator=generator).softmax(-1)
    probs, places = law.topk(10, dim=-1)
    assert torch.allclose(
        acceptance_overlap(logits, Targets(places, probs)),
        torch.minimum(law, logits.softmax(-1)).sum(-1),
        atol=1e-6,
    )
    outside = Targets(torch.full((6, 10), -1), probs)
    identity = torch.eye(10)
    normed = logits.clone().requires_grad_()
    loss = distillation_loss(normed, identity, outside)
    assert loss.abs().max() == 0.0 and torch.autograd.grad(loss.sum(), normed)[0].abs().max() == 0.0
    half = Targets(torch.where(places < 5, places, -1), probs)
    kept = half.probs * (half.places >= 0)
    expected = -(kept * logits.log_softmax(-1).gather(1, half.places.clamp_min(0))).sum(-1)
    assert torch.allclose(distillation_loss(normed, identity, half), expected, atol=1e-5)
    assert not agreement(logits, outside).any()
    best = Targets(logits.topk(3).indices[:, 1:2], torch.ones(6, 1))
    assert rank_hits(logits, best, 3).tolist() == [[False, True, False]] * 6
    sharp = Targets(places, probs).sharpened(0.5).probs
    assert torch.allclose(sharp, law.topk(10).values.square() / law.square().sum(-1, keepdim=True))


def toy_batch(model, lengths: tuple[int, ...], ahead: int, seed: int) -> tuple[Batch, Borrowed]:
    """Random tokens whose hidden state tells the token ``ahead`` places on; each is the certain next token."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    borrowed = Borrowed(model, torch.arange(config.vocab_size))
    sequences = [torch.randint(0, config.vocab_size, (length,), generator=generator) for length in lengths]
    packed = unroll.Packed.of(sequences)
    hidden = torch.cat([borrowed.embedding(torch.roll(tokens, -ahead)) for tokens in sequences])
    rows = torch.cat([torch.arange(a + 3, b - 1) for a, b in packed.spans])
    place_of = torch.full_like(packed.tokens, -1)
    place_of[rows] = torch.arange(rows.numel())
    targets = Targets(packed.tokens[rows + 1][:, None], torch.ones(rows.numel(), 1))
    return Batch(packed, hidden[None], rows, place_of, targets), borrowed


@pytest.mark.parametrize(("ahead", "learns"), [(2, True), (1, False)])
def test_a_feature_is_paired_with_the_token_after_it(ahead, learns, tiny_llama_dir):
    """f_t, with token t + 1, predicts token t + 2: random tokens are known from that feature alone."""
    model = load_model(tiny_llama_dir, dtype=torch.float32)
    head = EagleHead(EagleShape.of(model.config, "eagle1"), rotary_of(model.config))
    head.reset(0)
    batch, borrowed = toy_batch(model, (400, 200), ahead, seed=1)
    held_out, _ = toy_batch(model, (90,), ahead, seed=2)
    learner = EagleLearner(head, borrowed, unroll_steps=0, unknown_share=0.0)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for step in range(50):
        optimizer.zero_grad()
        learner.loss(batch, torch.Generator().manual_seed(step)).backward()
        optimizer.step()
    rate = acceptance(learner, [held_out], 1).greedy[0]
    assert (rate > 0.95) is learns and (rate < 0.2) is not learns, rate


def test_unrolled_steps_see_what_drafting_will(llm, corpus):
    """A chain's outputs from one anchor equal those of a head that is fed entry by entry."""
    head = tiny_eagle(llm, "eagle3")
    borrowed = borrowed_of(llm, corpus)
    batch = make_batches(corpus, borrowed).load([0, 1, 2])
    entries = unroll.forward(head, borrowed, batch.packed, batch.hidden, batch.rows)
    anchors = anchors_of(batch, 3)[::7]
    output = entries.outputs[batch.place_of[anchors]]
    outputs = list(unroll.chains(head, borrowed, batch.packed, entries, anchors, output, 3))
    starts = torch.tensor([a for a, _ in batch.packed.spans])
    for place, anchor in enumerate(anchors.tolist()):
        first = int(starts[starts <= anchor].max())
        k, v = entries.k[first : anchor + 1], entries.v[first : anchor + 1]
        last = output[place : place + 1]
        for step in range(3):
            at = anchor + step + 1
            x = head.inputs(borrowed.embedding(batch.packed.tokens[at : at + 1]), head.own_features(last))
            q, own_k, own_v = head.project(x, batch.packed.positions[at : at + 1])
            k, v = torch.cat([k, own_k]), torch.cat([v, own_v])
            attended = F.scaled_dot_product_attention(
                q.transpose(0, 1),
                k.repeat_interleave(2, 1).transpose(0, 1),
                v.repeat_interleave(2, 1).transpose(0, 1),
            )
            last = head.finish(x, attended.transpose(0, 1))
            assert torch.allclose(outputs[step][place], last[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["eagle1", "eagle3", "medusa", "student"])
def test_a_tiny_set_is_overfitted(kind, tmp_path):
    model_dir = tiny_model_dir("qwen2", tmp_path, num_hidden_layers=3, rope_parameters={"rope_theta": 1e4})
    llm = plain_llm(model_dir)
    model, last = llm.runner.model, llm.runner.config.num_layers - 1
    corpus = tiny_corpus(llm, tmp_path / "corpus", (0, 1, last) if kind == "eagle3" else (last,), count=5)
    borrowed = borrowed_of(llm, corpus)
    if kind == "medusa":
        learner = MedusaLearner(MedusaHeads(2, model.config.hidden_size), borrowed, sharpness=0.1)
    elif kind == "student":
        learner = StudentLearner(Student(model, 1), borrowed, num_sampled=32, sharpness=0.1)
    else:
        learner = EagleLearner(
            tiny_eagle(llm, kind), borrowed, unroll_steps=1, anchor_share=1.0, sharpness=0.1
        )
    batches = make_batches(corpus, borrowed)
    before = acceptance(learner, batches, 2).greedy
    train(learner, batches, tmp_path, 80)
    after = acceptance(learner, batches, 2)
    assert min(after.greedy) > (0.75 if kind == "medusa" else 0.9), (before, after.greedy)
    assert after.greedy[0] > before[0] + 0.05
    assert after.tau == pytest.approx(1 + after.greedy[0] + after.greedy[0] * after.greedy[1])
    if kind == "student":
        save_student(tmp_path / "student", learner.student, model, {"seed": 0})
        drafter = {"name": "draft_model", "model": str(tmp_path / "student")}
        drafted = plain_llm(model_dir, drafter=drafter, num_drafts=2)
        answer = corpus.answers[0]
        out = drafted.generate([list(answer.tokens[: answer.num_prompt])], GREEDY)[0]
        assert out.token_ids == list(answer.tokens[answer.num_prompt :][:16])
        assert out.num_accepted > 0.6 * out.num_drafted


def test_training_resumes_to_the_bit(llm, corpus, tmp_path):
    def trainer(directory: Path, **changes) -> Trainer:
        borrowed = borrowed_of(llm, corpus)
        learner = EagleLearner(tiny_eagle(llm, "eagle3"), borrowed, unroll_steps=1)
        recipe = replace(Recipe(num_steps=7, seed=3), **changes)
        return Trainer(learner, make_batches(corpus, borrowed), recipe, directory / "state.safetensors")

    straight = trainer(tmp_path / "straight")
    losses = [straight.step() for _ in range(7)]
    parts = []
    for count in (2, 4, 1):
        part = trainer(tmp_path / "parts")
        parts += [part.step() for _ in range(count)]
        part.save()
    assert parts == losses
    assert part.progress.step == 7 and part.is_done
    assert part.progress.tokens == straight.progress.tokens
    straight.save()
    for name, weight in straight.learner.module.named_parameters():
        assert torch.equal(weight, dict(part.learner.module.named_parameters())[name]), name
    assert Trainer(part.learner, part.batches, part.recipe, part.checkpoint).is_done
    with pytest.raises(ValueError, match=r"was written with .*use the same options"):
        trainer(tmp_path / "parts", learning_rate=1.0)


def test_hidden_states_beyond_the_budget_are_computed_again(llm, tmp_path):
    corpus = tiny_corpus(llm, tmp_path, (1, 2, 3), count=4, budget_bytes=3 * 2 * 48 * 40)
    missing = [corpus.hidden(index) is None for index in range(4)]
    assert any(missing) and not all(missing)
    borrowed = borrowed_of(llm, corpus)
    batches = make_batches(corpus, borrowed)
    batches._teacher = teacher_of(llm, corpus)
    hidden = batches.load([0, 1, 2]).hidden
    lengths = [len(corpus.answers[index].tokens) for index in range(3)]
    for index, part in enumerate(hidden.split(lengths, dim=1)):
        exact = packed_hidden(llm, corpus.answers[index].tokens, corpus.layers)
        assert torch.allclose(part[:, :-1], exact[:, :-1], rtol=2e-2, atol=2e-2)


def test_the_draft_vocabulary_is_what_answers_use():
    answers = [[7, 7, 9], [9, 9, 3]]
    assert frequent_tokens(answers, 2).tolist() == [7, 9]
    assert frequent_tokens(answers, 3, always=[20]).tolist() == [7, 9, 20]
    assert frequent_tokens(answers, 6).tolist() == [0, 1, 2, 3, 7, 9]


def test_shapes_and_their_errors(llm):
    config = llm.runner.config
    head = tiny_eagle(llm, "eagle3")
    assert head.shape.layers == (1, 2, 3)
    hidden = torch.randn(3, 5, config.hidden_size)
    features = head.features(hidden)
    x = head.inputs(torch.randn(5, config.hidden_size), features)
    q, k, v = head.project(x, torch.arange(5))
    assert features.shape == x.shape == head.finish(x, q).shape == (5, config.hidden_size)
    assert (q.shape, k.shape, v.shape) == ((5, 4, 12), (5, 2, 12), (5, 2, 12))
    assert list(unroll.Packed.of([torch.arange(3), torch.arange(2)]).spans) == [(0, 3), (3, 5)]
    heads = MedusaHeads(2, config.hidden_size)
    assert torch.equal(heads(features), features.expand(2, -1, -1)), "heads start as the identity"
    for arguments, message in [
        (("eagle2",), "unknown EAGLE variant 'eagle2'"),
        (("eagle1", (1,)), "eagle1 reads the last layer, 3"),
        (("eagle3", (1, 9)), r"layers=\[1, 9\] must be distinct and lie in 0\.\.3"),
    ]:
        with pytest.raises(ValueError, match=message):
            EagleShape.of(config, *arguments)
    with pytest.raises(ValueError, match="num_heads=0 must be"):
        MedusaHeads(0, 8)
    with pytest.raises(ValueError, match="not all in"):
        Borrowed(llm.runner.model, torch.tensor([5, 400]))
    with pytest.raises(ValueError, match="a student of 9 layers: the target has 4"):
        Student(llm.runner.model, 9)
    with pytest.raises(ValueError, match="cannot be exported: train an eagle head"):
        Student(llm.runner.model, 1)


def test_calibration_gives_every_dimension_the_same_spread(llm):
    head = tiny_eagle(llm, "eagle3")
    hidden = torch.randn(3, 400, 48) * torch.logspace(-2, 3, 48) + 5.0
    head.calibrate(hidden)
    with torch.no_grad():
        normed = F.rms_norm(hidden, (48,), eps=head.shape.norm_eps)
        scaled = normed * head.feature_scale[:, None] + head.feature_shift[:, None]
    assert scaled.mean(1).abs().max() < 1e-3
    assert (scaled.std(1) - 1.0).abs().max() < 0.35, "but for dimensions that hardly vary"


def test_prompts_of_every_form(tmp_path, llm):
    import gzip

    from specdec.training.questions import make_questions, text_windows, training_prompts

    (tmp_path / "plain.jsonl").write_text('{"prompt": "Say hi.", "task": "chat"}\n')
    (tmp_path / "seed.jsonl").write_text(
        '{"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}, {"input": "", "output": "?"}]}\n'
    )
    (tmp_path / "sample.jsonl.gz").write_bytes(gzip.compress(b'{"source": "x", "prompt": "Why?"}\n\n'))
    assert training_prompts(str(tmp_path / "plain.jsonl"))[0].task == "chat"
    seeds = training_prompts(str(tmp_path / "seed.jsonl"))
    assert [item.prompt[0]["content"] for item in seeds] == ["Add.\n\n1 2", "Add."]
    assert training_prompts(str(tmp_path / "sample.jsonl.gz"))[0].task == "sample"
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n{"other": 1}\n'))
    with pytest.raises(ValueError, match=r"bad\.jsonl\.gz, line 2"):
        training_prompts(str(tmp_path / "bad.jsonl.gz"))
    with pytest.raises(ValueError, match="does not exist: give JSON lines"):
        training_prompts(str(tmp_path / "none.jsonl"))

    items = training_prompts("builtin")
    questions = make_questions(items, llm.tokenizer, rounds=2, max_prompt=400, num_held_out=4, seed=0)
    held = [question for question in questions if question.held_out]
    assert questions[: len(held)] == held and len(held) == 4
    assert len({question.key for question in questions}) == len(questions)
    assert sum(question.key.endswith("/1") for question in questions) == (len(questions) - 4) // 2
    with pytest.raises(ValueError, match=r"0 of 46 prompts have at most 2 tokens"):
        make_questions(items, llm.tokenizer, rounds=1, max_prompt=2, num_held_out=4, seed=0)
    (tmp_path / "text.txt").write_text("the quick brown fox " * 60)
    windows = text_windows(str(tmp_path / "text.txt"), llm.tokenizer, 64, 3)
    assert all(len(window.tokens) == 64 and window.num_prompt == 1 for window in windows)
    assert 0 < sum(window.held_out for window in windows) <= len(windows) // 4
    with pytest.raises(ValueError, match="give a text of at least 128"):
        (tmp_path / "short.txt").write_text("hi")
        text_windows(str(tmp_path / "short.txt"), llm.tokenizer, 64, 3)


def test_tiny_prompts_differ():
    assert len({tuple(prompt) for prompt in tiny_prompts(12)}) == 12
