"""Components of the language-model pre-training job: data, models, engines, checkpoints."""
