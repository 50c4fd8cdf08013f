"""The durable record: one Optuna study, its storage, its lease."""
