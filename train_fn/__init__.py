"""What runs on every GPU: the measured LoRA training function. Knows torch; knows neither Ray nor Optuna."""
