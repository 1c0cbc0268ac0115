"""Entry points for other training libraries, and checks against their pitfalls."""
