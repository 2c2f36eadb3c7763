"""Which prompts of a recorded workload begin alike: what a prefix cache makes of them, without their texts.

Request i shares its first ``tokens[i]`` tokens with an earlier request ``with_request[i]``, the earliest of those with
which it has the most in common. That is all there is to know: with whom else i shares, and how much, follows from
what that one shares.

The sharing of a few public workloads is in ``sim/data/shared_prompts.json`` under the SHA-256 of their files,
which bench runs record; ``python -m sim.shared_prompts WORKLOAD.jsonl`` prints such an entry.

>>> sharing = PromptSharing.of([[1, 2, 3, 4], [9, 9], [1, 2, 3, 5]])
>>> sharing.shared
((2, 0, 3),)
>>> [len(hashes) for hashes in sharing.block_hashes([4, 2, 4], block_size=2)]
[2, 1, 2]
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

KNOWN = Path(__file__).parent / "data" / "shared_prompts.json"


@dataclass(frozen=True)
class PromptSharing:
    """See the module.

    Attributes:
        num_requests: of the workload.
        shared: (request, earlier request, tokens in common) of each request that begins as an earlier one does.
        source: where this is from, for reports.

    Raises:
        ValueError: a request that shares with itself or with a later one, or less than a token.
    """

    num_requests: int
    shared: tuple[tuple[int, int, int], ...]
    source: str = ""

    def __post_init__(self) -> None:
        for request, earlier, tokens in self.shared:
            if not (0 <= earlier < request < self.num_requests and tokens >= 1):
                raise ValueError(
                    f"request {request} cannot share {tokens} tokens with request {earlier} of {self.num_requests}: "
                    "name an earlier one and at least one token"
                )

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], source: str = "") -> PromptSharing:
        """Of the token ids of every prompt."""
        children: list[dict[int, int]] = [{}]  # a trie of all prompts: token → node
        first: list[int] = [0]  # request that made each node
        shared: list[tuple[int, int, int]] = []
        for request, prompt in enumerate(prompts):
            node = depth = 0
            for token in prompt:
                following = children[node].get(token)
                if following is None:
                    break
                node, depth = following, depth + 1
            if depth:
                shared.append((request, first[node], depth))
            for token in prompt[depth:]:
                children[node][token] = node = len(children)
                children.append({})
                first.append(request)
        return cls(len(prompts), tuple(shared), source)

    def first(self, count: int) -> PromptSharing:
        """Of the first ``count`` requests, as a run of part of the workload has it.

        Raises:
            ValueError: more than there are.
        """
        if count > self.num_requests:
            raise ValueError(f"the run has {count} requests, its workload only {self.num_requests}")
        shared = tuple(each for each in self.shared if each[0] < count)
        return PromptSharing(count, shared, self.source)

    def block_hashes(self, prompt_lens: Sequence[int], block_size: int) -> list[list[int]]:
        """A number for every full block of every prompt; equal where the prompts are, up to there.

        Args:
            prompt_lens: tokens of each prompt, in the order of the workload.

        Raises:
            ValueError: lengths of another workload than this.
        """
        if len(prompt_lens) != self.num_requests:
            raise ValueError(
                f"the workload has {self.num_requests} requests and the run {len(prompt_lens)}: they must be the same"
            )
        with_earlier = {request: (earlier, tokens) for request, earlier, tokens in self.shared}
        found: list[list[int]] = []
        next_hash = 1
        for request, length in enumerate(prompt_lens):
            earlier, tokens = with_earlier.get(request, (0, 0))
            if tokens > min(length, prompt_lens[earlier]):
                raise ValueError(
                    f"request {request} of {length} tokens is said to share {tokens} with request {earlier} of "
                    f"{prompt_lens[earlier]}: this is the sharing of another workload"
                )
            common = found[earlier][: tokens // block_size] if tokens else []
            fresh = length // block_size - len(common)
            found.append(common + list(range(next_hash, next_hash + fresh)))
            next_hash += fresh
        return found


def read_workload(path: str | Path) -> tuple[PromptSharing, list[tuple[int, int]]]:
    """A workload in LLMServingSim's format (input_toks, output_toks, input_tok_ids), one request a line.

    Returns:
        The sharing, and the lengths of each request's prompt and answer.

    Raises:
        ValueError: no such file, or a request without its prompt's tokens.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file: give the workload that the run was fed with")
    prompts: list[list[int]] = []
    lengths: list[tuple[int, int]] = []
    for number, line in enumerate(path.read_text().splitlines()):
        if not line.strip():
            continue
        row = cast("dict[str, Any]", json.loads(line))
        ids = row.get("input_tok_ids")
        if not ids or "output_toks" not in row:
            raise ValueError(f"{path}, line {number + 1}: input_tok_ids and output_toks are needed")
        prompts.append(cast("list[int]", ids))
        lengths.append((len(ids), int(row["output_toks"])))
    return PromptSharing.of(prompts, path.name), lengths


def known_sharing(file_hash: str | None) -> PromptSharing | None:
    """That of a public workload, by the SHA-256 of its file; ``None`` where it is not known."""
    entries = cast("dict[str, dict[str, Any]]", json.loads(KNOWN.read_text()))
    entry = entries.get(file_hash or "")
    if entry is None:
        return None
    shared = tuple((int(i), int(j), int(tokens)) for i, j, tokens in entry["shared"])
    return PromptSharing(int(entry["num_requests"]), shared, str(entry["source"]))


def main(paths: Sequence[str]) -> None:
    """Print what ``KNOWN`` holds of workloads; source and licence are to be filled in by hand."""
    entries: dict[str, Any] = {}
    for path in paths:
        sharing, _ = read_workload(path)
        entries[hashlib.sha256(Path(path).read_bytes()).hexdigest()] = {
            "source": Path(path).name,
            "num_requests": sharing.num_requests,
            "shared": sharing.shared,
        }
    print(json.dumps(entries))


if __name__ == "__main__":
    main(sys.argv[1:])
