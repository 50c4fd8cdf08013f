"""The words that all packages share, and what is computed from them alone. Standard library only."""
