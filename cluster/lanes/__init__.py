"""Ray Tune over lanes of warm workers, Ray Train inside them."""
