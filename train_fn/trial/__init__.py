"""The course of one trial: its probe, its steps, when it may end, and what came of it."""
