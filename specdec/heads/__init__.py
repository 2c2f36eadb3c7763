"""Heads that draft from the target's own hidden states, as torch modules: trained here, run by ``specdec.drafter``.

``borrowed``: what a head takes from its target. ``eagle``: one decoder layer over features. ``medusa``: residual
blocks. ``files``: safetensors with their meta data. ``runner``: a head over a paged KV cache.
"""
