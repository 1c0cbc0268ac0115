"""Who holds what, and the only collectives of the optimizer."""
