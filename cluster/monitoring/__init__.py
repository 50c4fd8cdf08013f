"""Figures for others to watch: Ray's metrics, and trackers such as MLflow."""
