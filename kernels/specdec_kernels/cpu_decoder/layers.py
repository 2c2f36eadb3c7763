"""For draft heads: a C++ decoder that is given hidden states instead of token ids, and what these are made of."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec_kernels.cpu_decoder.build import library
from specdec_kernels.cpu_decoder.decoder import CpuDecoder, CpuKVCache, DecoderSpec, Packer


class CpuLayers(CpuDecoder):
    """Layers, final norm and head; the rows of its embedding are whatever each step feeds.

    Args:
        spec, weights, flavour: as of :class:`CpuDecoder`, with an ``lm_head`` and without an ``embed``.
    """

    def __init__(self, spec: DecoderSpec, weights: Mapping[str, Tensor], flavour: str | None = None) -> None:
        embed = torch.zeros(1, spec.hidden_size)
        super().__init__(spec, {**weights, "embed": embed}, flavour)

    def forward_hidden(
        self,
        inputs: Tensor,
        positions: NDArray[np.int64],
        query_start: NDArray[np.int32],
        context_lens: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        slot_mapping: NDArray[np.int64],
        logit_rows: NDArray[np.int64],
        kv_cache: CpuKVCache,
        tree_mask: NDArray[np.int64] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`CpuDecoder.forward`, of the first layer's ``inputs`` [T, hidden_size], rounded to bfloat16.

        Returns:
            logits float32 [N, vocab_size], and the last layer's outputs float32 [T, hidden_size].
        """
        rounded = inputs.to(torch.bfloat16).contiguous()
        self._model.embed = rounded.data_ptr()
        outputs = torch.empty(inputs.shape, dtype=torch.float32)
        logits = self.forward(
            np.arange(inputs.shape[0]),
            positions,
            query_start,
            context_lens,
            block_tables,
            slot_mapping,
            logit_rows,
            kv_cache,
            capture=[self.spec.num_layers - 1],
            captured=outputs[None],
            tree_mask=tree_mask,
        )
        return logits, outputs

    def _check(
        self, longs: list[NDArray[np.int64]], ints: list[NDArray[np.int32]], kv_cache: CpuKVCache
    ) -> None:
        # What stands for token ids are rows of the inputs, which the head's vocabulary does not bound.
        token_ids, *others = longs
        super()._check([np.zeros_like(token_ids), *others], ints, kv_cache)


class _HeadFront(ctypes.Structure):
    _fields_ = (
        [
            (name, ctypes.c_void_p)
            for name in "fuse mix embed scale shift unknown embed_norm feature_norm".split()
        ]
        + [(name, ctypes.c_int32) for name in ("hidden", "num_layers")]
        + [("norm_eps", ctypes.c_float)]
    )


class _FrontStep(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in "token_ids hidden known x".split()] + [
        (name, ctypes.c_int32) for name in "num_tokens is_feature num_threads".split()
    ]


class CpuHeadInputs:
    """The inputs of a draft head's layer, in one call; the formulas are in ``head_inputs.hpp``.

    Legend: T tokens, L captured layers, H hidden size (a multiple of 32), V vocabulary.

    Args:
        weights: ``fuse`` [H, L·H] (absent where L is 1 and features are the scaled states themselves), ``mix`` [H, 2H],
            ``embed`` [V, H], ``feature_scale`` and ``feature_shift`` [L, H], ``unknown``, ``embed_norm`` and
            ``feature_norm`` [H]. Matrices are rounded to bfloat16. All but an ``embed`` in bfloat16 are copied.
        norm_eps: of all norms.
        flavour: as of :class:`CpuDecoder`.
    """

    def __init__(self, weights: Mapping[str, Tensor], norm_eps: float, flavour: str | None = None) -> None:
        self._lib = library(flavour)
        self.num_layers, self.hidden_size = weights["feature_scale"].shape
        assert self.hidden_size % 32 == 0 and ("fuse" in weights or self.num_layers == 1)
        matrices = [weights[name] for name in ("fuse", "mix") if name in weights]
        self._packer = Packer(2 * sum(matrix.numel() for matrix in matrices))
        vectors = "feature_scale feature_shift unknown embed_norm feature_norm".split()
        self._kept = [weights[name].float().contiguous().clone() for name in vectors]
        self._embed = weights["embed"].to(torch.bfloat16).contiguous()
        self._front = _HeadFront(
            self._packer.add(weights["fuse"]) if "fuse" in weights else None,
            self._packer.add(weights["mix"]),
            self._embed.data_ptr(),
            *(tensor.data_ptr() for tensor in self._kept),
            self.hidden_size,
            self.num_layers,
            norm_eps,
        )
        self._workspace = self._lib.specdec_new_workspace()

    def __del__(self) -> None:
        if getattr(self, "_workspace", None):
            self._lib.specdec_free_workspace(self._workspace)

    def from_hidden(self, token_ids: NDArray[np.int64], hidden: Tensor, known: NDArray[np.bool_]) -> Tensor:
        """Inputs float32 [T, H] from the target's states float32 [L, T, H], where they are ``known`` [T]."""
        assert hidden.shape == (self.num_layers, token_ids.size, self.hidden_size)
        return self._run(token_ids, hidden, known, is_feature=False)

    def from_features(self, token_ids: NDArray[np.int64], features: Tensor) -> Tensor:
        """The same from features as they are, float32 [T, H]."""
        assert features.shape == (token_ids.size, self.hidden_size)
        return self._run(token_ids, features, np.ones(token_ids.size, np.bool_), is_feature=True)

    def _run(
        self, token_ids: NDArray[np.int64], hidden: Tensor, known: NDArray[np.bool_], is_feature: bool
    ) -> Tensor:
        x = torch.empty(token_ids.size, self.hidden_size)
        if token_ids.size == 0:
            return x
        assert token_ids.min() >= 0 and token_ids.max() < self._embed.shape[0], (
            "token id outside the vocabulary"
        )
        assert hidden.dtype == torch.float32 and known.shape == token_ids.shape
        token_ids, is_known = np.ascontiguousarray(token_ids, np.int64), np.ascontiguousarray(known, np.uint8)
        hidden = hidden.contiguous()
        step = _FrontStep(
            token_ids.ctypes.data,
            hidden.data_ptr(),
            is_known.ctypes.data,
            x.data_ptr(),
            token_ids.size,
            is_feature,
            torch.get_num_threads(),
        )
        self._lib.specdec_head_inputs(ctypes.byref(self._front), ctypes.byref(step), self._workspace)
        return x
