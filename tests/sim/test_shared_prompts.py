"""What prompts have in common, without their texts: the same blocks get the same numbers, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.shared_prompts import KNOWN, PromptSharing, known_sharing, main, read_workload


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=8), st.integers(1, 4)
)
def test_blocks_have_equal_numbers_just_where_prompts_are_equal_up_to_their_ends(
    prompts: list[list[int]], block_size: int
):
    hashes = PromptSharing.of(prompts).block_hashes([len(prompt) for prompt in prompts], block_size)
    for prompt, own in zip(prompts, hashes, strict=True):
        assert len(own) == len(prompt) // block_size
        for other, others in zip(prompts, hashes, strict=True):
            for block, (mine, theirs) in enumerate(zip(own, others, strict=False)):
                stop = (block + 1) * block_size
                assert (mine == theirs) == (prompt[:stop] == other[:stop])


def test_a_workload_file_tells_its_lengths_and_what_is_shared(tmp_path: Path):
    rows = [
        {"input_tok_ids": [1, 2, 3], "input_toks": 3, "output_toks": 5},
        {"input_tok_ids": [1, 2, 4, 5], "input_toks": 4, "output_toks": 6},
    ]
    path = tmp_path / "w.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    sharing, lengths = read_workload(path)
    assert sharing.shared == ((1, 0, 2),) and sharing.source == "w.jsonl"
    assert lengths == [(3, 5), (4, 6)]


def test_a_workload_without_tokens_is_refused(tmp_path: Path):
    path = tmp_path / "w.jsonl"
    path.write_text('{"input_toks": 3, "output_toks": 5}\n')
    with pytest.raises(ValueError, match="line 1: input_tok_ids"):
        read_workload(path)
    with pytest.raises(ValueError, match="is no file"):
        read_workload(tmp_path / "nowhere.jsonl")


def test_the_printed_entry_is_what_is_known_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "w.jsonl"
    path.write_text('{"input_tok_ids": [7, 8], "output_toks": 1}\n{"input_tok_ids": [7], "output_toks": 1}\n')
    main([str(path)])
    (entry,) = json.loads(capsys.readouterr().out).values()
    assert entry == {"source": "w.jsonl", "num_requests": 2, "shared": [[1, 0, 1]]}


def test_what_is_shipped_can_be_read():
    hashes = list(json.loads(KNOWN.read_text()))
    assert len(hashes) >= 2
    for file_hash in hashes:
        sharing = known_sharing(file_hash)
        assert sharing is not None and sharing.num_requests == 300 and "github.com" in sharing.source
    assert known_sharing("0" * 64) is None and known_sharing(None) is None


def test_a_run_of_the_first_requests_has_their_sharing():
    prompts = [[1, 2], [3], [1, 2, 3], [3, 4], [1, 2, 3, 4]]
    for count in range(1, 6):
        assert PromptSharing.of(prompts).first(count) == PromptSharing.of(prompts[:count])
    with pytest.raises(ValueError, match="only 5"):
        PromptSharing.of(prompts).first(6)


def test_the_sharing_of_another_workload_is_refused():
    sharing = PromptSharing.of([[1, 2, 3], [1, 2, 3, 4]])
    with pytest.raises(ValueError, match="has 2 requests and the run 3"):
        sharing.block_hashes([3, 4, 5], 16)
    with pytest.raises(ValueError, match="sharing of another workload"):
        sharing.block_hashes([2, 4], 16)
    with pytest.raises(ValueError, match="name an earlier one"):
        PromptSharing(2, ((0, 1, 3),))
