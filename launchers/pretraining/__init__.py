"""Parts of a language-model pre-training job: text, tokens, models, engines, checkpoints."""
