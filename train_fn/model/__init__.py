"""The base model, its adapter, and what a step does to them."""
