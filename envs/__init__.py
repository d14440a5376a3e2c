"""Denoising as a Gymnasium vector env."""
