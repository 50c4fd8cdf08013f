"""Tests, in the folders of what they test; started programs find them as `tests` from the root."""
