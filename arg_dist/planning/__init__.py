"""Estimates the memory and communication of a run by arithmetic, before anything is started."""
