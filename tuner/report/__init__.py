"""The report: one HTML file that shows a run, or compares several, out of `result.json` and `config.yaml`."""
