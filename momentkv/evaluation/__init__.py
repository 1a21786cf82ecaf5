"""Measuring on real models and texts what a compressed cache costs: fidelity and the directional gap."""
