"""What a run checks of itself: held-out accuracy, and that learner and engines agree."""
