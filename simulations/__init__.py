"""Running a federation on one machine: the engines, the demo, what it is worth, and what can be done with it after."""
