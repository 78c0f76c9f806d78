"""The built-in reward actors; `reward.actor` in the config names one.

    actors.rewards.exact_match:ExactMatchReward         the completion's text is the answer
    actors.rewards.math_verify:MathVerifyReward         the completion's mathematics equals the answer's
    actors.rewards.reasoning_gym:ReasoningGymReward     the reasoning-gym task's own scorer

Nothing is imported here, so that a run imports only the libraries of its own reward.
"""
