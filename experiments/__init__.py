"""One file per question, each with ``run(cfg, run)``; start one with ``python -m specdec.run +experiment=NAME``."""
