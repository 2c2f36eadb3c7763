"""Training of learned drafters, by distillation from the target.

``corpus``: answers and what the target makes of them, on disk. ``generate``: the target's own answers. ``teacher``: the
target over given tokens. ``batches``, ``loss``, ``trainer``: training. ``learners``: what is trained. ``evaluate``:
acceptance on held-out answers.
"""
