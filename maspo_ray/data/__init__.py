"""Rows → prompts, and which prompt comes next."""
