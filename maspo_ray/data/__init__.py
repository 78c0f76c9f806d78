"""The training data: rows of a source → tokenised prompts, and the samplers that choose the next prompt."""
