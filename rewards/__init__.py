"""Scores of finished pictures, and how learned ones are fitted."""
