"""Components of a fine-tuning job with ``transformers.Trainer``: data, tasks, metrics, recording.

They are independent of AdaRankGrad's mathematics; ``launchers/finetune.py`` assembles them.
"""
