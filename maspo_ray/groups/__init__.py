"""Pure state machines over the groups on their way to the learner, and pure rules over one group."""
