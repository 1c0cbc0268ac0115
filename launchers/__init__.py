"""Training jobs and their launch scripts; part of the repository, not of the wheel."""
