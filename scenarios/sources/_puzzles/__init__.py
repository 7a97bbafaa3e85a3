"""The puzzles of the source `puzzles`, one file per skill, and what they share: dice, the names of things, and the grid they stand on."""
