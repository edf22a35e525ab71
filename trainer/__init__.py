"""The algorithm: the loop, and one class per kind of step."""
