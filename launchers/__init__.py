"""Training jobs and what starts them; beside the package, and not in its wheel."""
