"""Measuring trained models: loss and bits per byte per domain, and the baselines to compare them with."""
