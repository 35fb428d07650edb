"""The maths: each operation as a readable PyTorch reference and, where it pays, a fast kernel behind the same name."""
