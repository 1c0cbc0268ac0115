"""Parts of a fine-tuning job with ``transformers.Trainer``: examples, tasks, metrics, its record.

Nothing here knows AdaRankGrad's mathematics; ``launchers/finetune.py`` puts these parts together.
"""
