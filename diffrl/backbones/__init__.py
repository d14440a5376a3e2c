"""The pretrained networks."""
