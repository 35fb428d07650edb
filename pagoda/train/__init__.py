"""Training: one loop, and a small file per objective."""
