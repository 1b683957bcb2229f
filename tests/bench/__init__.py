"""The speed and memory table: `python -m tests.bench`. No test asserts on it; a clock is not a test."""
