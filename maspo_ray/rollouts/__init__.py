"""Prompts → rollouts, over the actors that generate and score."""
