"""What runs inside an actor, around a user's class."""
