"""Prompts → rollouts, groups → reference log-probs, versions → engines: over the actors that do the work."""
