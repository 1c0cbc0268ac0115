"""The doors of other training libraries: what their users write, and what they are spared."""
