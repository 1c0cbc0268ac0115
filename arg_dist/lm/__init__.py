"""Parts of a language-model training job: text, tokens, models, the loop's steps.

Nothing here knows AdaRankGrad's mathematics; the launchers put these parts together.
"""


class InputError(ValueError):
    """What the user gave cannot be used; the message is the one line he gets to read."""
