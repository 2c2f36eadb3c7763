"""What a head borrows from its target and neither stores nor trains: embedding, final norm, rows of the LM head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.heads.linear import linear
from specdec.model.weights import LoadedModel


class Borrowed:
    """The target's embedding, final norm and LM head, the head restricted to a draft vocabulary.

    A step of the target multiplies with V rows of its LM head; a draft that may only be one of D frequent tokens needs
    D of them (FR-Spec, arXiv 2502.14856, section 3). Legend: N rows, H hidden size, V vocabulary, D draft vocabulary.

    Args:
        model: the target, with its weights.
        token_ids: int64 [D], rising: the tokens that can be drafted.
        dtype: of the LM head's rows and of the norm; the embedding keeps the model's.

    Attributes:
        token_ids: int64 [D].
        places: int64 [V], a token's place in ``token_ids``, or −1.

    Raises:
        ValueError: token ids that do not fit the target's vocabulary.
    """

    def __init__(
        self,
        model: LoadedModel,
        token_ids: Tensor,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        config, weights = model.config, model.weights
        if not weights:
            raise ValueError(f"the weights of {model.source!r} were released: load the model again")
        if (
            token_ids.numel() == 0
            or not 0 <= int(token_ids.min()) <= int(token_ids.max()) < config.vocab_size
        ):
            raise ValueError(
                f"the draft vocabulary has {token_ids.numel()} tokens that are not all in 0..{config.vocab_size - 1}: "
                f"was the head trained for another target than {model.source!r}?"
            )
        self.token_ids = token_ids.to(device)
        self.places = torch.full((config.vocab_size,), -1, device=device)
        self.places[self.token_ids] = torch.arange(token_ids.numel(), device=device)
        self.embed = weights["embed"].to(device)
        self.norm_weight = (weights["final_norm"].float() + config.norm_offset).to(device, dtype)
        self.lm_head = weights.get("lm_head", weights["embed"])[token_ids].to(device, dtype)
        self._copy: Tensor | None = None
        self.norm_eps, self.logit_softcap = config.norm_eps, config.logit_softcap

    def lm_head_in(self, dtype: torch.dtype) -> Tensor:
        """The LM head's rows in another dtype; the last such copy is kept."""
        if dtype != self.lm_head.dtype and (self._copy is None or self._copy.dtype != dtype):
            self._copy = self.lm_head.to(dtype)
        return self.lm_head if dtype == self.lm_head.dtype or self._copy is None else self._copy

    def embedding(self, token_ids: Tensor) -> Tensor:
        """Token embeddings [N, H] in the norm's dtype, without the target's scale: heads normalise them."""
        return F.embedding(token_ids, self.embed).to(self.norm_weight.dtype)

    def normed(self, hidden: Tensor) -> Tensor:
        """The final norm of [N, H], in float32."""
        return F.rms_norm(hidden.float(), hidden.shape[-1:], self.norm_weight.float(), self.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states [N, H] before the final norm, float32 [N, D]."""
        return self.head(self.normed(hidden))

    def head(self, normed: Tensor) -> Tensor:
        """Logits of normed hidden states [N, H], float32 [N, D]."""
        logits = linear(normed.to(self.lm_head.dtype), self.lm_head).float()
        cap = self.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def frequent_tokens(answers: Iterable[Iterable[int]], size: int, always: Iterable[int] = ()) -> Tensor:
    """The draft vocabulary: ``always``, then the most frequent tokens of ``answers``, then the lowest token ids.

    BPE ids rise as merges get rarer, so low ids fill up best where answers are few.

    Returns:
        int64 [size], rising.
    """
    counts = Counter(token for answer in answers for token in answer)
    ranked = sorted(counts, key=lambda token: (-counts[token], token))
    chosen: dict[int, None] = dict.fromkeys(always)
    for token in ranked:
        chosen[token] = None
    token = 0
    while len(chosen) < size:
        chosen[token] = None
        token += 1
    return torch.tensor(sorted(list(chosen)[:size]))
