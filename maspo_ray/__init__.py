"""Ray-native, actor-based reinforcement learning with verifiable rewards for language models."""
