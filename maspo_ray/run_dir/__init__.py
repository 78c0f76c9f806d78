"""What a run writes, to its folder and to the terminal."""
