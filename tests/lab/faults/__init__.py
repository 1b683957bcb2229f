"""Tests that are meant to go wrong; tests/lab/test_lab.py runs them and looks at what is reported. Not collected."""
