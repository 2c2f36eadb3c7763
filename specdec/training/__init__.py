"""Training of learned drafters, by distillation from the target.

``corpus``: answers and what the target makes of them, on disk. ``generate``: the target's own questions and answers.
``teacher``: the target over given tokens. ``batches``, ``loss``, ``trainer``: training. ``learners`` and ``student``:
what is trained, and its acceptance on held-out answers.
"""
