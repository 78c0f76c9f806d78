"""What runs inside an actor, around an engine's or a user's class, and what it and the controller say to each other."""
