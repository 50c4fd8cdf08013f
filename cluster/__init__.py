"""Where trials run: Ray, lanes of warm workers, devices. Knows neither torch nor Optuna."""
