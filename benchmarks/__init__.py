"""What makes, measures and compares models and algorithms."""
