"""Prompts and recordings of what a denoiser sees along its trajectory. Knows neither exporter nor targets."""
