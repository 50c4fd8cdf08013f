"""The course of one trial: its batches, its probe, its steps, and when it may end."""
