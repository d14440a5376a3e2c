"""Guidance: actors that steer a model towards a reward while it draws, without training it."""
