"""Preflight: the real training step, compiled for devices that are not there, before anything is paid for."""
